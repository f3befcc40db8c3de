"""Layers under every kind of mask against the full layer, by stage: what ``maskedtrain bench
--quick`` times, with its verdicts.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from maskedtrain.benchmark.cases import default_sizes, layer_cases, meprop_sweep
from maskedtrain.benchmark.layers import LayerCase, Pair, Stage
from maskedtrain.benchmark.rows import stage_row
from partial_kernels._core import discovery

# That one stage of one layer may take, if rounds are short.
SECONDS = 1.0
ROUNDS = 7

CPU = torch.device("cpu")
CASES: dict[str, tuple[LayerCase, Stage]] = {
    f"{case.label.replace(' ', '-')}-{stage}": (case, stage)
    for case in (
        *meprop_sweep(CPU, torch.float32, quick=True),
        *(
            case
            for size in default_sizes(CPU, quick=True)
            for case in layer_cases(size, torch.float32, discovery.families(), quick=True)
        ),
    )
    for stage in case.stages
}
pair = lru_cache(maxsize=1)(Pair)


@pytest.mark.parametrize("name", CASES)
def test_layer(benchmark, note, name):
    """One stage of a masked layer, and its time as a share of the full layer's."""
    case, stage = CASES[name]
    sides = pair(case, CPU)
    benchmark.group = f"layers: {stage}"
    benchmark.pedantic(sides.ours.stage(stage), rounds=3, warmup_rounds=1)
    row = stage_row(sides, stage, CPU, budget_s=SECONDS, rounds=ROUNDS)
    note(ms=row.ms, baseline=row.baseline, ratio=1 / row.speedup, low=1 / row.high)
    note(high=1 / row.low, share_of_floor=row.floor_share, verdict=row.verdict)
    benchmark.extra_info |= row.as_dict()

"""Training steps of every method: time and FLOPs as shares of slimmable or standard training's,
paired, and memory.
"""

from __future__ import annotations

from functools import cache

import pytest

from maskedtrain.benchmark.training import EXPERIMENTS, Steps, TrainingRow, compare

# That the comparison of one experiment's methods may take.
SECONDS = 60
MARGIN = 1.1

CASES = [
    pytest.param(name, method, id=f"{name}-{method}")
    for name, experiment in EXPERIMENTS.items()
    for method in experiment.methods
    if method != "separate"
]


@cache
def rows(name: str) -> dict[str, TrainingRow]:
    return {row.method: row for row in compare(EXPERIMENTS[name], budget_s=SECONDS)}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_step(benchmark, note, name, method):
    """As many steps as a method has plans; a step beside its baseline's."""
    steps = Steps(EXPERIMENTS[name], method)
    benchmark.group = f"training, {EXPERIMENTS[name].title}, batches of {steps.batch_size}"
    benchmark.pedantic(steps, rounds=3, warmup_rounds=1)
    row = rows(name)[method]
    note(
        ms=1e3 * benchmark.stats["median"] / steps.count,
        gflops=row.training_flops_per_step / 1e9,
        step_mb=row.step_bytes / 1e6,
    )
    if share := row.of_slimmable or row.of_standard:
        note(baseline=share.baseline, flops_ratio=share.flops, bar=MARGIN * share.flops)
        note(ratio="too noisy" if share.noisy else share.time, low=share.low, high=share.high)

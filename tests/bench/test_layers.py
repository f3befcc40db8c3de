"""Layers that are compared: what each costs, holds and runs, on small shapes."""

from __future__ import annotations

import pytest
import torch

from maskedtrain.benchmark.cases import (
    PAPER_SPEEDUPS,
    Size,
    default_sizes,
    layer_cases,
    meprop_sweep,
)
from maskedtrain.benchmark.layers import Cost, LayerCase, Pair
from maskedtrain.benchmark.rows import Budget, layer_rows, total
from partial_kernels._core import discovery

CPU = torch.device("cpu")
SIZE = Size(128, 256, 16)
T, O, I = SIZE.tokens, SIZE.outputs, SIZE.inputs
# Of AdamW, by element: FLOPs, and reads and writes of four bytes.
UPDATE, MOVED = 14, 28


def cases(*, quick: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, LayerCase]:
    found = layer_cases(SIZE, dtype, discovery.families(), quick=quick)
    assert len({case.label for case in found}) == len(found)
    return {case.label: case for case in found}


CASES = cases()


def test_what_the_dense_layer_costs():
    costs = CASES["Prefix 25 %"].dense_costs()
    moved = 4 * (T * O + T * I + O * I)
    assert costs["forward"] == Cost(2 * T * O * I, moved)
    assert costs["backward"] == Cost(4 * T * O * I, 2 * moved)
    assert costs["optimizer"] == Cost(UPDATE * O * I, MOVED * O * I)
    assert costs["step"].flops == 6 * T * O * I + UPDATE * O * I


# By label: weights of the forward's product, of dx and dW together, and those that are updated.
COSTS = {
    "Prefix 25 %": (O * I // 4, O * I // 2, O * I // 4),
    "Index 56.2 %": (96 * 192, 2 * 96 * 192, 96 * 192),
    "Block 64 50 %": (O * I // 2, O * I, O * I // 2),
    "Block 32 12.5 %": (O * I // 8, O * I // 4, O * I // 8),
    "LFC core 1/8": (16 * (O + I), 2 * 16 * (O + I), 16 * (O + I)),
    "top-k row 1/16": (O * I, 2 * 8 * I, O * I),
    "top-k batch 1/64": (O * I, 2 * 2 * I, O * I),
}


@pytest.mark.parametrize("label", COSTS)
def test_what_a_masked_layer_costs(label: str):
    forward, backward, updated = COSTS[label]
    costs = CASES[label].costs()
    assert costs["forward"].flops == 2 * T * forward
    assert costs["backward"].flops == 2 * T * backward
    assert costs["optimizer"] == Cost(UPDATE * updated, MOVED * updated)
    assert costs["step"].flops == sum(costs[s].flops for s in ("forward", "backward", "optimizer"))


def test_trained_elements_cost_their_share():
    case = CASES["Packed 0.5 %"]
    assert case.case.kept == round(0.005 * O * I)
    assert case.costs()["optimizer"].flops == UPDATE * case.case.kept


@pytest.mark.parametrize("label", CASES)
def test_both_layers_run_every_stage(label: str):
    pair = Pair(CASES[label], CPU)
    for stage in CASES[label].stages:
        for side in (pair.dense, pair.ours):
            side.stage(stage)()
            assert all(param.isfinite().all() for param in side.params)
        assert pair.backend(stage) in ("native", "reference", "torch")


def test_a_step_trains_the_masked_part_alone():
    pair = Pair(CASES["Prefix 25 %"], CPU)
    (weight,) = pair.ours.params
    before = weight.detach().clone()
    pair.ours.stage("step")()
    changed = weight != before
    assert changed[: O // 2, : I // 2].all()
    assert changed.sum() == O * I // 4


def test_memory_of_a_step():
    pair = Pair(CASES["Prefix 25 %"], CPU)
    weight = 4 * O * I
    # x, the gradient and two moments; torch also keeps its count of steps.
    assert pair.dense.memory() == 4 * T * I + weight + 2 * weight + 4
    assert pair.ours.memory() == 4 * T * I // 2 + weight + 2 * weight
    packed = Pair(CASES["Packed 0.5 %"], CPU)
    kept = CASES["Packed 0.5 %"].case.kept
    # Positions are saved beside x and the values, which are parameters; W is not trained.
    saved = 4 * T * I + 8 * kept + weight
    assert packed.ours.memory() == saved + 3 * 4 * kept + 4


@pytest.mark.parametrize(
    ("label", "stage", "backend", "dense"),
    [
        ("Element 5 %", "forward", "reference", True),
        ("Block 64 50 %", "backward", "reference", True),
        ("Block 64 50 %", "backward", "native", False),
        ("Element 5 %", "optimizer", "native", False),
        ("LFC core 1/8", "step", "torch", False),
        ("Prefix 25 %", "step", "reference", False),
        ("top-k row 1/16", "step", "reference", True),
        ("top-k batch 1/16", "step", "reference", False),
    ],
)
def test_which_backends_are_dense(label: str, stage: str, backend: str, dense: bool):
    assert CASES[label].dense_ran(stage, backend) == dense


@pytest.mark.parametrize("label", ["Block 32 50 %", "LFC core 1/8", "top-k batch 1/16"])
def test_in_half_precision_parameters_stay_fp32(label: str):
    pair = Pair(cases(dtype=torch.bfloat16)[label], CPU)
    for side in (pair.dense, pair.ours):
        assert side.forward().dtype == torch.bfloat16
        side.stage("step")()
        assert {param.dtype for param in side.params} == {torch.float32}


def test_families_choose_rows():
    chosen = layer_cases(SIZE, torch.float32, ["element", "optim"], quick=True)
    stages = {case.family: case.stages for case in chosen}
    assert stages["element"] == ("forward", "backward", "optimizer", "step")
    assert stages["submatrix"] == stages["lfc"] == ("optimizer",)
    # Its update is the dense one.
    assert "topk" not in stages


def test_kinds_take_turns():
    kinds = [case.kind for case in CASES.values()]
    first = kinds[: len(set(kinds))]
    assert sorted(first) == sorted(set(kinds))


def test_the_sweep_has_the_papers_shares():
    for quick in (True, False):
        found = meprop_sweep(CPU, torch.float32, quick=quick)
        assert [case.density for case in found] == [k / 8192 for k in PAPER_SPEEDUPS]
        assert {case.stages for case in found} == {("backward",)}


@pytest.mark.parametrize("text", ["512", "512x2048", "0x128:4", "128x128:0", "64x128:9", "axb:c"])
def test_shapes_that_are_none(text: str):
    with pytest.raises(ValueError, match="--shapes must"):
        Size.parse(text)


def test_shapes():
    assert Size.parse("512x2048:8192") == Size(512, 2048, 8192)
    assert str(Size(512, 2048, 8192)) == "512x2048:8192"
    assert all(default_sizes(CPU, quick=quick) for quick in (True, False))


def test_rows_are_of_their_layer():
    case = CASES["Block 64 50 %"].only("forward", "step")
    forward, step = layer_rows(case, CPU, Budget(60.0, 2), rounds=3, count=4)
    assert (forward.stage, step.stage) == ("forward", "step")
    assert forward.size == "128x256:16" and forward.density == 0.5 and forward.count == 4
    assert forward.flops == case.costs()["forward"].flops
    assert forward.dense_flops == 2 * T * O * I
    assert 0 < forward.low <= forward.speedup <= forward.high
    assert forward.mem_bytes is None
    assert step.mem_bytes == Pair(case, CPU).ours.memory()
    assert forward.floor_share > 0 and forward.verdict


def test_time_is_shared_and_what_has_none_left_is_named():
    now = [0.0]
    budget = Budget(10.0, 4, clock=lambda: now[0])
    assert budget.share("a") == 2.5
    now[0] = 1.0
    assert budget.share("b") == 3.0
    now[0] = 11.0
    assert list(layer_rows(CASES["Element 5 %"].only("step"), CPU, budget, rounds=3)) == []
    assert budget.skipped == ["Element 5 % step"]


def test_a_models_total_counts_every_layer():
    rows = [
        row
        for count in (1, 3)
        for row in layer_rows(
            CASES["Element 5 %"].only("step"), CPU, Budget(60.0, 1), rounds=3, count=count
        )
    ]
    found = total(rows, label="Element 5 %")
    assert found["layers"] == 4
    assert found["dense_ms"] == pytest.approx(rows[0].dense_ms + 3 * rows[1].dense_ms)
    assert found["ms"] == pytest.approx(rows[0].ms + 3 * rows[1].ms)
    ours = rows[0].dense_ms / rows[0].speedup + 3 * rows[1].dense_ms / rows[1].speedup
    assert found["speedup"] == pytest.approx(found["dense_ms"] / ours)
    assert found["low"] <= found["speedup"] <= found["high"]

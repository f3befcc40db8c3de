"""``masked_sgd_`` and ``masked_adamw_`` as torch's compilers see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import partial_kernels as pk
from partial_kernels._core import region_cases
from partial_kernels._core.regions import split
from partial_kernels.masks import Difference
from partial_kernels.optim.cases import Case
from partial_kernels.optim.reference import ADAMW, SGD

# Inductor uses torch.jit, against torch's own advice.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

MASKS = region_cases.masks((6, 5))
both_rules = pytest.mark.parametrize("rule", ["sgd", "adamw"])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@both_rules
def test_opcheck(rule: str, mask: pk.Mask) -> None:
    case = Case("", rule, (6, 5), mask, tensors=2)
    arguments = case.make()
    lists = [arguments[name] for name in ("params", "grads", *case.states)]
    source, pieces, selections = split(arguments["masks"], *lists)
    # A functional twin cannot be given two pieces of one tensor: opcheck compares storages.
    pieces = [[piece.clone() for piece in column] for column in pieces]
    lr = torch.tensor(0.01, dtype=torch.float64)
    if rule == "sgd":
        torch.library.opcheck(SGD._call, (*pieces, *selections, lr, 0.9, True, 0.1, "auto"))
    else:
        steps = [arguments["steps"][i] for i in source]
        options = (steps, None, lr, 0.9, 0.99, 1e-8, 0.1, "auto")
        torch.library.opcheck(ADAMW._call, (*pieces, *selections, *options))


def every_mask_at_once(rule: str) -> tuple[Case, dict[str, Any]]:
    """One tensor for every mask, and one that occurs twice with disjoint masks."""
    core = pk.Prefix(3, 2)
    masks = [*MASKS.values(), core]
    case = Case("", rule, (6, 5), pk.Full(), tensors=len(masks))
    arguments = {**case.make(), "masks": [*masks, Difference(pk.Full(), core)]}
    for name in ("params", "grads", "steps", *case.states):
        if name in arguments:
            arguments[name] = [*arguments[name], arguments[name][-1]]
    return case, arguments


def run_compiled(rule: str, backend: str, steps: int) -> None:
    """Steps of a compiled function equal those of the plain one, and recompile once at most."""
    case, arguments = every_mask_at_once(rule)
    _, expected = every_mask_at_once(rule)

    def step(arguments: dict[str, Any]) -> Tensor:
        case.run(arguments)
        # Reads what was written: must come after.
        return arguments["params"][0] + arguments["params"][-1]

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for t in range(1, steps):
        changing: dict[str, Any] = {"lr": torch.tensor(0.1 / t, dtype=torch.float64)}
        if rule == "adamw":
            changing["steps"] = [step + t for step in arguments["steps"]]
        with torch.compiler.set_stance("default" if t <= 2 else "fail_on_recompile"):
            ours = compiled({**arguments, **changing})
        assert torch.equal(ours, step({**expected, **changing}))
    for name in ("params", *case.states):
        for tensor, result in zip(arguments[name], expected[name], strict=True):
            assert torch.equal(tensor, result)


@both_rules
def test_compiles_into_one_graph_for_all_step_sizes_and_counts(rule: str) -> None:
    run_compiled(rule, "aot_eager", steps=12)


@pytest.mark.usefixtures("inductor")
def test_inductor() -> None:
    run_compiled("adamw", "inductor", steps=4)


def test_compiled_step_on_leaves_that_require_gradients() -> None:
    case = Case("", "adamw", (6, 5), MASKS["prefix"])
    arguments, expected = case.make(), case.make()
    for made in (arguments, expected):
        made["params"][0].requires_grad_()
    torch.compile(case.run, backend="aot_eager", fullgraph=True)(arguments)
    case.run(expected)
    assert torch.equal(arguments["params"][0], expected["params"][0])

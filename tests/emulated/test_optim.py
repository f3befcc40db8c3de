"""Masked optimizer steps of the CUDA kernels: the CPU kernels' bits, and what only they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import partial_kernels as pk
from partial_kernels._native import native_status
from partial_kernels.optim.cases import CASES, Case
from partial_kernels.optim.checks import check_steps

native = native_status()


def stepped(case: Case, impl: str, **changes: Any) -> dict[str, list[Tensor]]:
    arguments = {**case.make(), **changes}
    case.run({**arguments, "impl": impl})
    return {name: arguments[name] for name in ("params", *case.states)}


@pytest.mark.skipif(not native.available, reason=f"no compiled library: {native.reason}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_bits_are_those_of_the_cpu_kernels(case: Case) -> None:
    expected, found = (stepped(case, impl) for impl in ("native", "cuda"))
    for name, tensors in expected.items():
        for a, b in zip(found[name], tensors, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_more_tensors_than_one_launch_takes(rule: str) -> None:
    case = Case("many", rule, (3, 5), pk.Prefix(2, 3), tensors=200)
    expected, found = (stepped(case, impl) for impl in ("reference", "cuda"))
    for name, tensors in expected.items():
        torch.testing.assert_close(found[name], tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("equal", [True, False])
def test_rate_and_counts_on_the_device(dtype: torch.dtype, equal: bool) -> None:
    case = Case("device", "adamw", (4, 6), pk.Prefix(3, 4), dtype=dtype, tensors=3)
    steps = [5, 5, 5] if equal else [5, 7, 1000]
    expected = stepped(case, "cuda", steps=steps)
    for changes in (
        {"steps": torch.tensor(steps)},
        {"steps": torch.tensor(steps), "lr": torch.tensor([0.01], dtype=torch.float64)},
    ):
        found = stepped(case, "cuda", **changes)
        for name, tensors in expected.items():
            for a, b in zip(found[name], tensors, strict=True):
                assert torch.equal(a, b), name


def test_a_rate_in_place_is_a_rate_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CUDA tensor's way, for a tensor of the CPU.
    monkeypatch.setattr("partial_kernels.optim.cuda._rate", lambda lr: (0.0, lr.double()))
    for rule in ("sgd", "adamw"):
        case = Case("rate", rule, (4, 6), pk.Prefix(3, 4), tensors=3)
        expected, found = stepped(case, "reference"), stepped(case, "cuda", lr=torch.tensor(0.01))
        for name, tensors in expected.items():
            torch.testing.assert_close(found[name], tensors)


def test_counts_must_fit() -> None:
    params = [torch.ones(2)]
    with pytest.raises(ValueError, match=r"steps must be ints or a 1-D int64 tensor, got 1-D"):
        check_steps(torch.ones(1), params)
    with pytest.raises(ValueError, match="one entry per parameter, 1, got 2"):
        check_steps(torch.ones(2, dtype=torch.int64), params)
    with pytest.raises(ValueError, match="on the parameters' device cpu, got meta"):
        check_steps(torch.ones(1, dtype=torch.int64, device="meta"), params)


def test_nothing_changes_where_anything_is_wrong() -> None:
    case = Case("", "adamw", (4, 6), pk.Full(), tensors=2)
    arguments = case.make()
    before = [param.clone() for param in arguments["params"]]
    op = torch.ops.partial_kernels.masked_adamw_cuda
    lists = [arguments[n] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
    lists[3][1] = lists[3][1].double()
    none = [None, None]
    with pytest.raises(RuntimeError, match="states must be fp32"):
        op(*lists, none, none, none, [1, 1], None, 0.1, None, 0.9, 0.99, 1e-8, 0.1)
    for param, was in zip(arguments["params"], before, strict=True):
        assert torch.equal(param, was)


@pytest.mark.parametrize("layout", ["sliced", "permuted"])
def test_large_tensors_take_many_blocks(layout: str) -> None:
    case = Case("", "adamw", (70, 301), pk.Prefix(69, 299), layout=layout)
    element = replace(case, mask=pk.Element(torch.rand(70, 301) < 0.3))
    for one in (case, element):
        expected, found = (stepped(one, impl) for impl in ("reference", "cuda"))
        for name, tensors in expected.items():
            torch.testing.assert_close(found[name], tensors)

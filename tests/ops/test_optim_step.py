"""``masked_sgd_`` and ``masked_adamw_``: right inside the mask, nothing at all outside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import partial_kernels as pk
from partial_kernels._core import region_cases
from partial_kernels._native import native_status
from partial_kernels.masks import Difference
from partial_kernels.optim.cases import CASES, Case, bytes_moved, check, flops, picked, torch_optim
from partial_kernels.optim.reference import state_dtype

RULES = ("sgd", "adamw")
MASKS = region_cases.masks((6, 5))
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
both_rules = pytest.mark.parametrize("rule", RULES)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes as integers, so that NaN equals NaN and -0.0 is not 0.0."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(sizes[tensor.dtype.itemsize])


def tensors_of(case: Case, arguments: dict[str, Any]) -> list[Tensor]:
    """Everything that a step may write."""
    return [tensor for name in ("params", *case.states) for tensor in arguments[name]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_result_is_torch_optim_bit_for_bit(case: Case) -> None:
    arguments = case.make()
    # Half-precision parameters: the same arithmetic in fp32, rounded once.
    expected = torch_optim(case, arguments, state_dtype(case.dtype))
    case.run({**arguments, "impl": "reference"})
    inside = case.mask.dense(case.shape)
    for name, results in expected.items():
        for tensor, result in zip(arguments[name], results, strict=True):
            found = picked(tensor, inside)
            assert torch.equal(bits(found), bits(result.to(tensor.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@both_rules
@every_mask
def test_garbage_outside_is_ignored_and_kept(mask: pk.Mask, rule: str, dtype: torch.dtype) -> None:
    case = Case("", rule, (6, 5), mask, dtype, tensors=2)
    clean, dirty = case.make(), case.make()
    outside = ~mask.dense(case.shape)
    garbage = torch.tensor([math.nan, math.inf, -0.0, 3e38, -math.nan]).repeat(6, 1)
    for tensor in (*tensors_of(case, dirty), *dirty["grads"]):
        tensor[outside] = garbage.to(tensor.dtype)[outside]
    before = [bits(tensor).clone() for tensor in tensors_of(case, dirty)]
    for _ in range(3):
        case.run(clean)
        case.run(dirty)
    changed = False
    for ours, theirs, old in zip(
        tensors_of(case, dirty), tensors_of(case, clean), before, strict=True
    ):
        assert torch.equal(bits(ours)[outside], old[outside])
        assert torch.equal(bits(ours)[~outside], bits(theirs)[~outside])
        changed |= not torch.equal(bits(ours), old)
    assert changed


@both_rules
def test_gradients_and_masks_are_left_alone(rule: str) -> None:
    case = Case("", rule, (6, 5), MASKS["element"])
    arguments, before = case.make(), case.make()
    mask = arguments["masks"][0].mask.clone()
    case.run(arguments)
    assert torch.equal(arguments["grads"][0], before["grads"][0])
    assert torch.equal(arguments["masks"][0].mask, mask)


@given(
    st.integers(0, 6),
    st.integers(0, 5),
    st.integers(0, 6),
    st.integers(0, 5),
    st.sampled_from(RULES),
)
def test_disjoint_regions_of_one_tensor_make_up_the_whole(
    r1: int, c1: int, r2: int, c2: int, rule: str
) -> None:
    small, large = pk.Prefix(min(r1, r2), min(c1, c2)), pk.Prefix(max(r1, r2), max(c1, c2))
    regions = [small, Difference(large, small), Difference(pk.Full(), large)]
    whole = Case("", rule, (6, 5), pk.Full())
    arguments, expected = whole.make(), whole.make()
    whole.run(expected)
    parts = {
        name: value * 3 if isinstance(value, list) else value for name, value in arguments.items()
    }
    whole.run({**parts, "masks": regions})
    for ours, theirs in zip(tensors_of(whole, arguments), tensors_of(whole, expected), strict=True):
        assert torch.equal(ours, theirs)


def test_each_region_has_its_own_step_count() -> None:
    core = pk.Prefix(3, 2)
    regions = {core: 7, Difference(pk.Full(), core): 2}
    case = Case("", "adamw", (6, 5), pk.Full())
    arguments = case.make()
    expected = {
        region: torch_optim(
            Case("", "adamw", (6, 5), region), {**case.make(), "steps": [step]}, torch.float32
        )
        for region, step in regions.items()
    }
    twice = {k: v * 2 for k, v in arguments.items() if isinstance(v, list)}
    case.run(
        {
            **arguments,
            **twice,
            "masks": list(regions),
            "steps": list(regions.values()),
            "impl": "reference",
        }
    )
    for region, results in expected.items():
        inside = region.dense((6, 5))
        assert torch.equal(arguments["params"][0][inside], results["params"][0])
    # The count matters: otherwise this test could not fail.
    same_step = torch_optim(case, {**case.make(), "steps": [2]}, torch.float32)
    assert not torch.equal(arguments["params"][0].flatten(), same_step["params"][0])


@pytest.mark.parametrize("kind", ["prefix", "full", "difference", "index", "element"])
@both_rules
def test_autograd_notices_a_saved_tensor_that_was_stepped_over(rule: str, kind: str) -> None:
    case = Case("", rule, (6, 5), MASKS[kind])
    arguments = case.make()
    written = tensors_of(case, arguments)
    saved = []
    for tensor in written:
        tensor.requires_grad_()
        saved.append((tensor * tensor).sum())
    case.run(arguments)
    for loss in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert all(tensor.is_leaf and tensor.grad_fn is None for tensor in written)


@both_rules
def test_gradients_may_be_in_the_dtype_of_the_states(rule: str) -> None:
    case = Case("", rule, (6, 5), MASKS["prefix"], torch.bfloat16)
    half, single = case.make(), case.make()
    single["grads"] = [grad.float() for grad in single["grads"]]
    case.run(half)
    case.run(single)
    assert torch.equal(half["params"][0], single["params"][0])


@pytest.mark.parametrize(
    "step_size", [torch.tensor(0.01, dtype=torch.float64), torch.tensor([0.01])]
)
@both_rules
def test_lr_may_be_a_tensor(rule: str, step_size: Tensor) -> None:
    case = Case("", rule, (6, 5), MASKS["prefix"])
    arguments, expected = case.make(), case.make()
    case.run({**arguments, "lr": step_size})
    case.run({**expected, "lr": step_size.item()})
    assert torch.equal(arguments["params"][0], expected["params"][0])


def test_zero_step_size_without_momentum_changes_nothing() -> None:
    case = Case("", "sgd", (6, 5), pk.Full(), momentum=0.0, nesterov=False)
    arguments = {**case.make(), "lr": 0.0}
    case.run(arguments)
    assert torch.equal(arguments["params"][0], case.make()["params"][0])


@both_rules
def test_no_tensors_is_no_step(rule: str) -> None:
    case = Case("", rule, (6, 5), pk.Full(), tensors=0)
    case.run(case.make())


@pytest.mark.parametrize("kind", ["full", "prefix", "difference"])
@both_rules
def test_boxes_are_updated_through_views_without_dense_masks_or_copies(
    rule: str, kind: str
) -> None:
    case = Case("", rule, (6, 5), MASKS[kind])
    arguments = case.make()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        case.run({**arguments, "impl": "reference"})
    # The step size becomes a tensor without dimensions.
    events = (event for event in profiler.events() or () if any(event.input_shapes))
    operators = {event.name.removeprefix("aten::") for event in events}
    assert {"mul_", "addcdiv_" if rule == "adamw" else "add_"} <= operators
    copies = {"ones", "zeros", "where", "index", "index_put_", "index_select", "copy_", "clone"}
    assert not copies & operators


@both_rules
def test_explain_and_unknown_backends(rule: str) -> None:
    case = Case("", rule, (6, 5), MASKS["prefix"])
    arguments = case.make()
    choice = pk.explain("masked_adamw_" if rule == "adamw" else "masked_sgd_", **arguments)
    assert choice.backend == ("native" if native_status().available else "reference")
    with pytest.raises(RuntimeError, match="no such backend"):
        case.run({**arguments, "impl": "nonsense"})
    for ours, theirs in zip(
        tensors_of(case, arguments), tensors_of(case, case.make()), strict=True
    ):
        assert torch.equal(ours, theirs)


def _second(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Changes the second entry of a list."""
    return lambda arguments: {name: [arguments[name][0], change(arguments[name][1])]}


def _option(**options: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: options


_COMMON: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "shorter grads": (
        lambda a: {"grads": a["grads"][:1]},
        ValueError,
        "grads must have one entry per parameter, 2, got 1",
    ),
    "shorter masks": (
        lambda a: {"masks": a["masks"][:1]},
        ValueError,
        "masks must have one entry per parameter, 2, got 1",
    ),
    "no gradient": (
        _second("grads", lambda g: None),
        TypeError,
        r"grads\[1\] must be a tensor, got NoneType",
    ),
    "sparse gradient": (
        _second("grads", lambda g: g.to_sparse()),
        ValueError,
        r"grads\[1\] must be dense \(torch.strided\), got torch.sparse_coo",
    ),
    "shape of gradient": (
        _second("grads", lambda g: g.mT),
        ValueError,
        r"grads\[1\] must have params\[1\]'s shape \[6, 5\], got \[5, 6\]",
    ),
    "dtype of gradient": (
        _second("grads", lambda g: g.double()),
        ValueError,
        r"grads\[1\] must be torch.float32 for torch.float32 parameters, got torch.float64",
    ),
    "device of gradient": (
        _second("grads", lambda g: g.to("meta")),
        ValueError,
        r"grads\[1\] must be on params\[1\]'s device cpu, got meta",
    ),
    "integer parameter": (
        _second("params", lambda p: p.long()),
        ValueError,
        r"params\[1\] must be floating point, got torch.int64",
    ),
    "expanded parameter": (
        _second("params", lambda p: p[:1].expand(6, 5)),
        ValueError,
        r"params\[1\] is updated in place and must not be expanded",
    ),
    "mask that does not fit": (
        _second("masks", lambda m: pk.Prefix(7)),
        ValueError,
        "rows must be <= 6, got 7",
    ),
    "region that does not fit": (
        _second("masks", lambda m: Difference(pk.Full(), pk.Prefix(None, 6))),
        ValueError,
        "cols must be <= 5, got 6",
    ),
    "no mask": (_second("masks", lambda m: None), TypeError, r"masks\[1\] must be a Mask"),
    "negative lr": (_option(lr=-1.0), ValueError, "lr must be >= 0 and finite, got -1.0"),
    "lr not a number": (_option(lr=math.nan), ValueError, "lr must be >= 0 and finite, got nan"),
    "lr of a wrong type": (_option(lr="0.1"), TypeError, "lr must be a number, got str"),
    "lr of two elements": (_option(lr=torch.zeros(2)), ValueError, "lr must be one number"),
    "infinite decay": (
        _option(weight_decay=math.inf),
        ValueError,
        "weight_decay must be >= 0 and finite, got inf",
    ),
}
_BAD = {
    "sgd": {
        **_COMMON,
        "no buffers": (
            _option(momentum_buffers=None),
            ValueError,
            "momentum > 0 needs momentum_buffers, got None",
        ),
        "dtype of buffer": (
            _second("momentum_buffers", lambda b: b.bfloat16()),
            ValueError,
            r"momentum_buffers\[1\] must be torch.float32 for torch.float32 parameters, "
            "got torch.bfloat16",
        ),
        "expanded buffer": (
            _second("momentum_buffers", lambda b: b[:, :1].expand(6, 5)),
            ValueError,
            r"momentum_buffers\[1\] is updated in place",
        ),
        "negative momentum": (_option(momentum=-0.1), ValueError, "momentum must be >= 0"),
        "nesterov alone": (
            _option(momentum=0.0, nesterov=True),
            ValueError,
            "nesterov needs momentum > 0, got 0",
        ),
    },
    "adamw": {
        **_COMMON,
        "shorter states": (
            lambda a: {"exp_avg_sqs": a["exp_avg_sqs"][:1]},
            ValueError,
            "exp_avg_sqs must have one entry per parameter, 2, got 1",
        ),
        "shape of state": (
            _second("exp_avgs", lambda m: m[:3]),
            ValueError,
            r"exp_avgs\[1\] must have params\[1\]'s shape \[6, 5\], got \[3, 5\]",
        ),
        "shorter steps": (_option(steps=[1]), ValueError, "steps must have one entry per"),
        "step 0": (_option(steps=[1, 0]), ValueError, r"steps\[1\] .* must be >= 1, got 0"),
        "step 1.5": (_option(steps=[1, 1.5]), TypeError, r"steps\[1\] must be an int, got float"),
        "beta of 1": (_option(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be >= 0 and < 1"),
        "one beta": (_option(betas=(0.9,)), ValueError, "betas must be two numbers"),
        "negative eps": (_option(eps=-1e-8), ValueError, "eps must be >= 0"),
    },
}


@pytest.mark.parametrize(("rule", "fault"), [(r, fault) for r in RULES for fault in _BAD[r]])
def test_bad_arguments_raise_before_anything_is_written(rule: str, fault: str) -> None:
    change, error, message = _BAD[rule][fault]
    case = Case("", rule, (6, 5), MASKS["prefix"], tensors=2)
    arguments = case.make()
    with pytest.raises(error, match=message):
        case.run({**arguments, **change(arguments)})
    for ours, theirs in zip(
        tensors_of(case, arguments), tensors_of(case, case.make()), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_cost_models() -> None:
    case = Case("", "adamw", (8, 4), pk.Prefix(4, 2), torch.bfloat16, tensors=3)
    assert flops(case) == 14 * 3 * 8
    assert bytes_moved(case) == (2 + 2 + 2 + 4 * 4) * 3 * 8
    plain = Case("", "sgd", (8, 4), pk.Full(), momentum=0.0, nesterov=False, weight_decay=0.0)
    assert flops(plain) == 2 * 32
    assert bytes_moved(plain) == 12 * 32

"""``MaskedSGD`` and ``MaskedAdamW``: torch.optim inside the sub-network, nothing outside."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import partial_kernels as pk
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from partial_kernels._core import region_cases
from partial_kernels.masks import Difference

ADAMW: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
RULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (MaskedAdamW, torch.optim.AdamW, ADAMW),
    "adamw-no-decay": (MaskedAdamW, torch.optim.AdamW, {**ADAMW, "weight_decay": 0.0}),
    "sgd-momentum": (MaskedSGD, torch.optim.SGD, SGD),
    "sgd-nesterov": (MaskedSGD, torch.optim.SGD, {**SGD, "nesterov": True}),
    "sgd-no-decay": (MaskedSGD, torch.optim.SGD, {**SGD, "weight_decay": 0.0}),
    "sgd-plain": (MaskedSGD, torch.optim.SGD, {**SGD, "momentum": 0.0}),
}
every_rule = pytest.mark.parametrize("rule", RULES)
two_rules = pytest.mark.parametrize("rule", ["adamw", "sgd-nesterov"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class Masks:
    """A source of masks: by parameter, None for the others."""

    def __init__(self, masks: dict[Any, pk.Mask | None]) -> None:
        self.masks = masks

    def mask_of(self, parameter: Any) -> pk.Mask | None:
        return self.masks.get(parameter)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes as integers, so that NaN equals NaN and -0.0 is not 0.0."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(sizes[tensor.dtype.itemsize])


def assert_same(first: Tensor, second: Tensor) -> None:
    assert first.dtype == second.dtype and torch.equal(bits(first), bits(second))


def parameter(
    shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Parameter:
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(values.to(dtype))


def gradient(param: Tensor, seed: int) -> Tensor:
    """That of a quadratic, with noise and with zeros of either sign."""
    noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    noise.view(-1)[seed % max(1, noise.numel()) :: 5] = -0.0
    return (param.detach().float() * (noise != 0) + noise).to(param.dtype)


def assert_same_state(first: Any, second: Any) -> None:
    """Equal dicts of dicts, lists, numbers and tensors."""
    if torch.is_tensor(first):
        assert_same(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_same_state(value, second[key])
    else:
        assert first == second


def state_tensors(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in optimizer.state[param].items() if k != "step" and torch.is_tensor(v)}


# Regions stored as separate parameters

ELEMENTS = torch.rand(6, 5, generator=torch.Generator().manual_seed(3))
ROWS = torch.tensor([False, True, False, False, True, False])[:, None]
NESTED: dict[str, tuple[tuple[int, ...], list[pk.Mask]]] = {
    "1d-2-levels": ((9,), [pk.Prefix(4), pk.Full()]),
    "1d-3-levels": ((9,), [pk.Prefix(2), pk.Prefix(5), pk.Full()]),
    "2d-2-levels": ((6, 5), [pk.Prefix(3, 2), pk.Full()]),
    "2d-3-levels": ((6, 5), [pk.Prefix(2, 2), pk.Prefix(4, None), pk.Full()]),
    "2d-part-of-the-parameter": ((6, 5), [pk.Prefix(2, 2), pk.Prefix(4, 5), pk.Prefix(5)]),
    "4d-2-levels": ((6, 4, 3, 3), [pk.Prefix(3, 2), pk.Full()]),
    "4d-3-levels": ((6, 4, 3, 3), [pk.Prefix(2, 1), pk.Prefix(3, 4), pk.Full()]),
    "element-2-levels": ((6, 5), [pk.Element(ELEMENTS < 0.3), pk.Full()]),
    "element-3-levels": (
        (6, 5),
        [pk.Element(ELEMENTS < 0.3), pk.Element(ELEMENTS < 0.7), pk.Full()],
    ),
    "index-in-element": (
        (6, 5),
        [pk.Index([1, 4]), pk.Element((ELEMENTS < 0.5) | ROWS), pk.Full()],
    ),
}


@pytest.mark.parametrize("name", NESTED)
@every_rule
@pytest.mark.usefixtures("correct_roots")
def test_nested_steps_are_torch_optim_on_regions_of_their_own(rule: str, name: str) -> None:
    ours, theirs, options = RULES[rule]
    shape, masks = NESTED[name]
    inside = [mask.dense(shape) for mask in masks]
    # What each level adds to the one before it.
    added = [now & ~before for before, now in itertools.pairwise([inside[0] & False, *inside])]
    param = parameter(shape)
    before = param.detach().clone()
    regions = [nn.Parameter(param.detach()[where]) for where in added]
    optimizer = ours([param], **options)
    reference = theirs(regions, **options)
    for step in range(60):
        # The largest first, as in ATS, and not all equally often.
        level = -(step % (len(masks) + 1)) % len(masks)
        param.grad = gradient(param, step)
        param.grad[~inside[level]] = math.nan
        for i, (region, where) in enumerate(zip(regions, added, strict=True)):
            region.grad = param.grad[where] if i <= level else None
        optimizer.step(Masks({param: masks[level]}))
        reference.step()
    assert any(not torch.equal(region, before[w]) for region, w in zip(regions, added, strict=True))
    for region, where in zip(regions, added, strict=True):
        assert_same(param[where], region)
        for key, value in state_tensors(reference, region).items():
            assert_same(optimizer.state[param][key][where], value)
    assert_same(param[~inside[-1]], before[~inside[-1]])


def test_one_count_for_all_regions_would_give_another_result() -> None:
    params = [parameter((6, 5)), parameter((6, 5))]
    core = pk.Prefix(3, 2)
    # The second parameter has seen masks that cross, so it counts for itself.
    crossing = [core, pk.Prefix(2, 3)]
    optimizers = [MaskedAdamW([param], **ADAMW) for param in params]
    for param, optimizer, masks in zip(params, optimizers, ([core, core], crossing), strict=True):
        for mask in masks:
            param.grad = torch.zeros_like(param)
            optimizer.step(Masks({param: mask}))
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert not torch.equal(params[0], params[1])


# Everything inside


def shapes() -> list[nn.Parameter]:
    return [parameter(shape, i) for i, shape in enumerate([(7,), (6, 5), (4, 3, 3, 3), ()])]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=50),
    "warmup-cosine": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=40),
        ],
        milestones=[10],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@every_rule
@pytest.mark.usefixtures("correct_roots")
def test_whole_steps_are_torch_optim_bit_for_bit(rule: str, schedule: str) -> None:
    ours, theirs, options = RULES[rule]
    params, copies = shapes(), shapes()
    optimizer, reference = ours(params, **options), theirs(copies, **options)
    schedules = [SCHEDULES[schedule](one) for one in (optimizer, reference)]
    for step in range(50):
        for param, twin in zip(params, copies, strict=True):
            param.grad = gradient(param, step)
            twin.grad = param.grad.clone()
        optimizer.step()
        reference.step()
        for one in schedules:
            one.step()
    for param, twin in zip(params, copies, strict=True):
        assert_same(param, twin)
        for key, value in state_tensors(reference, twin).items():
            assert_same(optimizer.state[param][key], value)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_starts_from_the_gradient_and_keeps_the_sign_of_zeros(nesterov: bool) -> None:
    params = [nn.Parameter(torch.tensor([-0.0, 0.0, -0.0, 0.0])) for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    ours, theirs = MaskedSGD(params[:1], **options), torch.optim.SGD(params[1:], **options)
    for _ in range(2):
        for param, optimizer in zip(params, (ours, theirs), strict=True):
            param.grad = torch.tensor([-0.0, -0.0, 0.0, 0.0])
            optimizer.step()
        assert_same(*params)
        assert_same(
            *(o.state[p]["momentum_buffer"] for p, o in zip(params, (ours, theirs), strict=True))
        )


@two_rules
@pytest.mark.usefixtures("correct_roots")
def test_groups_have_their_own_options(rule: str) -> None:
    ours, theirs, options = RULES[rule]
    results = []
    for kind in (ours, theirs):
        first, second, third = shapes()[:3]
        groups = [{"params": [first]}, {"params": [second], "lr": 0.5, "weight_decay": 0.0}]
        optimizer = kind(groups, **options)
        optimizer.add_param_group({"params": [third], "lr": 0.003})
        for step in range(5):
            for param in (first, second, third):
                param.grad = gradient(param, step)
            optimizer.step()
        results.append((first, second, third))
    for param, twin in zip(*results, strict=True):
        assert_same(param, twin)


def test_step_size_as_a_tensor() -> None:
    params = [parameter((6, 5)), parameter((6, 5))]
    tensor = torch.tensor(0.02, dtype=torch.float64)
    for param, lr in zip(params, (0.02, tensor), strict=True):
        optimizer = MaskedAdamW([param], lr=lr)
        for step in range(3):
            param.grad = gradient(param, step)
            optimizer.step(lr_scale=0.5)
    assert_same(*params)


# Outside

KINDS = region_cases.masks((6, 5))


@dtypes
@pytest.mark.parametrize("kind", KINDS)
@two_rules
def test_nothing_outside_the_mask_changes(rule: str, kind: str, dtype: torch.dtype) -> None:
    ours, _, options = RULES[rule]
    param, never, without = (parameter((6, 5), i, dtype) for i in range(3))
    optimizer = ours([param, never, without], **options)
    # A whole step first, so that there is momentum and state that could move.
    for one in (param, never, without):
        one.grad = gradient(one, 0)
    optimizer.step()
    without.grad = None
    outside = ~KINDS[kind].dense((6, 5))
    before = copy.deepcopy((param, never, without, optimizer.state_dict()["state"]))
    for step in range(1, 6):
        param.grad, never.grad = gradient(param, step), gradient(never, step)
        param.grad[outside] = math.nan
        optimizer.step(Masks({param: KINDS[kind], without: pk.Full()}))
    old_param, old_never, old_without, old_state = before
    assert_same(never, old_never)
    assert_same(without, old_without)
    state = optimizer.state_dict()["state"]
    for i in (1, 2):
        assert_same_state(state[i], old_state[i])
    now = [param, *state_tensors(optimizer, param).values()]
    then = [old_param, *(v for v in old_state[0].values() if torch.is_tensor(v))]
    for new, old in zip(now, then, strict=True):
        assert torch.equal(bits(new)[outside], bits(old)[outside])
        assert not torch.equal(new, old)
        assert bool(new.isfinite().all())


@pytest.mark.parametrize("layout", region_cases.LAYOUTS)
@two_rules
def test_layout_does_not_matter(rule: str, layout: str) -> None:
    ours, _, options = RULES[rule]
    results = []
    for kind in ("contiguous", layout):
        param = nn.Parameter(region_cases.arranged(parameter((6, 4, 3, 3)).detach(), kind))
        optimizer = ours([param], **options)
        for step in range(6):
            param.grad = gradient(param, step)
            optimizer.step(Masks({param: pk.Prefix(3, 2) if step % 2 else pk.Full()}))
        results.append(param)
    assert_same(*(param.contiguous() for param in results))


def test_state_is_created_for_what_is_stepped_alone() -> None:
    params = [parameter((4,)), parameter((4,)), parameter((4,))]
    for optimizer in (MaskedAdamW(params), MaskedSGD(params, 0.1, momentum=0.9)):
        params[0].grad = params[1].grad = torch.ones(4)
        optimizer.step(Masks({params[0]: pk.Prefix(2), params[2]: pk.Full()}))
        assert list(optimizer.state) == [params[0]]
    optimizer = MaskedSGD(params, 0.1, weight_decay=0.1)
    optimizer.step()
    assert not optimizer.state


@dtypes
def test_state_is_single_precision_at_least(dtype: torch.dtype) -> None:
    for wanted, given in ((torch.float32, dtype), (torch.float64, torch.float64)):
        param = parameter((4,), dtype=given)
        param.grad = torch.ones_like(param)
        for optimizer in (MaskedAdamW([param]), MaskedSGD([param], 0.1, momentum=0.9)):
            optimizer.step()
            assert all(v.dtype == wanted for v in state_tensors(optimizer, param).values())
            assert param.dtype == given


# Masks that cross


def test_masks_drawn_anew_count_updates_of_the_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    param = parameter((6, 5), dtype=torch.float64)
    expected, m, v = param.detach().clone(), 0 * param.detach(), 0 * param.detach()
    optimizer = MaskedAdamW([param], **ADAMW)
    draws = [pk.Prefix(3), pk.Full()] + [
        pk.Element(torch.rand(6, 5, generator=generator) < 0.5) for _ in range(20)
    ]
    for t, mask in enumerate([*draws, pk.Full()], start=1):
        param.grad = gradient(param, t)
        inside = mask.dense((6, 5))
        optimizer.step(Masks({param: mask}))
        # The masks before the third are nested: the core's first step is its first, and the whole's
        # step is the core's second and the rest's first.
        own = torch.full((6, 1), t, dtype=torch.float64)
        if t == 2:
            own[3:] = 1
        g = param.grad
        decayed = expected * (1 - 0.02 * 0.1)
        m = torch.where(inside, m.lerp(g, 1 - 0.8), m)
        v = torch.where(inside, 0.95 * v + (1 - 0.95) * g * g, v)
        change = 0.02 * (m / (1 - 0.8**own)) / ((v / (1 - 0.95**own)).sqrt() + 1e-8)
        expected = torch.where(inside, decayed - change, expected)
        # The formula rounds in another order; fp64 has 2e-16.
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-13)


# Saving and loading

PHASES: dict[str, Callable[[int], pk.Mask]] = {
    "alternating": lambda step: pk.Prefix(3, 2) if step % 2 else pk.Full(),
    "hierarchy": lambda step: [pk.Full(), pk.Prefix(2, 2), pk.Prefix(4, None)][step % 3],
    "elements": lambda step: [pk.Element(ELEMENTS < 0.3), pk.Element(ELEMENTS < 0.6)][step % 2],
    "packed-and-blocks": lambda step: [
        pk.Packed([0, 1, 5]),
        pk.Block(torch.tensor([[True, True, True]] * 2 + [[False] * 3]), 2),
        pk.Full(),
    ][step % 3],
    "crossing": lambda step: pk.Index([step % 6, *([5] if step % 6 < 5 else [])]),
    "whole": lambda step: pk.Full(),
}


def train(optimizer: Any, param: Tensor, phase: str, steps: range) -> None:
    for step in steps:
        param.grad = gradient(param, step)
        optimizer.step(Masks({param: PHASES[phase](step)}))


@dtypes
@pytest.mark.parametrize("cut", [1, 2, 3, 7])
@pytest.mark.parametrize("phase", PHASES)
@two_rules
def test_resuming_is_bitwise(rule: str, phase: str, cut: int, dtype: torch.dtype) -> None:
    ours, _, options = RULES[rule]
    param = parameter((6, 5), dtype=dtype)
    optimizer = ours([param], **options)
    train(optimizer, param, phase, range(cut))
    file = io.BytesIO()
    torch.save({"param": param.detach(), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, param, phase, range(cut, cut + 9))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = nn.Parameter(saved["param"])
    resumed = ours([again], lr=99.0)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, again, phase, range(cut, cut + 9))
    assert_same(again, param)
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


@two_rules
def test_copies_continue_alike(rule: str) -> None:
    ours, _, options = RULES[rule]
    param = parameter((6, 5))
    optimizer = ours([param], **options)
    train(optimizer, param, "elements", range(3))
    deep = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    train(optimizer, param, "elements", range(3, 8))
    for twin in (deep, pickled):
        [own] = twin.param_groups[0]["params"]
        assert own is not param
        train(twin, own, "elements", range(3, 8))
        assert_same(own, param)
        assert_same_state(twin.state_dict(), optimizer.state_dict())


def test_hooks_around_saving_and_loading_see_what_is_in_the_file() -> None:
    param = parameter((6, 5))
    optimizer = MaskedAdamW([param])
    train(optimizer, param, "alternating", range(2))
    seen: dict[str, Any] = {}
    optimizer.register_state_dict_post_hook(
        lambda o, d: seen.update(saved=d["state"][0]["regions"])
    )
    saved = optimizer.state_dict()
    assert seen["saved"]["updates"] == [1, 1]
    assert torch.is_tensor(saved["state"][0]["exp_avg"])

    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.update(loaded=d["state"][0]))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.update(state=dict(o.state)))
    optimizer.load_state_dict(saved)
    assert seen["loaded"]["regions"]["updates"] == [1, 1]
    assert seen["state"][param]["regions"].updates == (1, 1)


def test_state_of_parameters_without_updates_is_empty_when_loaded_too() -> None:
    param, other = parameter((6, 5)), parameter((4,))
    optimizer = MaskedAdamW([param, other])
    train(optimizer, param, "alternating", range(2))
    fresh = MaskedAdamW([param, other])
    fresh.load_state_dict(optimizer.state_dict())
    assert list(fresh.state) == [param]


def other_optimizer(_: dict[str, Any]) -> dict[str, Any]:
    param = parameter((6, 5))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state_dict()


def with_state(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda saved: {**saved, "state": {0: {**saved["state"][0], **changes}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_optimizer,
            r"state of parameter 0 must hold \['exp_avg', 'exp_avg_sq', 'regions'\], got .*'step'",
        ),
        (
            with_state(exp_avg=torch.zeros(5, 6)),
            r"exp_avg of parameter 0 must have shape \[6, 5\], got \[5, 6\]",
        ),
        (
            with_state(
                regions={"masks": [{"kind": "Prefix", "rows": 7, "cols": None}], "updates": [1]}
            ),
            "rows must be <= 6, got 7",
        ),
        (lambda saved: {**saved, "param_groups": saved["param_groups"] * 2}, "parameter groups"),
    ],
    ids=["torch.optim", "shape", "mask", "groups"],
)
def test_what_cannot_be_loaded_changes_nothing(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    param = parameter((6, 5))
    optimizer = MaskedAdamW([param])
    train(optimizer, param, "alternating", range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(change(copy.deepcopy(before)))
    assert_same_state(optimizer.state_dict(), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


# The optimizer protocol


def test_closure() -> None:
    param = parameter((4,))
    optimizer = MaskedSGD([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        before = param.clone()
        loss = optimizer.step(Masks({param: pk.Prefix(2)}), closure=closure)
    assert torch.equal(loss.detach(), (before * before).sum())
    assert torch.equal(param[2:], before[2:])
    assert torch.equal(param[:2], before[:2] - 0.1 * (2 * before[:2]))
    assert param.requires_grad and param.is_leaf


@pytest.mark.parametrize("wrong", [lambda: 0, 3, "core"])
def test_sub_network_must_know_masks(wrong: Any) -> None:
    param = parameter((4,))
    param.grad = torch.ones(4)
    optimizer = MaskedSGD([param], lr=0.1)
    hint = r"pass a closure as step\(closure=...\)" if callable(wrong) else "$"
    with pytest.raises(TypeError, match=rf"subnet must have mask_of\(parameter\), got .*{hint}"):
        optimizer.step(wrong)
    assert torch.equal(param, parameter((4,)))


@two_rules
def test_lr_scale_multiplies_the_step_size_of_one_step(rule: str) -> None:
    ours, _, options = RULES[rule]
    params = [parameter((4,)), parameter((4,))]
    scaled, plain = ours(params[:1], **options), ours(params[1:], **{**options, "lr": 0.005})
    for param in params:
        param.grad = gradient(param, 0)
    scaled.step(lr_scale=0.25)
    plain.step()
    assert_same(*params)
    assert scaled.param_groups[0]["lr"] == options["lr"]


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf])
def test_lr_scale_out_of_range(factor: float) -> None:
    param = parameter((4,))
    with pytest.raises(ValueError, match="lr_scale must be >= 0 and finite"):
        MaskedSGD([param], lr=0.1).step(lr_scale=factor)


def test_step_hooks_run() -> None:
    param = parameter((4,))
    param.grad = torch.ones(4)
    optimizer = MaskedAdamW([param])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(Masks({param: pk.Prefix(1)}))
    assert calls == ["before", "after"]


def test_grad_scaler_skips_steps_with_infinite_gradients() -> None:
    param = parameter((4,))
    optimizer = MaskedAdamW([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    core = Masks({param: pk.Prefix(2)})
    scaler.scale((param * math.inf).sum()).backward()
    scaler.step(optimizer, core, lr_scale=0.5)
    scaler.update()
    assert not optimizer.state
    assert_same(param, parameter((4,)))

    twin = parameter((4,))
    twin.grad = torch.full((4,), 3.0)
    MaskedAdamW([twin]).step(Masks({twin: pk.Prefix(2)}), lr_scale=0.5)
    optimizer.zero_grad()
    scaler.scale((param * 3.0).sum()).backward()
    scaler.step(optimizer, core, lr_scale=0.5)
    assert_same(param, twin)
    assert not torch.equal(param, parameter((4,)))


@two_rules
@pytest.mark.usefixtures("correct_roots")
def test_clipping_and_accumulated_gradients(rule: str) -> None:
    ours, theirs, options = RULES[rule]
    results = []
    for kind in (ours, theirs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        optimizer = kind(model.parameters(), **options)
        for _ in range(4):
            for _ in range(2):
                model(torch.randn(5, 4)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
    for param, twin in zip(*results, strict=True):
        assert_same(param, twin)


def test_repr_shows_the_options() -> None:
    assert "nesterov: True" in repr(MaskedSGD([parameter((1,))], 0.1, momentum=0.9, nesterov=True))
    assert "betas: (0.9, 0.999)" in repr(MaskedAdamW([parameter((1,))]))


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (MaskedSGD, {"lr": -0.1}, ValueError, "lr must be >= 0 and finite, got -0.1"),
        (MaskedSGD, {"lr": "fast"}, TypeError, "lr must be a number, got str"),
        (MaskedSGD, {"lr": 0.1, "momentum": -1}, ValueError, "momentum must be >= 0"),
        (MaskedSGD, {"lr": 0.1, "nesterov": True}, ValueError, "nesterov needs momentum > 0"),
        (MaskedSGD, {"lr": 0.1, "weight_decay": math.nan}, ValueError, "weight_decay must be"),
        (MaskedAdamW, {"lr": math.inf}, ValueError, "lr must be >= 0 and finite, got inf"),
        (MaskedAdamW, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be >= 0 and < 1"),
        (MaskedAdamW, {"eps": -1.0}, ValueError, "eps must be >= 0"),
        (MaskedAdamW, {"weight_decay": -1.0}, ValueError, "weight_decay must be >= 0"),
    ],
)
def test_options_out_of_range(
    kind: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind([parameter((4,))], **options)
    optimizer = kind([parameter((4,))], lr=0.1)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter((4,))], **options})
    assert len(optimizer.param_groups) == 1


def no_mask(params: list[nn.Parameter]) -> Any:
    return Masks({params[0]: pk.Full(), params[1]: "core"})  # pyright: ignore[reportArgumentType]


def misfit(params: list[nn.Parameter]) -> Any:
    return Masks({params[0]: pk.Full(), params[1]: pk.Prefix(7)})


def sparse(params: list[nn.Parameter]) -> Any:
    params[1].grad = torch.ones(4, 3).to_sparse()


def bad_option(params: list[nn.Parameter]) -> Any:
    return "bad option"


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (no_mask, TypeError, "mask_of must return a Mask or None, got str"),
        (misfit, ValueError, "rows must be <= 4, got 7"),
        (sparse, ValueError, r"must be dense .* got torch.sparse_coo .* of shape \[4, 3\]"),
        (bad_option, ValueError, "lr must be >= 0 and finite, got nan"),
    ],
)
def test_a_fault_in_the_second_group_leaves_the_first_alone(
    prepare: Callable[[list[nn.Parameter]], Any], error: type[Exception], message: str
) -> None:
    params = [parameter((4, 3)), parameter((4, 3))]
    optimizer = MaskedAdamW([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones_like(param)
    subnet = prepare(params)
    if subnet == "bad option":
        optimizer.param_groups[1]["lr"], subnet = math.nan, None
    with pytest.raises(error, match=message):
        optimizer.step(subnet)
    assert_same(params[0], parameter((4, 3)))
    assert not optimizer.state


def test_difference_is_a_mask_like_any_other() -> None:
    param = parameter((6, 5))
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    rest = Difference(pk.Full(), pk.Prefix(3, 2))
    MaskedAdamW([param]).step(Masks({param: rest}))
    assert torch.equal(param != before, rest.dense((6, 5)))

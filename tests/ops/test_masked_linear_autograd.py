"""Autograd, autocast and threads keep working around ``masked_linear``, at no extra memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import partial_kernels as pk
from partial_kernels._core.linear_cases import LinearCase, dense_linear
from partial_kernels._core.testing import assert_within_budget, assert_zero_outside

Make = Callable[..., dict[str, Any]]

PREFIX = LinearCase("", (7,), 8, 6, pk.Prefix(5, 4))


@pytest.fixture(autouse=True, params=[False, True], ids=["small", "ops"])
def also_by_ops(request: pytest.FixtureRequest) -> None:
    """What plain PyTorch would do for, so small, is done by the ops as well."""
    if request.param:
        request.getfixturevalue("small_layers_use_ops")


def tensors(made: dict[str, Any]) -> list[Tensor]:
    return [value for value in made.values() if isinstance(value, Tensor)]


class TestSaved:
    @pytest.mark.parametrize("frozen", ["", "weight", "bias", "x"])
    def test_saves_its_arguments_and_no_copy(self, make: Make, frozen: str) -> None:
        made = make()
        if frozen:
            made[frozen].requires_grad_(False)
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            pk.masked_linear(**made)
        pointers = {tensor.untyped_storage().data_ptr() for tensor in saved}
        assert pointers <= {tensor.untyped_storage().data_ptr() for tensor in tensors(made)}
        # An activation is dead weight unless somebody will ask for the weight's gradient.
        assert (made["x"].data_ptr() in pointers) == (frozen != "weight")

    def test_graph_is_freed_without_the_garbage_collector(self, make: Make) -> None:
        made = make()
        gc.disable()
        try:
            x = made["x"] * 1
            saved = weakref.ref(x)
            pk.masked_linear(**{**made, "x": x}).sum().backward()
            del x
            assert saved() is None
        finally:
            gc.enable()

    def test_a_changed_weight_is_noticed(self) -> None:
        made = PREFIX.make(requires_grad=True)
        y = pk.masked_linear(**made)
        with torch.no_grad():
            made["weight"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class TestGradients:
    def test_hooks_see_full_shapes(self, make: Make, mask: pk.Mask) -> None:
        made = make()
        weight, seen = made["weight"], []

        def double(gradient: Tensor) -> Tensor:
            seen.append(gradient)
            return 2 * gradient

        weight.register_hook(double)
        pk.masked_linear(**made).sum().backward()
        assert seen[0].shape == weight.shape
        assert torch.equal(weight.grad, 2 * seen[0])
        assert_zero_outside(weight.grad, mask.dense(weight.shape))

    def test_gradients_accumulate(self, make: Make) -> None:
        made = make(dtype=torch.float64)
        parts = [pk.masked_linear(**made).sum(), pk.masked_linear(**made).square().sum()]
        first, second = (
            torch.autograd.grad(part, made["weight"], retain_graph=True)[0] for part in parts
        )
        for part in parts:
            part.backward()
        assert torch.equal(made["weight"].grad, first + second)

    def test_one_weight_under_several_masks(self) -> None:
        masks = [pk.Full(), pk.Prefix(5, 4), pk.Index([1, 6], [0, 5]), pk.Packed([3, 20])]
        calls = [LinearCase("", (7,), 8, 6, mask, torch.float64).make() for mask in masks]
        weight = calls[0]["weight"].requires_grad_()
        losses = [pk.masked_linear(**{**call, "weight": weight}).sum() for call in calls]
        gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
        torch.stack(losses).sum().backward()
        # The case's numbers have exact fp64 sums.
        assert torch.equal(weight.grad, torch.stack(gradients).sum(0))

    @pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
    def test_frozen_arguments_get_no_gradient(self, make: Make, frozen: str) -> None:
        free, made = make(), make()
        made[frozen].requires_grad_(False)
        for arguments in (free, made):
            pk.masked_linear(**arguments).sum().backward()
        for name in ("x", "weight", "bias"):
            if name == frozen:
                assert made[name].grad is None
            else:
                assert torch.equal(made[name].grad, free[name].grad)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, make: Make, mode: Callable[[], Any]) -> None:
        made = make()
        expected = pk.masked_linear(**made)
        with mode():
            y = pk.masked_linear(**made)
        assert expected.requires_grad and not y.requires_grad
        assert torch.equal(y, expected)

    def test_arguments_are_left_alone(self, make: Make) -> None:
        made = make()
        before = [(tensor.detach().clone(), tensor._version) for tensor in tensors(made)]
        pk.masked_linear(**made).sum().backward()
        for tensor, (value, version) in zip(tensors(made), before, strict=True):
            assert torch.equal(tensor, value)
            assert tensor._version == version


class TestAutocast:
    def test_result_is_low_precision_and_gradients_are_full(
        self, make: Make, mask: pk.Mask
    ) -> None:
        made = make()
        double = {k: v.double() if isinstance(v, Tensor) else v for k, v in made.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, plain = pk.masked_linear(**made), dense_linear(**made)
        exact = dense_linear(**double)
        assert ours.dtype == torch.bfloat16
        assert_within_budget(ours, plain, exact)
        dy = torch.randn(exact.shape).bfloat16()
        gradients = [torch.autograd.grad(y, tensors(made), dy) for y in (ours, plain)]
        truth = torch.autograd.grad(exact, tensors(double), dy.double())
        for a, b, c in zip(*gradients, truth, strict=True):
            assert a.dtype == torch.float32
            assert_within_budget(a, b, c)
        assert_zero_outside(gradients[0][1], mask.dense(made["weight"].shape))

    def test_double_stays_double(self, make: Make) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert pk.masked_linear(**make(dtype=torch.float64)).dtype == torch.float64

    def test_mixed_dtypes_are_cast(self, make: Make) -> None:
        made = make()
        made["x"] = made["x"].detach().bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert pk.masked_linear(**made).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="must have x's dtype"):
            pk.masked_linear(**made)

    @pytest.mark.parametrize("name", ["x", "weight", "bias"])
    def test_integers_are_refused(self, name: str) -> None:
        made = PREFIX.make()
        made[name] = made[name].long()
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ValueError, match=f"{name} must be floating point"),
        ):
            pk.masked_linear(**made)

    @pytest.mark.parametrize("mask", [pk.Prefix(16, 8), pk.Index(range(16), range(8))], ids=repr)
    def test_only_the_slice_is_cast(self, mask: pk.Mask) -> None:
        weight = torch.randn(512, 256, requires_grad=True)
        x = torch.randn(4, 8, requires_grad=True)

        def largest_allocation(run: Callable[[], Any]) -> int:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                run()
            return max(event.self_cpu_memory_usage for event in profiler.events() or [])

        def forward(weight: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return pk.masked_linear(x, weight, mask=mask)

        # The selected rows in fp32; a copy of the whole weight in bf16 would take 16 times that.
        selected_bytes = 4 * 16 * 256
        assert 0 < largest_allocation(lambda: forward(weight)) <= selected_bytes
        y = forward(weight.detach())
        assert 0 < largest_allocation(lambda: y.sum().backward()) <= selected_bytes


def test_threads_may_call_at_once(make: Make, mask: pk.Mask) -> None:
    made = make(batch=(65,))
    inputs = [torch.randn_like(made["x"]) for _ in range(8)]

    def run(x: Tensor) -> list[Tensor]:
        arguments = [x.requires_grad_(), made["weight"], made["bias"]]
        y = pk.masked_linear(*arguments, mask=mask)
        return [y, *torch.autograd.grad(y.square().sum(), arguments)]

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for ours, alone in zip(pool.map(run, inputs), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))

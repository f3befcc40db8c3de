"""Layers under a mask beside the full layer: what is compared, and what each costs.

The full layer is a user's: ``F.linear`` on the whole weight and torch's fused AdamW. Ours is the
same layer under one mask, with "auto" in charge of the backends and ``MaskedAdamW`` where the
optimizer has to know the mask. Parameters are fp32; another ``dtype`` is that of products, by
autocast, and of the activations. FLOPs and bytes are the kernel families' own (``cases.py``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import partial_kernels as pk
from maskedtrain.optim import MaskedAdamW
from partial_kernels._core.contest import Step, backward
from partial_kernels.masks import Mask
from partial_kernels.optim import cases as optim_cases

__all__ = ["STAGES", "Cost", "LayerCase", "Pair", "Side", "Stage"]

# T tokens, O outputs, I inputs

Stage = Literal["forward", "backward", "optimizer", "step"]
STAGES: tuple[Stage, ...] = ("forward", "backward", "optimizer", "step")

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "submatrix": pk.masked_linear,
    "blocksparse": pk.masked_linear,
    "element": pk.masked_linear,
    "packed": pk.packed_linear,
    "lfc": pk.lfc_linear,
    "topk": pk.topk_linear,
}
# Families whose plain backend is the dense computation.
_DENSE_BY_REFERENCE = {"blocksparse", "element", "packed", "topk"}
# Names of leaves that are not trained.
_FROZEN = {"packed": {"weight"}}


@dataclass(frozen=True)
class Cost:
    """FLOPs, 2 per multiply-add, and bytes if every operand moves once."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class LayerCase:
    """One layer under one mask."""

    kind: str
    """The kind of mask: a line in a figure."""
    label: str
    density: float
    """Share of the weight, or of the gradient's elements (meProp), that takes part."""
    family: str
    case: Any
    """The family's ``Case``: shapes and mask; without a bias."""
    stages: tuple[Stage, ...] = STAGES

    @property
    def shape(self) -> tuple[int, int]:
        return self.case.outputs, self.case.inputs

    @property
    def tokens(self) -> int:
        return self.case.tokens

    @property
    def mask(self) -> Mask | None:
        """That the optimizer must know: of the weight, where its gradient has parts that are 0."""
        if self.family in ("submatrix", "blocksparse", "element"):
            return self.case.mask
        return None

    def only(self, *stages: Stage) -> LayerCase:
        """The case, of these stages alone."""
        return replace(self, stages=stages)

    def costs(self) -> dict[Stage, Cost]:
        """Of our layer."""
        module = importlib.import_module(f"partial_kernels.{self.family}.cases")
        flops, moved = module.flops(self.case), module.bytes_moved(self.case)
        (O, I), mask = self.shape, self.mask
        if mask is not None:
            updated = optim_cases.Case("", "adamw", (O, I), mask)
        else:
            updated = optim_cases.Case("", "adamw", (self._trained(),), pk.Full())
        return _stage_costs(flops, moved, updated)

    def dense_costs(self) -> dict[Stage, Cost]:
        """Of the full layer."""
        (O, I), T, size = self.shape, self.tokens, self.case.dtype.itemsize
        product, moved = 2 * T * O * I, size * (T * (O + I) + O * I)
        names = ("forward", "dx", "dweight")
        updated = optim_cases.Case("", "adamw", (O, I), pk.Full())
        return _stage_costs(dict.fromkeys(names, product), dict.fromkeys(names, moved), updated)

    def _trained(self) -> int:
        """Numbers that torch's optimizer updates."""
        (O, I), case = self.shape, self.case
        if self.family == "packed":
            return case.kept
        if self.family == "lfc":
            return case.rank * (O + I) + (0 if case.core else O * I)
        return O * I

    def dense_ran(self, stage: Stage, backend: str | None) -> bool:
        """Whether with this backend the stage computes the dense layer's products."""
        # Of the columns that a whole batch shares the plain backend, too, takes a small product.
        dense = self.family in _DENSE_BY_REFERENCE and getattr(self.case, "per", "row") == "row"
        return dense and stage != "optimizer" and backend in ("reference", "torch")


def _stage_costs(
    flops: dict[str, int], moved: dict[str, int], updated: optim_cases.Case
) -> dict[Stage, Cost]:
    costs: dict[Stage, Cost] = {
        "forward": Cost(flops["forward"], moved["forward"]),
        "backward": Cost(backward(flops), backward(moved)),
        "optimizer": Cost(optim_cases.flops(updated), optim_cases.bytes_moved(updated)),
    }
    costs["step"] = costs["forward"] + costs["backward"] + costs["optimizer"]
    return costs


class _Masks:
    """What a masked optimizer is told: every parameter it has is under this mask."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def mask_of(self, parameter: Any, /) -> Mask:
        return self.mask


@dataclass
class Side:
    """One of the two layers, ready to run."""

    layer: Callable[[], Tensor]
    x: Tensor
    params: list[Tensor]
    dy: Tensor
    optimizer: Any
    update: Step
    autocast: Callable[[], AbstractContextManager[Any]]
    _y: Tensor | None = field(default=None, init=False)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.layer()

    def backward(self) -> object:
        """Of one forward, as often as wanted."""
        if self._y is None:
            self._y = self.forward()
        return torch.autograd.grad(self._y, [self.x, *self.params], self.dy, retain_graph=True)

    def step(self) -> object:
        """Forward, backward and update."""
        for leaf in (self.x, *self.params):
            leaf.grad = None
        self.forward().backward(self.dy)
        return self.update()

    def stage(self, name: Stage) -> Step:
        """What the stage does, as one call."""
        if name == "optimizer":
            self._gradients()
            return self.update
        if name == "step":
            self._y = None
        return getattr(self, name)

    def _gradients(self) -> None:
        grads = torch.autograd.grad(self.forward(), self.params, self.dy)
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def memory(self) -> int:
        """Bytes beside the parameters that a step holds: saved for the backward (x too), gradients
        of the parameters and the optimizer's state.
        """
        self.step()
        own = {param.untyped_storage().data_ptr() for param in self.params}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = self.forward()
        del y
        grads = sum(param.grad.nbytes for param in self.params if param.grad is not None)
        state = sum(
            value.nbytes
            for entry in self.optimizer.state.values()
            for value in entry.values()
            if isinstance(value, Tensor)
        )
        return sum(saved.values()) + grads + state


class Pair:
    """Both layers of a case on a device."""

    def __init__(self, case: LayerCase, device: torch.device) -> None:
        self.case = case
        dtype = case.case.dtype
        self._cast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if dtype != torch.float32:
            self._cast = lambda: torch.autocast(device.type, dtype)
        self._kwargs = _fp32_parameters(case.case.make(0, device, requires_grad=True))
        self.ours = self._ours(device)
        self.dense = self._dense(device)

    def backend(self, stage: Stage) -> str | None:
        """What "auto" runs, as ``pk.explain`` says."""
        if stage == "optimizer":
            if self.case.mask is None:
                return "torch"
            weight = self._kwargs["weight"]
            lists = [[weight], *([torch.zeros_like(weight)] for _ in range(3))]
            return pk.explain("masked_adamw_", *lists, [self.case.mask], [1], lr=0.0).backend
        # The forward of meProp is the dense one.
        if stage == "forward" and self.case.family == "topk":
            return "torch"
        with self._cast():
            return pk.explain(_FUNCTIONS[self.case.family].__name__, **self._kwargs).backend

    def _ours(self, device: torch.device) -> Side:
        case, kwargs, function = self.case, self._kwargs, _FUNCTIONS[self.case.family]
        frozen = _FROZEN.get(case.family, set())
        params = [
            value
            for name, value in kwargs.items()
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and name not in {"x", *frozen}
        ]
        if case.mask is None:
            optimizer: Any = torch.optim.AdamW(params, fused=True)
            update = optimizer.step
        else:
            optimizer, source = MaskedAdamW(params), _Masks(case.mask)
            update = partial(optimizer.step, source)
        return Side(
            lambda: function(**kwargs),
            kwargs["x"],
            params,
            case.case.dy(1, device),
            optimizer,
            update,
            self._cast,
        )

    def _dense(self, device: torch.device) -> Side:
        case = self.case
        O, I = case.shape
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        x = random(case.tokens, I).to(case.case.dtype).requires_grad_()
        weight = random(O, I).requires_grad_()
        optimizer = torch.optim.AdamW([weight], fused=True)
        dy = random(case.tokens, O).to(case.case.dtype)
        return Side(
            lambda: F.linear(x, weight), x, [weight], dy, optimizer, optimizer.step, self._cast
        )


def _fp32_parameters(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The parameters as a training in mixed precision holds them; x stays what it is."""
    return {
        name: value.detach().float().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point() and name != "x"
        else value
        for name, value in kwargs.items()
    }

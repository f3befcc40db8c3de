"""Modules of which a few elements of the parameters are trained in place.

Beside ``PackedLinear``, which adds trained numbers to a pretrained weight that stays what it is,
these train elements of the parameters themselves: the forward is the plain module's, and weight
decay is that of the parameters.

# T tokens, O outputs, I inputs, V rows of an embedding, D its width, N trained elements
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain.layers.base import Copier, MaskedModule
from maskedtrain.layers.conv import MaskedConv2d
from maskedtrain.layers.linear import MaskedLinear
from partial_kernels import Full, Mask, Packed
from partial_kernels._core.checks import check_tensors, compute_dtype, no_autocast
from partial_kernels.packed.reference import DVALUES

__all__ = ["SparselyTuned", "can_be_tuned", "tune_elements", "tuned_index", "tuned_tensor"]

Place = tuple[nn.Module, str]
"""A module, and the name of one of its own parameters."""


class SparselyTuned(MaskedModule):
    """A module some of whose parameters are trained at a few positions alone.

    ``tune_elements`` makes a module one. In the place of a parameter such as ``weight`` it has

    - ``weight_values`` [N], the parameter that is trained,
    - ``weight_index``, a buffer: their flat, sorted positions (int32 for less than 2^31 elements),
    - ``weight``, a buffer of the plain module's name and shape, into which reading ``weight`` and
      ``state_dict()`` put the values. ``DistributedDataParallel`` sends buffers around at every
      forward unless it is told ``broadcast_buffers=False``.

    Gradients, and what an optimizer keeps, have N elements, and any optimizer trains them as it
    would within the whole parameter. ``nn.Linear`` and ``nn.Embedding`` form no gradient of their
    weight's size: that of a linear layer is ``(dy^T x)[index]``, ``2 T N`` FLOPs as in
    ``pk.packed_linear``, and that of an embedding comes from sums of dy over equal tokens. All
    others form one parameter's gradient at a time, and drop it. Not differentiable twice.

    With ``requires_grad_()`` on a buffer its whole gradient is formed, until that is taken back: to
    score all elements.

    A sub-network's mask of the values says which of them it has; those outside count as zero. An
    extracted module is the plain one.
    """

    _plain_class: type[nn.Module]
    _read_names: tuple[str, ...]

    def implied_masks(self, masks: Mapping[str, Mask | None]) -> dict[str, Mask | None]:
        return {}

    def tuned(self) -> list[str]:
        """The parameters that are trained in part."""
        return [name for name in self._read_names if f"{name}_values" in self._parameters]

    @torch.no_grad()
    def place(self, name: str) -> Tensor:
        """Put a parameter's values into it; returns it."""
        tensor = cast(Tensor, self._buffers[name])
        values, index = self._elements(name)
        if len(index) and not tensor.requires_grad:
            tensor.view(-1).index_copy_(0, index.long(), values)
        return tensor

    def _elements(self, name: str) -> tuple[nn.Parameter, Tensor]:
        """A parameter's trained values and their positions."""
        values = cast(nn.Parameter, self._parameters[f"{name}_values"])
        return values, cast(Tensor, self._buffers[f"{name}_index"])

    def _mask(self, name: str) -> Mask | None:
        """The active sub-network's mask of one of the module's own parameters."""
        return Full() if self.active is None else self.active.masks[name]

    def _read(self, name: str) -> Tensor:
        """A parameter as the plain module is to see it, and autograd to differentiate."""
        if f"{name}_values" not in self._parameters:
            parameter, mask = cast(Tensor, self._parameters[name]), self._mask(name)
            return torch.zeros_like(parameter) if mask is None else mask.restrict(parameter)
        mask = self._mask(f"{name}_values")
        if not isinstance(mask, Full):
            return self._masked(name, mask)
        tensor = self.place(name)
        values, index = self._elements(name)
        return tensor if tensor.requires_grad or not len(index) else _read(values, tensor, index)

    def _masked(self, name: str, mask: Mask | None) -> Tensor:
        """A copy of a parameter without the values that are outside; differentiable."""
        values, index = self._elements(name)
        zero = values.new_zeros(())
        kept = None if mask is None else mask.laid_out(values.shape, values.device)
        some = zero.expand_as(values) if kept is None else torch.where(kept, values, zero)
        tensor = cast(Tensor, self._buffers[name]).detach()
        return tensor.view(-1).index_copy(0, index.long(), some).view_as(tensor)

    @torch.no_grad()
    def plain(self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier) -> nn.Module:
        made: Any = copier.module(self)
        made.__class__ = self._plain_class
        for name, parameter in list(self._parameters.items()):
            if parameter is not None and not name.endswith("_values"):
                made._parameters[name] = copier.parameter(parameter, masks[name])
        for name in self.tuned():
            for buffer in (name, f"{name}_index"):
                del made._buffers[buffer]
            del made._parameters[f"{name}_values"]
            made._parameters[name] = self._extracted(name, masks[f"{name}_values"], copier)
        vars(made).pop("active", None)
        return made

    def _extracted(self, name: str, mask: Mask | None, copier: Copier) -> nn.Parameter:
        if isinstance(mask, Full):
            parameter = copier.parameter(self.place(name), mask)
        elif copier.share:
            raise ValueError(
                f"share=True needs all values of {name}, got {mask}: zeros are no view"
            )
        else:
            parameter = nn.Parameter(self._masked(name, mask))
        parameter.requires_grad = mask is not None and self._elements(name)[0].requires_grad
        return parameter

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in self.tuned():
            self.place(name)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        for name in self.tuned():
            # The plain module's: not to be overwritten with what was there before.
            if f"{prefix}{name}_values" not in state_dict:
                values, index = self._elements(name)
                with torch.no_grad():
                    values.copy_(cast(Tensor, self._buffers[name]).view(-1)[index.long()])

    def __reduce__(self) -> Any:
        # Its class is made anew where it is unpickled.
        return _empty, (self._plain_class, self._read_names), copy.copy(vars(self))


class _TunedLinear(SparselyTuned):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._buffers.get("weight"), cast(Any, self).bias
        # Its bias alone may be tuned.
        if weight is None or weight.requires_grad or self._mask("weight_values") != Full():
            return F.linear(input, cast(Any, self).weight, bias)
        check_tensors(input, weight=weight, bias=bias)
        x_TI = input.to(compute_dtype(input)).reshape(-1, weight.shape[1])
        values, index = self._elements("weight")
        y_TO = _linear(x_TI, values, bias, self.place("weight"), index)
        return y_TO.view(*input.shape[:-1], weight.shape[0])


class _TunedEmbedding(SparselyTuned):
    padding_idx: int | None

    def forward(self, input: Tensor) -> Tensor:
        weight = cast(Tensor, self._buffers["weight"])
        if weight.requires_grad or self._mask("weight_values") != Full():
            return F.embedding(input, cast(Any, self).weight, self.padding_idx)
        values, index = self._elements("weight")
        return _embedding(input, values, self.place("weight"), index, self.padding_idx)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, values: Tensor, tensor: Tensor, index: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, index)
        # The same memory without its version: each reading writes what is there already, and what
        # tells of a change is the version of the values.
        return tensor.data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        _, index = ctx.saved_tensors
        return grad.flatten().index_select(0, index), None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_TI: Tensor,
        values: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        index: Tensor,
    ) -> Tensor:
        # As in _Read, the values' version stands for the weight's.
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else None, values, index)
        with no_autocast(x_TI):
            cast_bias = None if bias is None else bias.to(x_TI.dtype)
            return F.linear(x_TI, weight.to(x_TI.dtype), cast_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        x_TI, values, index = ctx.saved_tensors
        needs_dx, needs_dvalues, needs_dbias = ctx.needs_input_grad[:3]
        with no_autocast(dy_TO):
            dx = dy_TO @ ctx.weight.to(dy_TO.dtype) if needs_dx else None
            dvalues = DVALUES(dy_TO, x_TI, values, index, "auto") if needs_dvalues else None
        dbias = dy_TO.sum(0).to(ctx.bias_dtype) if needs_dbias else None
        return dx, dvalues, dbias, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        tokens: Tensor,
        values: Tensor,
        weight_VD: Tensor,
        index: Tensor,
        padding: int | None,
    ) -> Tensor:
        ctx.save_for_backward(tokens, values, index)
        ctx.padding = padding
        return F.embedding(tokens, weight_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        tokens, values, index = ctx.saved_tensors
        tokens_T, dy_TD = tokens.reshape(-1), dy.reshape(-1, dy.shape[-1])
        dvalues = torch.zeros_like(values)
        if len(tokens_T) and len(index):
            # Equal tokens add up where the first of them is in sorted order: as many sums as tokens
            # whatever the batch holds, so that no shape depends on it.
            sorted_T = tokens_T.sort().values
            first_T = torch.searchsorted(sorted_T, tokens_T)
            count = len(tokens_T)
            sums_TD = torch.ops.aten.embedding_dense_backward(dy_TD, first_T, count, -1, False)
            rows = (index // dy.shape[-1]).to(sorted_T.dtype)
            at = torch.searchsorted(sorted_T, rows).clamp_(max=count - 1)
            present = sorted_T[at] == rows
            if ctx.padding is not None:
                present &= rows != ctx.padding
            dvalues = torch.where(present, sums_TD[at, index % dy.shape[-1]], dvalues)
        return None, dvalues, None, None, None


_read: Any = cast("Any", _Read).apply
_linear: Any = cast("Any", _Linear).apply
_embedding: Any = cast("Any", _Embedding).apply

# Of this package's layers those whose whole network is that of a plain one.
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    MaskedLinear: nn.Linear,
    MaskedConv2d: nn.Conv2d,
}


def can_be_tuned(module: nn.Module) -> bool:
    """Whether ``tune_elements`` takes a module's parameters.

    It takes those of all modules but recurrent and compiled ones, which do not read their
    parameters by name, and of this package's layers other than ``MaskedLinear`` and
    ``MaskedConv2d``, and embeddings with ``max_norm``, whose forward writes to the weight.
    """
    if type(module) in _PLAIN or isinstance(module, SparselyTuned):
        return True
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return False
    return not isinstance(module, MaskedModule | nn.RNNBase | torch.jit.ScriptModule)


def tune_elements(places: Sequence[Place], index: Packed) -> nn.Parameter:
    """Have modules that share one parameter train these elements of it alone, in place.

    Modules stay the objects they are, with their hooks. Where some elements are trained already,
    these take their place: the values stay the same parameter object, with another shape and
    without a gradient, and an optimizer's state must follow.

    Args:
        places: each module that has the parameter, and its name there.
        index: flat positions in it.

    Returns:
        The values ``[N]``, which the modules share.

    Raises:
        TypeError: a module cannot be tuned.
        ValueError: parameters differ, or a position is outside.
    """
    for module, _ in places:
        if not can_be_tuned(module):
            raise TypeError(f"a {type(module).__name__} cannot train some elements alone")
    first, name = places[0]
    tuned = f"{name}_values" in first._parameters
    # A move to another device gives each module a buffer of its own.
    shared = {id(m._parameters.get(f"{n}_values" if tuned else n)) for m, n in places}
    if len(shared) > 1 or first._parameters.get(f"{name}_values" if tuned else name) is None:
        raise ValueError(f"the modules must share one parameter, {name} of the first")
    if tuned:
        values = cast(nn.Parameter, first._parameters[f"{name}_values"])
        tensor = cast(SparselyTuned, first).place(name)
    else:
        whole = cast(nn.Parameter, first._parameters[name])
        values = nn.Parameter(whole.new_empty(0), whole.requires_grad)
        tensor = whole.detach().contiguous()
    index.check(tensor.shape)
    small = tensor.numel() <= torch.iinfo(torch.int32).max
    positions = index.index.to(tensor.device, torch.int32 if small else torch.int64, copy=True)
    values.grad = None
    values.data = tensor.view(-1)[positions.long()]
    for module, own in places:
        if not isinstance(module, SparselyTuned):
            plain = _PLAIN.get(type(module), type(module))
            names = (n for n, p in module._parameters.items() if p is not None)
            module.__class__ = _subclass(plain, tuple(names))
        module._parameters.pop(own, None)
        module._buffers[own] = tensor
        module._buffers[f"{own}_index"] = positions
        module._parameters[f"{own}_values"] = values
    return values


def tuned_tensor(place: Place) -> Tensor:
    """The whole parameter, which is a buffer where some of it is trained."""
    module, name = place
    if f"{name}_values" in module._parameters:
        return cast(SparselyTuned, module).place(name)
    return cast(Tensor, module._parameters[name])


def tuned_index(place: Place) -> Tensor:
    """The positions that are trained."""
    module, name = place
    return cast(Tensor, module._buffers[f"{name}_index"])


@cache
def _subclass(plain: type[nn.Module], names: tuple[str, ...]) -> type[SparselyTuned]:
    base = {nn.Linear: _TunedLinear, nn.Embedding: _TunedEmbedding}.get(plain, SparselyTuned)
    properties: dict[str, Any] = {name: property(_reader(name)) for name in names}
    own = {"_plain_class": plain, "_read_names": names, **properties}
    return type(f"SparselyTuned{plain.__name__}", (base, plain), own)


def _reader(name: str) -> Any:
    return lambda module: module._read(name)


def _empty(plain: type[nn.Module], names: tuple[str, ...]) -> SparselyTuned:
    made = _subclass(plain, names)
    return made.__new__(made)

"""``PackedLinear``: a frozen ``nn.Linear`` of which a few elements are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain.layers.base import Copier, MaskedModule
from maskedtrain.layers.linear import check_bias, check_plain
from partial_kernels import Full, Mask, Packed, packed_linear
from partial_kernels.packed.reference import merged

__all__ = ["PackedLinear"]


class PackedLinear(MaskedModule):
    """Linear layer with a frozen weight W and N trained elements: ``y = x (W + dW)^T + b``.

    dW ``[O, I]`` has ``values`` [N] at the positions ``index`` and is 0 elsewhere. ``values`` is
    a parameter like any other: its gradient and what an optimizer keeps have N elements, and no
    gradient of W's size is ever formed. Zeros, as at the start, are the layer with W alone.
    ``weight`` is a buffer: ``DistributedDataParallel`` sends it around at every forward unless it
    is told ``broadcast_buffers=False``.

    A sub-network's mask of ``values`` says which of them it has; those outside count as zero, and
    with None the layer is the one with W alone. An extracted layer is ``merged()``.

    The ``state_dict`` has ``weight`` and ``bias`` as ``nn.Linear``'s, ``values``, and the positions
    as extra state: a tensor, so that safetensors and ``torch.load(weights_only=True)`` take it.

    Args:
        in_features: I.
        out_features: O.
        index: where ``values`` are, as flat positions ``row * I + column``.
        bias: whether there is one.
        train_bias: whether it is trained.

    Raises:
        TypeError: index is no ``Packed``.
        ValueError: a position is outside W.

    Source: Sung et al., "Training Neural Networks with Fixed Sparse Masks" (arXiv 2111.09839),
    section 3.
    """

    weight: Tensor
    index: Packed
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        index: Packed,
        bias: bool = True,
        *,
        train_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(linear, index)
        if self.bias is not None:
            self.bias.requires_grad_(train_bias)

    def _adopt(self, linear: nn.Linear, index: Packed) -> None:
        _check_index(index, linear.weight.shape)
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", weight)
        self.index = _moved(index, weight.device)
        self.values = nn.Parameter(weight.new_zeros(len(index.index)))
        self.register_parameter("bias", linear.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, index: Packed) -> PackedLinear:
        """A PackedLinear over the weight and bias of a linear layer (not copies), with zeros as
        values: it computes what the layer does.

        W is the layer's, without a gradient; the bias is the same parameter, trained if it is.

        Raises:
            TypeError: the layer is more than an ``nn.Linear``, or index is no ``Packed``.
            ValueError: a position is outside the weight.
        """
        check_plain(linear)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._adopt(linear, index)
        return made.train(linear.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, trained={len(self.values)}"
        )

    def forward(self, input: Tensor) -> Tensor:
        bias = self.part("bias")
        values = self.values if self.active is None else self._inside(self.active.masks["values"])
        if values is None:
            if bias is not None:
                check_bias(bias, self.out_features)
            return F.linear(input, self.weight, bias)
        return packed_linear(input, self.weight, values, self.index, bias)

    def _inside(self, mask: Mask | None) -> Tensor | None:
        """The values with zeros off the mask, None for none."""
        if mask is None or isinstance(mask, Full):
            return None if mask is None else self.values
        kept = mask.laid_out(self.values.shape, self.values.device)
        return torch.where(kept, self.values, self.values.new_zeros(()))

    def merged(self) -> nn.Linear:
        """The layer as ``nn.Linear`` with the weight W + dW, a copy: rounded once, as it is in the
        forward.
        """
        masks: dict[str, Mask | None] = {"values": Full(), "bias": Full()}
        return self.plain(masks, "", Copier(share=False))

    @torch.no_grad()
    def plain(self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier) -> nn.Linear:
        values, bias = self._inside(masks["values"]), copier.bias(self.bias, masks.get("bias"))
        if bias is not None:
            check_bias(bias, self.out_features)
        if values is not None and copier.share:
            raise ValueError("W + dW is no view: share=True needs W alone, values outside")
        if values is None:
            weight = copier.tensor(self.weight, Full())
        else:
            weight = merged(self.weight, values, self.index.index, self.weight.dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, bias=bias is not None, device="meta"
        )
        trained = values is not None and self.values.requires_grad
        linear.weight = nn.Parameter(weight, trained)
        linear.bias = bias  # pyright: ignore[reportAttributeAccessIssue]
        return linear.train(self.training)

    def get_extra_state(self) -> Tensor:
        """The positions ``[N]``, int64."""
        return self.index.index

    def set_extra_state(self, state: Any) -> None:
        """Take the positions of a checkpoint.

        Raises:
            TypeError, ValueError: they are no N positions in W; the layer keeps its own.
        """
        if not isinstance(state, Tensor):
            raise TypeError(f"extra state must be a tensor of positions, got {_kind(state)}")
        index = Packed(state.clone())
        _check_index(index, self.weight.shape)
        if len(index.index) != len(self.values):
            raise ValueError(
                f"the state must hold N = {len(self.values)} positions as values does, got "
                f"{len(index.index)}; make the layer with as many"
            )
        self.index = _moved(index, self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self.index = _moved(self.index, self.weight.device)
        return self


def _check_index(index: Packed, shape: torch.Size) -> None:
    if not isinstance(index, Packed):
        raise TypeError(f"index must be a partial_kernels.Packed, got {_kind(index)}")
    index.check(shape)


def _moved(index: Packed, device: torch.device) -> Packed:
    """The positions on the weight's device; without data there they stay where they are."""
    if device.type == "meta" or index.index.device == device:
        return index
    return Packed(index.index.to(device))


def _kind(value: object) -> str:
    return type(value).__name__

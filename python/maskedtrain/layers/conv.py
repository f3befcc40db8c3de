"""``MaskedConv2d``: ``nn.Conv2d`` of which a sub-network uses output x input channels."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain.layers.base import Copier, MaskedModule
from partial_kernels import Mask

__all__ = ["MaskedConv2d"]


class MaskedConv2d(MaskedModule, nn.Conv2d):
    """``nn.Conv2d`` that computes with the active sub-network's part of its weight ``[O, I, kh,
    kw]``.

    Without an active sub-network it is ``nn.Conv2d``, bit for bit. With a Prefix or Index mask the
    input has as many channels as the mask keeps columns, the output as many as it keeps rows, and
    the step costs the small convolution; an Element mask keeps both widths. The bias follows the
    rows unless it is named. A grouped convolution takes a compact mask only if it is depthwise
    (groups = I), by rows.

    Args: those of ``nn.Conv2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.active is None:
            return super().forward(input)
        weight, bias = self.part("weight"), self.part("bias")
        if weight is None:
            weight = self.weight.new_zeros(self.weight.shape)
        groups = self._groups(weight)
        if self.padding_mode == "zeros":
            padding = self.padding
        else:
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, groups)

    def _groups(self, weight: Tensor) -> int:
        """Groups of the convolution that is left with this part of the weight."""
        if self.groups == 1 or weight.shape == self.weight.shape:
            return self.groups
        if self.groups == self.in_channels == self.out_channels:
            return weight.shape[0]
        raise ValueError(
            f"a compact mask needs groups=1 or a depthwise convolution, got groups={self.groups} "
            f"with {self.in_channels} -> {self.out_channels} channels"
        )

    def plain(self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier) -> nn.Conv2d:
        weight = copier.parameter(self.weight, masks["weight"])
        bias = copier.bias(self.bias, masks.get("bias"))
        groups = self._groups(weight)
        conv = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            self.kernel_size,  # pyright: ignore[reportArgumentType]
            self.stride,  # pyright: ignore[reportArgumentType]
            self.padding,  # pyright: ignore[reportArgumentType]
            self.dilation,  # pyright: ignore[reportArgumentType]
            groups,
            bias is not None,
            self.padding_mode,  # pyright: ignore[reportArgumentType]
            device="meta",
        )
        conv.weight, conv.bias = weight, bias
        return conv.train(self.training)

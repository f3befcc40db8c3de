"""``MaskedLinear``: ``nn.Linear`` of which a sub-network uses rows x columns, blocks or
elements.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from maskedtrain.layers.base import Copier, MaskedModule, row_mask
from partial_kernels import Full, Mask, masked_linear

__all__ = ["MaskedLinear"]


class MaskedLinear(MaskedModule, nn.Linear):
    """``nn.Linear`` that computes with the active sub-network's part of its weight: ``y = x (p *
    W)^T + b``.

    Without an active sub-network it is ``nn.Linear``, bit for bit, with the same ``state_dict``.
    With a Prefix or Index mask x has as many features as the mask keeps columns, y as many as it
    keeps rows, and the step costs the small product; with Block and Element masks both keep their
    width. The bias follows the rows unless it is named. A weight outside the sub-network counts as
    zero.

    Args: those of ``nn.Linear``.
    """

    def implied_masks(self, masks: Mapping[str, Mask | None]) -> dict[str, Mask | None]:
        return {} if self.bias is None else {"bias": row_mask(masks.get("weight", Full()))}

    def forward(self, input: Tensor) -> Tensor:
        if self.active is None:
            return super().forward(input)
        mask = self.active.masks["weight"]
        if mask is not None and "bias" in self.active.implied:
            return masked_linear(input, self.weight, self.bias, mask=mask)
        if mask is not None:
            y = masked_linear(input, self.weight, mask=mask)
        else:
            y = input.new_zeros(*input.shape[:-1], self.out_features)
        bias = self.part("bias")
        return y if bias is None else y + bias

    def plain(self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier) -> nn.Linear:
        weight = copier.parameter(self.weight, masks["weight"])
        rows, cols = weight.shape
        linear = nn.Linear(cols, rows, bias=self.bias is not None, device="meta")
        linear.weight = weight
        if self.bias is not None:
            linear.bias = copier.parameter(self.bias, masks["bias"])
        return linear.train(self.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MaskedLinear:
        """A MaskedLinear over the same parameters (not copies)."""
        masked = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        masked.weight, masked.bias = linear.weight, linear.bias
        return masked.train(linear.training)

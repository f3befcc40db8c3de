"""``MaskedLinear``: ``nn.Linear`` of which a sub-network uses rows x columns, blocks or
elements.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from maskedtrain.layers.base import Copier, MaskedModule
from partial_kernels import Mask, masked_linear

__all__ = ["MaskedLinear", "check_bias", "check_plain"]


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
        if bias is None:
            return y
        check_bias(bias, y.shape[-1])
        return y + bias

    def plain(self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier) -> nn.Linear:
        weight = copier.parameter(self.weight, masks["weight"])
        bias = copier.bias(self.bias, masks.get("bias"))
        rows, cols = weight.shape
        if bias is not None:
            check_bias(bias, rows)
        linear = nn.Linear(cols, rows, bias=bias is not None, device="meta")
        linear.weight, linear.bias = weight, bias  # pyright: ignore[reportAttributeAccessIssue]
        return linear.train(self.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MaskedLinear:
        """A MaskedLinear over the same parameters (not copies)."""
        masked = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        masked.weight, masked.bias = linear.weight, linear.bias
        return masked.train(linear.training)


def check_plain(linear: nn.Linear, *also: type[nn.Linear]) -> None:
    """Raise TypeError unless what the layer does is what its weight and bias say, as it is of
    ``nn.Linear``, ``MaskedLinear`` and ``also``.
    """
    if type(linear) not in (nn.Linear, MaskedLinear, *also) or "forward" in vars(linear):
        raise TypeError(
            f"linear must be a plain nn.Linear or MaskedLinear, got a {type(linear).__name__} "
            "with a behaviour of its own, which would be lost"
        )
    if not {"weight", "bias"} <= linear._parameters.keys():
        raise TypeError(
            f"linear computes its weight or bias from {', '.join(linear._parameters)} (a weight "
            "norm, pruning); make it a plain parameter first"
        )


def check_bias(bias: Tensor, rows: int) -> None:
    """Raise ValueError unless the bias is of so many rows."""
    # Of a single element or row, torch would make as many as it takes.
    if bias.shape[0] != rows:
        raise ValueError(f"the mask of bias must keep {rows} elements, got {bias.shape[0]}")

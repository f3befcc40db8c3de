"""Wide-and-deep networks: a linear model beside a deep one, which is their core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from maskedtrain.layers import MaskedLinear, Sum
from maskedtrain.models.base import ModelConfig
from maskedtrain.models.mlp import MLP
from maskedtrain.widths import Kept
from partial_kernels import Mask

__all__ = ["Config", "WideDeep"]


class WideDeep(Sum):
    """``MLP(x) + W x`` over flattened inputs: logits, the sum of a deep part's and a wide part's.

    The core is the deep part, ``SubNetwork.full(model).without(model.extension)``. The bias of the
    output is the deep part's.

    Args:
        inputs: features of an input, all its axes but the first together.
        hidden: neurons of each hidden layer of the deep part.
        classes: outputs.
        dropout: share of the hidden neurons that are dropped in training.

    Source: Cheng et al., "Wide & Deep Learning for Recommender Systems" (2016), whose wide part may
    get crossed features besides: any two networks are a ``Sum``.
    """

    extension: ClassVar[tuple[str, ...]] = ("wide.*",)
    deep: MLP

    def __init__(
        self, inputs: int, hidden: Sequence[int], classes: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__(
            deep=MLP(inputs, hidden, classes, dropout=dropout),
            wide=nn.Sequential(nn.Flatten(), MaskedLinear(inputs, classes, bias=False)),
        )

    def width_masks(self, kept: Kept) -> dict[str, Mask]:
        """Masks of a network with a narrower deep part; the widths are ``deep.hidden.0`` ..."""
        masks = self.deep.width_masks(lambda name, total: kept(f"deep.{name}", total))
        return {f"deep.{name}": mask for name, mask in masks.items()}


@dataclass(frozen=True)
class Config(ModelConfig):
    """A wide-and-deep network."""

    name = "wide_deep"
    task = "images"

    hidden: tuple[int, ...] = (500, 500)
    """Neurons of each hidden layer of the deep part."""
    dropout: float = 0.0
    """Share of the hidden neurons that are dropped."""

    def build(self, *, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> WideDeep:
        inputs = in_channels * math.prod(image_size)
        return WideDeep(inputs, self.hidden, num_classes, dropout=self.dropout)

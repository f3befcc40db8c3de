"""Multilayer perceptrons whose every hidden width can be a sub-network's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain.layers import MaskedLinear
from maskedtrain.models.base import ModelConfig
from maskedtrain.widths import Kept, region
from partial_kernels import Mask

__all__ = ["MLP", "Config"]


class MLP(nn.Module):
    """Linear layers with ReLU (and dropout) between them, over flattened inputs: logits.

    Layers are ``hidden.0``, ``hidden.1`` ... and ``output``, initialised as ``nn.Linear`` is.

    Args:
        inputs: features of an input, all its axes but the first together.
        hidden: neurons of each hidden layer; none makes a linear classifier.
        classes: outputs.
        dropout: share of the hidden neurons that are dropped in training.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], classes: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, classes]
        if min(widths) < 1:
            raise ValueError(f"inputs, hidden and classes must be >= 1, got {widths}")
        self.hidden = nn.ModuleList(
            MaskedLinear(widths[i], width) for i, width in enumerate(hidden)
        )
        self.dropout = nn.Dropout(dropout)
        self.output = MaskedLinear(widths[-2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of inputs ``[B, ...]``."""
        x = torch.flatten(x, 1)
        for layer in self.hidden:
            x = self.dropout(F.relu(layer(x)))
        return self.output(x)

    def width_masks(self, kept: Kept) -> dict[str, Mask]:
        """Masks of a narrower network; inputs and classes stay whole.

        The widths are ``hidden.0``, ``hidden.1`` ...
        """
        masks: dict[str, Mask] = {}
        cols = None
        for i, layer in enumerate(self.hidden):
            rows = kept(f"hidden.{i}", cast("nn.Linear", layer).out_features)
            masks[f"hidden.{i}.weight"] = region(rows, cols)
            cols = rows
        masks["output.weight"] = region(None, cols)
        return masks


@dataclass(frozen=True)
class Config(ModelConfig):
    """A multilayer perceptron."""

    name = "mlp"
    task = "images"

    hidden: tuple[int, ...] = (500, 500)
    """Neurons of each hidden layer."""
    dropout: float = 0.0
    """Share of the hidden neurons that are dropped."""

    def build(self, *, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> MLP:
        inputs = in_channels * math.prod(image_size)
        return MLP(inputs, self.hidden, num_classes, dropout=self.dropout)

"""Figure 3 of "Masked Training of Neural Networks with Partial Gradients" (AISTATS 2022): the
alignment ``<p g, p g~> / (|p g| |p g~|)`` of gradients with and without a random dropout mask of
neurons, x~ = p x, while a ResNet is trained with and without dropout.

Both trainings are measured with the same masks. Batch norm is disabled, as the paper's appendix
says: each is the scale and shift that it has beside it (``_dropout.without_batch_norm``), and
gradients are clipped to norm 1 in both. The paper's network is a ResNet-18 on CIFAR-10, as here
with ``--data``; otherwise it is a ResNet-8 on handwritten digits. The paper does not say with which
probability neurons were kept, nor for how long was trained.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.reproduce._dropout import DropoutFigure
from maskedtrain.reproduce._training import draw_trainings, last_half
from maskedtrain.reproduce.base import Claim, Rows
from maskedtrain.theory.criteria import Criteria
from maskedtrain.training.console import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Config"]

_WITHOUT, _WITH = "without dropout", "with dropout"


@dataclass(frozen=True)
class Config(DropoutFigure):
    """Alignment of the gradients with and without a dropout mask, while training a ResNet without
    batch norm, with dropout and without. --data takes the folder of CIFAR-10, for a ResNet-18."""

    name = "figure3"
    size_in = (6.4, 4.0)

    batch_norm: bool = False
    """Train with batch norm; without, each becomes the scale and shift that it has beside it."""

    def rows(self, console: Console) -> Rows:
        methods = {_WITHOUT: StandardConfig(), _WITH: self.dropout}
        return [
            row
            for label, method in methods.items()
            for row in self.training(label, method, _quantities, console)
        ]

    def claims(self, rows: Rows) -> list[Claim]:
        late = {label: last_half(rows, label, "alignment") for label in (_WITHOUT, _WITH)}
        values = ", ".join(f"{label} {value:.3g}" for label, value in late.items())
        return [
            Claim(
                "dropout improves gradient alignment",
                f"alignment, median over the last half: {values}",
                late[_WITH] > late[_WITHOUT],
            )
        ]

    def draw(self, figure: Figure, rows: Rows) -> None:
        axes = figure.subplots()
        lines = [(label, "alignment", label) for label in (_WITHOUT, _WITH)]
        draw_trainings(
            axes,
            rows,
            lines,
            "Gradient alignment under a random dropout mask",
            r"$\langle p \odot \nabla f(x),\, p \odot \nabla f(\tilde{x})\rangle\;/\;"
            r"(\|p \odot \nabla f(x)\|\,\|p \odot \nabla f(\tilde{x})\|)$",
        )
        axes.axhline(0, color="black", linewidth=0.8)


def _quantities(found: Criteria) -> dict[str, float]:
    # A gradient that is 0 is aligned with none.
    norms = max(math.sqrt(found.masked_sq * found.other_masked_sq), sys.float_info.min)
    return {"alignment": found.inner / norms}

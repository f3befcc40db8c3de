"""Figure 2 of "Masked Training of Neural Networks with Partial Gradients" (AISTATS 2022): what
Criteria 2 and 3 bound, while a ResNet is trained with dropout of neurons.

The paper's network is a ResNet-18 on CIFAR-10, as here with ``--data``; otherwise it is a ResNet-8
on handwritten digits. The paper does not say with which probability neurons were kept, for how long
was trained, nor whether this figure, too, is without batch norm (its appendix says so of "measuring
alignment with and without dropout", which is Figure 3, but calls it Figure 2):
``--no-batch-norm``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from maskedtrain.reproduce._dropout import DropoutFigure
from maskedtrain.reproduce._training import draw_trainings
from maskedtrain.reproduce.base import Claim, Rows, column, median
from maskedtrain.theory.criteria import Criteria
from maskedtrain.training.console import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Config"]

_PANELS = {
    "c_sim": (
        "Criterion 2: gradient norm",
        r"$\|p \odot \nabla f(x)\|\;/\;\|p \odot \nabla f(\tilde{x})\|$",
    ),
    "c_align": (
        "Criterion 3: gradient alignment",
        r"$\|p \odot \nabla f(x)\|\,\|p \odot \nabla f(\tilde{x})\|\;/\;"
        r"\langle p \odot \nabla f(x),\, p \odot \nabla f(\tilde{x})\rangle$",
    ),
}
# The paper says "bounded by a small constant". Of single mini-batches, one in twenty may be above.
_SMALL, _SHARE = 10.0, 0.95


@dataclass(frozen=True)
class Config(DropoutFigure):
    """Gradient norms and alignment (Criteria 2 and 3) while training a ResNet with dropout. --data
    takes the folder of CIFAR-10, for a ResNet-18."""

    name = "figure2"
    size_in = (10.0, 4.2)

    def rows(self, console: Console) -> Rows:
        return self.training("with dropout", self.dropout, _quantities, console)

    def claims(self, rows: Rows) -> list[Claim]:
        return [
            _bounded(title.partition(":")[0], name, column(rows, name))
            for name, (title, _) in _PANELS.items()
        ]

    def draw(self, figure: Figure, rows: Rows) -> None:
        panels = zip(figure.subplots(1, 2), _PANELS.items(), strict=True)
        for axes, (name, (title, ratio)) in panels:
            lines = [("with dropout", name, "with dropout")]
            draw_trainings(axes, rows, lines, title, ratio, log=name == "c_align")


def _bounded(criterion: str, name: str, values: list[float]) -> Claim:
    # "higher": between a finite value and an infinite one there is none to interpolate.
    most = float(np.quantile(values, _SHARE, method="higher"))
    return Claim(
        f"{criterion} is satisfied in practice: {name} is bounded by a small constant",
        f"median {median(values):.3g}, {100 * _SHARE:.0f} % of the measurements at most "
        f"{most:.3g}, the largest is {max(values):.3g}; small: at most {_SMALL:.0f}",
        most <= _SMALL,
    )


def _quantities(found: Criteria) -> dict[str, float]:
    return {name: getattr(found, name) for name in _PANELS}

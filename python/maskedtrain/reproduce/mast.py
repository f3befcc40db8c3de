"""What "MAST: Model-Agnostic Sparsified Training" (ICLR 2025, arXiv 2311.16086) says of its
methods, on a ridge regression whose minimisers and bounds are exact.

f is the regularised squared error of a linear classifier of handwritten digits (odd or even; 64
pixels, centred), so ``f = 1/2 x^T L x - b^T x + c`` and the pretrained point v is 0. The panels:

(a) double sketched gradient descent for several sketches: the mean of ``|x_t - x_D|^2`` over
    independent runs, x_D the minimiser of ``f_D(x) = E f(S x)``, under the theorem's bound;
(b) a finite set of Rand-K sketches: gradient descent with one of them at each step stalls, L-SVRDSG
    and S-PAGE go on to the minimiser;
(c) the test accuracy of the sparsified model ``sign(a^T S x_t)`` against the step for several K;
(d) its spread over draws of S in the end (MAST), beside that of the sparsified minimiser of f
    (ERM).

The paper's experiments are with logistic regression on LibSVM's a5a, where x_D has no closed form;
its Figure 1 is panel (d), here the same comparison on other data and with another loss. Further
figures of its appendix (other methods and sketches, deep networks) are not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Generator, Tensor

from maskedtrain.data import digits
from maskedtrain.data.images import ImageSplit
from maskedtrain.reproduce.base import (
    Claim,
    FigureConfig,
    Rows,
    column,
    finish_axes,
    select,
    with_columns,
)
from maskedtrain.theory import (
    Bernoulli,
    Quadratic,
    RandK,
    Sketch,
    double_sketched_gd,
    dsgd_bound,
    l_svrdsg,
    mast_objective,
    s_page,
)
from maskedtrain.training.console import Console
from maskedtrain.training.metrics import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Config"]

_D = 64
_SKETCHES: dict[str, Sketch] = {
    "Bernoulli p=0.9": Bernoulli(_D, 0.9),
    "Bernoulli p=0.5": Bernoulli(_D, 0.5),
    "Rand-K K=48": RandK(_D, 48),
    "Rand-K K=16": RandK(_D, 16),
}
_KEPT = (32, 16, 8, 4)
# What a box of panel (d) is made of: quantiles, by matplotlib's names.
_BOX = {"whislo": 0.05, "q1": 0.25, "med": 0.5, "q3": 0.75, "whishi": 0.95}
_RIDGE = 0.003
# Of the largest step size that the theorem covers, so that the way down is seen, too.
_SHARE = 0.1
# The set of panel (b), and the draws of S that accuracies are means over.
_SET, _SET_KEPT, _DRAWS = 32, 32, 200


@dataclass(frozen=True)
class Config(FigureConfig):
    """MAST's methods on a ridge regression: convergence under the bound, to the exact solution with
    variance reduction, and the accuracy of sparsified models."""

    name = "mast"
    size_in = (10.0, 7.0)

    steps: int = 3000
    """Steps of every method."""
    every: int = 30
    """Steps between rows."""
    runs: int = 20
    """Independent runs that means are over."""

    def __post_init__(self) -> None:
        if min(self.every, self.runs) < 1 or self.steps < self.every:
            raise ValueError(
                "every and runs must be >= 1 and steps at least every, "
                f"got {self.every}, {self.runs} and {self.steps}"
            )

    def rows(self, console: Console) -> Rows:
        dataset = digits.load()
        train = _examples(dataset.train, dataset.train)
        test = _examples(dataset.test, dataset.train)
        f = _ridge(*train)
        generator = torch.Generator().manual_seed(self.seed)
        rows = [
            *self._bounds(f, generator),
            *self._variance_reduction(f, generator),
            *self._accuracies(f, test, generator),
        ]
        return with_columns(rows)

    def _bounds(self, f: Quadratic, generator: Generator) -> Iterator[dict[str, Any]]:
        x = torch.zeros(self.runs, _D, dtype=torch.float64)
        for label, sketch in _SKETCHES.items():
            minimiser = mast_objective(f, sketch).minimiser
            step_size = _SHARE * _largest_step_size(f, sketch)
            bound = dsgd_bound(f, sketch, x[0], step_size=step_size, steps=self.steps)
            iterates = double_sketched_gd(f, sketch, x, step_size=step_size, generator=generator)
            for step, x_t in self._seen(iterates):
                yield {
                    "panel": "bound",
                    "method": label,
                    "step": step,
                    "distance_sq": _distance_sq(x_t, minimiser),
                    "bound": float(bound[step]),
                }

    def _variance_reduction(self, f: Quadratic, generator: Generator) -> Iterator[dict[str, Any]]:
        sketch = RandK(_D, _SET_KEPT)
        sketches = sketch.sample(generator, (_SET,))
        minimiser = mast_objective(f, sketches).minimiser
        x = torch.zeros(self.runs, _D, dtype=torch.float64)
        step_size = _largest_step_size(f, sketch)
        options: dict[str, Any] = {"step_size": step_size, "generator": generator}
        reduced: dict[str, Any] = {**options, "probability": 1 / _SET, "anchor_size": _SET}
        methods = {
            "SGD": double_sketched_gd(f, _OneOf(_D, sketches), x, **options),
            "L-SVRDSG": l_svrdsg(f, sketches, x, **reduced),
            "S-PAGE": s_page(f, sketches, x, **reduced),
        }
        for label, iterates in methods.items():
            for step, x_t in self._seen(iterates):
                yield {
                    "panel": "variance",
                    "method": label,
                    "step": step,
                    "distance_sq": _distance_sq(x_t, minimiser),
                }

    def _accuracies(
        self, f: Quadratic, test: tuple[Tensor, Tensor], generator: Generator
    ) -> Iterator[dict[str, Any]]:
        x = torch.zeros(1, _D, dtype=torch.float64)
        for kept in _KEPT:
            sketch = RandK(_D, kept)
            draws = sketch.sample(generator, (_DRAWS,))
            iterates = double_sketched_gd(
                f, sketch, x, step_size=_SHARE * _largest_step_size(f, sketch), generator=generator
            )
            solutions = [("MAST", step, x_t[0]) for step, x_t in self._seen(iterates)]
            solutions.append(("ERM", self.steps, f.minimiser))
            for label, step, x_t in solutions:
                accuracies = _accuracies(draws * x_t, *test)
                shares = torch.tensor(list(_BOX.values()), dtype=torch.float64)
                yield {
                    "panel": "accuracy",
                    "method": label,
                    "kept": kept,
                    "step": step,
                    "accuracy": float(accuracies.mean()),
                    **dict(zip(_BOX, torch.quantile(accuracies, shares).tolist(), strict=True)),
                }

    def _seen(self, iterates: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """x_0, and every so many further ones."""
        counted = enumerate(islice(iterates, self.steps + 1))
        return ((step, x) for step, x in counted if step % self.every == 0)

    def claims(self, rows: Rows) -> list[Claim]:
        bounded = select(rows, panel="bound")
        shares = np.array(column(bounded, "distance_sq")) / np.array(column(bounded, "bound"))
        last = {
            method: column(select(rows, panel="variance", method=method), "distance_sq")[-1]
            for method in ("SGD", "L-SVRDSG", "S-PAGE")
        }
        claims = [
            Claim(
                "E|x_t - x_D|^2 of double sketched gradient descent stays below its bound",
                f"mean over the runs at most {shares.max():.2g} of it",
                bool(shares.max() <= 1),
            ),
            Claim(
                "variance reduction converges where SGD stalls",
                "|x_T - x_D|^2: " + ", ".join(f"{name} {v:.2g}" for name, v in last.items()),
                max(last["L-SVRDSG"], last["S-PAGE"]) < 1e-6 * last["SGD"],
            ),
        ]
        ends = {method: _ends(rows, method) for method in ("MAST", "ERM")}
        text = ", ".join(
            f"K={kept} {100 * ends['MAST'][kept]:.1f} % against {100 * ends['ERM'][kept]:.1f} %"
            for kept in ends["MAST"]
        )
        claims.append(
            Claim(
                "sparsified solutions of MAST are more accurate than those of ERM",
                f"mean accuracy, MAST against ERM: {text}",
                all(ends["MAST"][kept] > ends["ERM"][kept] for kept in ends["MAST"]),
            )
        )
        return claims

    def draw(self, figure: Figure, rows: Rows) -> None:
        (bounds, variance), (accuracy, boxes) = cast("Any", figure.subplots(2, 2))
        for colour, label in zip(COLOURS, _SKETCHES, strict=False):
            chosen = select(rows, panel="bound", method=label)
            bounds.plot(
                column(chosen, "step"), column(chosen, "distance_sq"), color=colour, label=label
            )
            bounds.plot(column(chosen, "step"), column(chosen, "bound"), "--", color=colour)
        bounds.plot([], [], "--", color="grey", label="its bound")
        finish_axes(
            bounds, "(a) double sketched gradient descent", "step", r"mean $|x_t - x^*_D|^2$"
        )
        for colour, label in zip(COLOURS, ("SGD", "L-SVRDSG", "S-PAGE"), strict=False):
            chosen = select(rows, panel="variance", method=label)
            variance.plot(
                column(chosen, "step"), column(chosen, "distance_sq"), color=colour, label=label
            )
        title = f"(b) {_SET} sketches, K = {_SET_KEPT}"
        finish_axes(variance, title, "step", r"mean $|x_t - x^*_D|^2$")
        bounds.set_yscale("log")
        variance.set_yscale("log")
        for colour, kept in zip(COLOURS, _KEPT, strict=False):
            chosen = select(rows, panel="accuracy", method="MAST", kept=kept)
            shown = [100 * value for value in column(chosen, "accuracy")]
            accuracy.plot(column(chosen, "step"), shown, color=colour, label=f"K = {kept}")
        finish_axes(accuracy, "(c) sparsified models", "step", "mean test accuracy (%)")
        _draw_boxes(boxes, rows)


def _ends(rows: Rows, method: str) -> dict[int, float]:
    """Mean accuracy in the end, by K."""
    chosen = select(rows, panel="accuracy", method=method)
    return {int(row["kept"]): float(row["accuracy"]) for row in chosen}


def _draw_boxes(axes: Axes, rows: Rows) -> None:
    for i, method in enumerate(("MAST", "ERM")):
        last = {row["kept"]: row for row in select(rows, panel="accuracy", method=method)}
        boxes = [{name: 100 * float(row[name]) for name in _BOX} for row in last.values()]
        drawn = axes.bxp(
            boxes,
            positions=[place + 0.36 * i - 0.18 for place in range(len(boxes))],
            widths=0.3,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": COLOURS[i], "alpha": 0.5},
            medianprops={"color": "black"},
            manage_ticks=False,
        )
        drawn["boxes"][0].set_label(method)
    axes.set_xticks(range(len(_KEPT)), [f"{kept}" for kept in _KEPT])
    title = "(d) over draws of S: quartiles, 5 and 95 %"
    finish_axes(axes, title, f"kept coordinates K of {_D}", "test accuracy (%)")


@dataclass(frozen=True, eq=False)
class _OneOf(Sketch):
    """One of a finite set of sketches, [N, d], each as likely."""

    diagonals: Tensor

    def _draw(self, generator: Generator, size: tuple[int, ...]) -> Tensor:
        return self.diagonals[torch.randint(len(self.diagonals), size, generator=generator)]


def _examples(split: ImageSplit, train: ImageSplit) -> tuple[Tensor, Tensor]:
    """Pixels [N, d], centred and scaled as those of the training data, and labels -1 or 1."""
    pixels, reference = (s.images.flatten(1).double() / 255 for s in (split, train))
    centred = pixels - reference.mean(0)
    scale = (reference - reference.mean(0)).norm(dim=1).mean()
    return centred / scale, torch.where(split.labels % 2 == 0, -1.0, 1.0).double()


def _ridge(pixels: Tensor, labels: Tensor) -> Quadratic:
    """1/(2N) |A x - y|^2 + ridge/2 |x|^2."""
    hessian = pixels.T @ pixels / len(pixels) + _RIDGE * torch.eye(_D, dtype=torch.float64)
    return Quadratic(hessian, pixels.T @ labels / len(pixels), 0.5)


def _largest_step_size(f: Quadratic, sketch: Sketch) -> float:
    """1/(L_f L_S_max), as far as MAST's theorem on gradient descent goes."""
    return 1 / (f.L_f * sketch.constants.L_S_max)


def _distance_sq(x: Tensor, point: Tensor) -> float:
    return float((x - point).square().sum(-1).mean())


def _accuracies(models: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
    """Of each model: [M, d] -> [M]."""
    return ((models @ pixels.T > 0) == (labels > 0)).double().mean(1)

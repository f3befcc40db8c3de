"""What "Towards a Better Theoretical Understanding of Independent Subnetwork Training" (ICML 2024,
arXiv 2306.16484) says of IST on quadratics f_i = 1/2 x^T L_i x - b_i^T x, one for each worker.

Every step deals out the coordinates anew (Perm-q sketches) and is one local step of every worker.
Preconditioned IST is the same on f_i(D_i^{-1/2} x), D_i = Diag(L_i), with sketches of scale sqrt n.
The panels:

(a) homogeneous workers (all L_i = L), b = 0: f along plain and preconditioned IST;
(b) L = [[1, c], [c, 4]] with c = 1.9 > 2 * 1 * 4 / (1 + 4): the change of f in one step from an
    eigenvector of the negative eigenvalue of W_bar, for many step sizes;
(c) heterogeneous workers, Perm-1, b = 0: |x_t|^2, where preconditioned IST needs one step;
(d) b not 0: the mean of x_t goes to a fixed point that is not the minimiser.

(b) is exact, the others are over independent runs. The paper's own experiments, of quadratics with
other dimensions and of a network on features of images, are not reproduced point by point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor

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
    Perm,
    Quadratic,
    average,
    ist,
    ist_expected_hessian,
    ist_fixed_point,
    ist_w_bar,
    preconditioned,
)
from maskedtrain.training.console import Console
from maskedtrain.training.metrics import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Config"]

_D, _WORKERS = 12, 4
_KINDS = ("plain", "preconditioned")


@dataclass(frozen=True)
class Config(FigureConfig):
    """Independent subnet training on quadratics: convergence, the step that raises f, convergence
    in one step, and the bias of its fixed point."""

    name = "ist-quadratic"
    size_in = (10.0, 7.0)

    steps: int = 200
    """Steps of every method."""
    runs: int = 2000
    """Independent runs that means are over."""

    def __post_init__(self) -> None:
        # A standard error needs two.
        if self.steps < 2 or self.runs < 2:
            raise ValueError(f"steps and runs must be >= 2, got {self.steps} and {self.runs}")

    def rows(self, console: Console) -> Rows:
        generator = torch.Generator().manual_seed(self.seed)
        return with_columns(
            [
                *self._homogeneous(generator),
                *_counter_example(),
                *self._one_step(generator),
                *self._bias(generator),
            ]
        )

    def _homogeneous(self, generator: Generator) -> Iterator[dict[str, Any]]:
        workers = [_quadratic(generator, biased=False)] * _WORKERS
        x = torch.randn(self.runs, _D, generator=generator, dtype=torch.float64)
        for kind in _KINDS:
            setting = _setting(workers, kind, x, n=_WORKERS)
            for step, x_t in self._iterates(setting, generator):
                f = average(setting.workers).value(x_t).mean()
                yield {"panel": "homogeneous", "method": kind, "step": step, "f": float(f)}

    def _one_step(self, generator: Generator) -> Iterator[dict[str, Any]]:
        workers = [_quadratic(generator, biased=False) for _ in range(_D)]
        x = torch.randn(self.runs, _D, generator=generator, dtype=torch.float64)
        for kind in _KINDS:
            setting = _setting(workers, kind, x, n=_D)
            for step, x_t in self._iterates(setting, generator):
                distance = x_t.square().sum(-1).mean()
                yield {
                    "panel": "one step",
                    "method": kind,
                    "step": step,
                    "distance_sq": float(distance),
                }

    def _bias(self, generator: Generator) -> Iterator[dict[str, Any]]:
        shared = _quadratic(generator, biased=True)
        cases = {
            "plain": [_quadratic(generator, biased=True) for _ in range(_WORKERS)],
            "preconditioned": [shared] * _WORKERS,
        }
        x = torch.randn(_D, generator=generator, dtype=torch.float64).expand(self.runs, _D)
        for kind, workers in cases.items():
            setting = _setting(workers, kind, x, n=_WORKERS)
            fixed = ist_fixed_point(setting.workers, setting.sketch)
            minimiser = average(setting.workers).minimiser
            for step, x_t in self._iterates(setting, generator):
                mean = x_t.mean(0)
                yield {
                    "panel": "bias",
                    "method": kind,
                    "step": step,
                    "distance_sq": float((mean - fixed).square().sum()),
                    "to_minimiser_sq": float((mean - minimiser).square().sum()),
                    "error_sq": float(x_t.var(0).sum() / self.runs),
                }

    def _iterates(self, setting: _Setting, generator: Generator) -> Iterator[tuple[int, Tensor]]:
        iterates = ist(
            setting.workers,
            setting.sketch,
            setting.x,
            step_size=setting.step_size,
            generator=generator,
        )
        return enumerate(islice(iterates, self.steps + 1))

    def claims(self, rows: Rows) -> list[Claim]:
        def values(name: str, **chosen: str) -> dict[str, list[float]]:
            return {kind: column(select(rows, method=kind, **chosen), name) for kind in _KINDS}

        f = values("f", panel="homogeneous")
        fallen = {kind: f[kind][-1] / f[kind][0] for kind in _KINDS}
        change = values("change", panel="counter-example")
        distance = values("distance_sq", panel="one step")
        after = {kind: distance[kind][1] / distance[kind][0] for kind in _KINDS}
        claims = [
            Claim(
                "with b = 0 both forms converge to the solution, the preconditioned one faster",
                f"f_T / f_0: {_pairs(fallen)}",
                fallen["preconditioned"] < fallen["plain"] < 0.01,
            ),
            Claim(
                "with an indefinite W a plain step raises f for every small step size, a "
                "preconditioned one does not",
                "(f(x_1) - f(x_0)) / (step size f(x_0)): plain at least "
                f"{min(change['plain']):.3g}, preconditioned at most "
                f"{max(change['preconditioned']):.3g}",
                min(change["plain"]) > 0 > max(change["preconditioned"]),
            ),
            Claim(
                "with heterogeneous workers, Perm-1 and b = 0 the preconditioned form converges in "
                "one step",
                f"|x_1|^2 / |x_0|^2: {_pairs(after)}",
                after["preconditioned"] < 1e-24 < after["plain"],
            ),
        ]
        for kind in _KINDS:
            last = select(rows, panel="bias", method=kind)[-1]
            to_fixed, to_minimiser = float(last["distance_sq"]), float(last["to_minimiser_sq"])
            error = float(last["error_sq"])
            claims.append(
                Claim(
                    f"with b not 0 the mean of {kind} IST goes to a fixed point that is not the "
                    "minimiser",
                    f"squared distances of the mean x_T, whose variance is {error:.2g}: "
                    f"{to_fixed:.2g} from the fixed point, {to_minimiser:.2g} from the minimiser",
                    to_fixed < 10 * error and to_minimiser > 100 * error,
                )
            )
        return claims

    def draw(self, figure: Figure, rows: Rows) -> None:
        panels = cast("Any", figure.subplots(2, 2)).flatten()
        lines = {
            "homogeneous": ("step", "f", "(a) homogeneous, b = 0", "mean f"),
            "counter-example": (
                "step_size",
                "change",
                "(b) a step that raises f",
                r"$(f(x_1) - f(x_0))\,/\,(\gamma f(x_0))$",
            ),
            "one step": (
                "step",
                "distance_sq",
                "(c) heterogeneous, Perm-1, b = 0",
                r"mean $|x_t|^2$",
            ),
            "bias": ("step", "distance_sq", "(d) b not 0", "squared distance of the mean iterate"),
        }
        for axes, (panel, (x, y, title, y_name)) in zip(panels, lines.items(), strict=True):
            for colour, kind in zip(COLOURS, _KINDS, strict=False):
                chosen = select(rows, panel=panel, method=kind)
                workers = ", heterogeneous" if kind == "plain" else ", homogeneous"
                label = kind + (workers if panel == "bias" else "")
                axes.plot(column(chosen, x), column(chosen, y), color=colour, label=label)
                if panel == "bias":
                    steps = column(chosen, "step")
                    axes.plot(steps, column(chosen, "to_minimiser_sq"), "--", color=colour)
            if panel == "bias":
                axes.plot([], [], color="grey", label="from the fixed point")
                axes.plot([], [], "--", color="grey", label="from the minimiser")
            if panel == "counter-example":
                axes.axhline(0, color="black", linewidth=0.8)
                axes.set_xscale("log")
            else:
                axes.set_yscale("log")
            if panel in ("homogeneous", "one step"):
                # Below it is rounding.
                axes.set_ylim(1e-20, 10 * max(column(select(rows, panel=panel), y)))
            finish_axes(axes, title, r"step size $\gamma$" if x == "step_size" else "step", y_name)


@dataclass
class _Setting:
    """What a run of IST takes."""

    workers: Sequence[Quadratic]
    sketch: Perm
    x: Tensor
    step_size: float


def _setting(workers: Sequence[Quadratic], kind: str, x: Tensor, *, n: int) -> _Setting:
    """The largest step size that no draw diverges with: 1 over the largest eigenvalue of any B_bar,
    which is the largest squared scale / n times that of any part of an L_i.
    """
    if kind == "plain":
        sketch = Perm(_D, n)
    else:
        sketch = Perm(_D, n, scale=n**0.5)
        workers = preconditioned(workers)
    # A worker that has a single coordinate has a single entry of the diagonal.
    parts = [float(f.hessian.diagonal().max()) if n == _D else f.L_f for f in workers]
    return _Setting(workers, sketch, x, n / sketch.constants.L_S_max / max(parts))


def _counter_example() -> Iterator[dict[str, Any]]:
    hessian = torch.tensor([[1.0, 1.9], [1.9, 4.0]], dtype=torch.float64)
    f = Quadratic(hessian, torch.zeros(2, dtype=torch.float64))
    scaled = preconditioned([f])[0]
    # With a coordinate for each worker every draw has the same B_bar: nothing is to be averaged.
    plain = ist_expected_hessian([f, f], Perm(2, 2))
    identity = ist_expected_hessian([scaled, scaled], Perm(2, 2, scale=2**0.5))
    x = torch.linalg.eigh(ist_w_bar(hessian, plain))[1][:, 0]
    y = hessian.diagonal().sqrt() * x
    steps = {"plain": (f, x, plain @ x), "preconditioned": (scaled, y, identity @ y)}
    for kind, (function, point, direction) in steps.items():
        for step_size in torch.logspace(-4, -1, 31, dtype=torch.float64).tolist():
            moved = function.value(point - step_size * direction)
            change = (moved / function.value(point) - 1) / step_size
            yield {
                "panel": "counter-example",
                "method": kind,
                "step_size": step_size,
                "change": float(change),
            }


def _quadratic(generator: Generator, *, biased: bool) -> Quadratic:
    """Eigenvalues from 1 to 4 in a random basis, then coordinates on scales from 1/3 to 3; b is 0,
    or random.
    """
    square = torch.randn(_D, _D, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(square)
    matrix = (basis * torch.linspace(1, 4, _D, dtype=torch.float64)) @ basis.T
    scale = torch.logspace(-0.5, 0.5, _D, dtype=torch.float64)
    scale = scale[torch.randperm(_D, generator=generator)]
    hessian = scale[:, None] * (matrix + matrix.T) / 2 * scale
    linear = torch.randn(_D, generator=generator, dtype=torch.float64)
    return Quadratic(hessian, linear if biased else torch.zeros_like(linear))


def _pairs(values: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.2g}" for kind, value in values.items())

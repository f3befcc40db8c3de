"""The papers' methods as short loops over quadratics.

They are specifications: a method for neural networks is right if it makes the same steps when its
model is one of these quadratics. Each yields x_0, x_1, ... without end (take what is needed with
``itertools.islice``), and checks its arguments when the first is taken. Any number of independent
runs go at once: x is [..., d], and every run draws its own sketches.

Sources: "MAST: Model-Agnostic Sparsified Training" (ICLR 2025, arXiv 2311.16086); "Towards a Better
Theoretical Understanding of Independent Subnetwork Training" (ICML 2024, arXiv 2306.16484), here
the IST paper.
"""

# Shapes: d coordinates, n workers, N sketches of a finite set; "..." are independent runs.

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from maskedtrain.theory.quadratic import Quadratic, ist_gradient, sketched_gradient
from maskedtrain.theory.sketches import Perm, Sketch

__all__ = [
    "distributed_double_sketched_gd",
    "double_sketched_gd",
    "double_sketched_sgd",
    "ist",
    "l_svrdsg",
    "s_page",
]


def double_sketched_gd(
    f: Quadratic,
    sketch: Sketch,
    x: Tensor,
    *,
    step_size: float,
    generator: Generator,
    shift: Tensor | float = 0.0,
) -> Iterator[Tensor]:
    """Double sketched gradient descent: x_{t+1} = x_t - gamma grad f_{S_t}(x_t); MAST's Algorithm 1
    with the exact gradient of f. Yields x_0 = x, x_1, ... without end.
    """
    yield from distributed_double_sketched_gd(
        [f], [sketch], x, step_size=step_size, generator=generator, shift=shift
    )


def double_sketched_sgd(
    components: Sequence[Quadratic],
    sketch: Sketch,
    x: Tensor,
    *,
    step_size: float,
    generator: Generator,
    shift: Tensor | float = 0.0,
) -> Iterator[Tensor]:
    """Double sketched SGD: f is the average of ``components``, and every step takes the sketched
    gradient of a uniformly random one (MAST's Algorithm 1 with a stochastic gradient of f).
    """
    _check_one_diagonal(sketch)
    if not components:
        raise ValueError("the average needs at least one component, got none")
    while True:
        yield x
        diagonal = sketch.sample(generator, x.shape[:-1], dtype=x.dtype)
        gradients = torch.stack([sketched_gradient(f, diagonal, x, shift) for f in components])
        pick = torch.randint(
            len(components), (*x.shape[:-1], 1), generator=generator, device=x.device
        )
        x = x - step_size * gradients.gather(0, pick.expand_as(x)[None])[0]


def distributed_double_sketched_gd(
    workers: Sequence[Quadratic],
    sketches: Sequence[Sketch],
    x: Tensor,
    *,
    step_size: float,
    generator: Generator,
    shift: Tensor | float = 0.0,
) -> Iterator[Tensor]:
    """Worker i draws S_i from its own distribution, independently of the others, and the server
    averages: x_{t+1} = x_t - gamma (1/n) sum_i grad (f_i)_{S_i}(x_t).
    """
    if not workers or len(workers) != len(sketches):
        raise ValueError(
            f"every worker needs its sketch, got {len(workers)} workers, {len(sketches)} sketches"
        )
    for sketch in sketches:
        _check_one_diagonal(sketch)
    while True:
        yield x
        gradient = torch.zeros_like(x)
        for f, sketch in zip(workers, sketches, strict=True):
            diagonal = sketch.sample(generator, x.shape[:-1], dtype=x.dtype)
            gradient = gradient + sketched_gradient(f, diagonal, x, shift)
        x = x - step_size * gradient / len(workers)


def l_svrdsg(
    f: Quadratic,
    sketches: Tensor,
    x: Tensor,
    *,
    step_size: float,
    probability: float,
    anchor_size: int,
    generator: Generator,
    shift: Tensor | float = 0.0,
) -> Iterator[Tensor]:
    """L-SVRDSG: loopless variance reduction over a finite set of N sketches (MAST).

        x_{t+1} = x_t - gamma (grad f_S(x_t) - grad f_S(w_t) + h_t),     S uniform on the set
        h_t = (1/b) sum_{j in B} grad f_{S_j}(w_t)

    With probability p the anchor w_{t+1} = x_t is new, and B a new set of b different sketches. For
    b = N it converges to the minimiser of f_D exactly, for b < N to a neighbourhood of it.

    Args:
        f: the quadratic.
        sketches: their diagonals, [N, d].
        x: x_0 = w_0, [..., d].
        step_size: gamma.
        probability: p, of a new anchor, in (0, 1].
        anchor_size: b, 1..N.
        generator: the source of randomness.
        shift: v.
    """
    _check(f, sketches, anchor_size, probability)
    anchor, anchor_gradient = x, _mean_gradient(f, sketches, x, anchor_size, generator, shift)
    while True:
        yield x
        diagonal = _pick(sketches, x.shape[:-1], generator)
        gradient = sketched_gradient(f, diagonal, x, shift) + anchor_gradient
        gradient = gradient - sketched_gradient(f, diagonal, anchor, shift)
        fresh = _coin(x, probability, generator)
        anchor = torch.where(fresh, x, anchor)
        if fresh.any():
            renewed = _mean_gradient(f, sketches, x, anchor_size, generator, shift)
            anchor_gradient = torch.where(fresh, renewed, anchor_gradient)
        x = x - step_size * gradient


def s_page(
    f: Quadratic,
    sketches: Tensor,
    x: Tensor,
    *,
    step_size: float,
    probability: float,
    anchor_size: int,
    batch: int = 1,
    generator: Generator,
    shift: Tensor | float = 0.0,
) -> Iterator[Tensor]:
    """S-PAGE: the PAGE estimator over a finite set of N sketches (MAST).

        x_{t+1} = x_t - gamma g_t
        g_{t+1} = (1/b) sum_{j in B} grad f_{S_j}(x_{t+1})            with probability p, else
                  g_t + (1/b') sum_{j in B'} (grad f_{S_j}(x_{t+1}) - grad f_{S_j}(x_t))

    g_0 is of the first kind. B has b different sketches, B' has b' independent ones.

    Args:
        f: the quadratic.
        sketches: their diagonals, [N, d].
        x: x_0, [..., d].
        step_size: gamma.
        probability: p, in (0, 1].
        anchor_size: b, 1..N.
        batch: b'.
        generator: the source of randomness.
        shift: v.
    """
    _check(f, sketches, anchor_size, probability)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    gradient = _mean_gradient(f, sketches, x, anchor_size, generator, shift)
    while True:
        yield x
        before, x = x, x - step_size * gradient
        diagonal = _pick(sketches, (*x.shape[:-1], batch), generator)
        change = sketched_gradient(f, diagonal, x[..., None, :], shift)
        change = change - sketched_gradient(f, diagonal, before[..., None, :], shift)
        gradient = gradient + change.mean(-2)
        fresh = _coin(x, probability, generator)
        if fresh.any():
            renewed = _mean_gradient(f, sketches, x, anchor_size, generator, shift)
            gradient = torch.where(fresh, renewed, gradient)


def ist(
    workers: Sequence[Quadratic],
    sketch: Perm,
    x: Tensor,
    *,
    step_size: float,
    generator: Generator,
) -> Iterator[Tensor]:
    """Independent subnet training with one local step: the coordinates are dealt out anew, worker i
    takes a gradient step of f_i on its own part, the parts are put together (the IST paper).
    """
    while True:
        yield x
        diagonals = sketch.sample(generator, x.shape[:-1], dtype=x.dtype)
        x = x - step_size * ist_gradient(workers, diagonals, x)


def _check_one_diagonal(sketch: Sketch) -> None:
    if isinstance(sketch, Perm):
        raise TypeError("a Perm draws the sketches of all workers together: use ist")


def _check(f: Quadratic, sketches: Tensor, anchor_size: int, probability: float) -> None:
    d = len(f.linear)
    if sketches.ndim != 2 or len(sketches) == 0 or sketches.shape[1] != d:
        raise ValueError(f"sketches must be [N, d] = [N, {d}], got {list(sketches.shape)}")
    if not 1 <= anchor_size <= len(sketches):
        raise ValueError(f"anchor_size must be in 1..{len(sketches)}, got {anchor_size}")
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be in (0, 1], got {probability}")


def _pick(sketches: Tensor, size: tuple[int, ...], generator: Generator) -> Tensor:
    """Independent uniform draws from a finite set: [N, d] -> [*size, d]."""
    return sketches[torch.randint(len(sketches), size, generator=generator, device=sketches.device)]


def _coin(x: Tensor, probability: float, generator: Generator) -> Tensor:
    """True with the probability, for every run: [..., d] -> [..., 1]."""
    size = (*x.shape[:-1], 1)
    return torch.rand(size, generator=generator, dtype=torch.float64, device=x.device) < probability


def _mean_gradient(
    f: Quadratic,
    sketches: Tensor,
    x: Tensor,
    count: int,
    generator: Generator,
    shift: Tensor | float,
) -> Tensor:
    """The sketched gradient's mean over ``count`` different random sketches for every run."""
    size = (*x.shape[:-1], len(sketches))
    order = torch.rand(size, generator=generator, dtype=torch.float64, device=x.device).argsort(-1)
    chosen = sketches[order[..., :count]]
    return sketched_gradient(f, chosen, x[..., None, :], shift).mean(-2)

"""The smoothness L that step sizes and Assumption 3 are about, measured where training stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maskedtrain.theory.criteria import undone

__all__ = ["Smoothness", "smoothness"]


@dataclass(frozen=True)
class Smoothness:
    """What a power iteration found of the Hessian H at a point."""

    L: float
    """``|H v|`` of its last direction v, |v| = 1: at most the largest |eigenvalue|, and nearer to
    it with every iteration."""
    curvature: float
    """The Rayleigh quotient ``<v, H v>``: ``L`` with the eigenvalue's sign, once converged, unless
    there is one of either sign."""
    iterations: int
    """Products with H."""
    converged: bool
    """Whether the last iteration raised ``L`` by no more than the tolerance."""


def smoothness(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Smoothness:
    """The local smoothness ``L = ||H||_2``, H the Hessian of the loss at the present parameters.

        v <- H v / |H v|,    L = |H v|

    ``H v`` is the gradient of ``<grad f, v>``: H is never formed. ``|H v|``, the root of the
    Rayleigh quotient of ``H^2``, rises monotonically to the largest absolute eigenvalue, also where
    eigenvalues of either sign are equally large; slowly where the two largest are close.

    Costs a forward pass and its gradient once, then two gradients or so an iteration, and the
    memory of a gradient's own graph. Gradients that the parameters hold, and the state of modules
    (running statistics) and of random number generators, come back as they were. Attention runs by
    its plain formula: the fused kernels have no second derivative.

    Args:
        model: its parameters that require gradients are those of H. Inside
            ``with core.activate()`` it is the core's Hessian: there is none outside its masks.
        loss: computes the loss on one batch, as the model is then active; it is called once.
        iterations: most products with H.
        tolerance: relative growth of ``L`` in an iteration below which it has converged.
        seed: of the first direction.

    Raises:
        ValueError: iterations < 1, a negative tolerance, or no parameter requires a gradient.

    Example:
        >>> L = smoothness(model, lambda: criterion(model(x), y)).L
        >>> measure(model, Pass(core), lambda: criterion(model(x), y)).whole.assumption3(L)

    Source: Pearlmutter 1994 for the product; Assumptions 1 and 3 of "Masked Training of Neural
    Networks with Partial Gradients" (AISTATS 2022) for what L is needed for.
    """
    if iterations < 1 or not tolerance >= 0:
        raise ValueError(
            f"iterations must be >= 1 and tolerance >= 0, got {iterations} and {tolerance}"
        )
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not wanted:
        raise ValueError("no parameter of the model requires a gradient")
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in wanted]
    v = _scaled(v, 1 / _norm(v))
    largest, curvature, count, converged = 0.0, 0.0, 0, False
    with undone(model, wanted), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(), wanted, create_graph=True, materialize_grads=True)
        while count < iterations and not converged:
            product = _hessian_product(gradient, wanted, v)
            count += 1
            before, largest = largest, _norm(product)
            curvature = sum(float((a * b).sum()) for a, b in zip(v, product, strict=True))
            converged = largest - before <= tolerance * largest
            if largest > 0:
                v = _scaled(product, 1 / largest)
    return Smoothness(largest, curvature, count, converged)


def _hessian_product(
    gradient: tuple[Tensor, ...], wanted: list[nn.Parameter], v: list[Tensor]
) -> list[Tensor]:
    # A gradient that depends on no parameter has none itself.
    pairs = [(g, direction) for g, direction in zip(gradient, v, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(parameter) for parameter in wanted]
    outputs, directions = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(outputs, wanted, directions, retain_graph=True, materialize_grads=True)
    )


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5


def _scaled(tensors: list[Tensor], factor: float) -> list[Tensor]:
    return [tensor * factor for tensor in tensors]

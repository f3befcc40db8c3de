"""Fisher information of single parameters: how much each matters to what a model says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Kind", "fisher_scores", "single_examples"]

Kind = Literal["empirical", "true"]

# The targets that torch's losses leave out.
_IGNORED = -100


def fisher_scores(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    examples: int,
    kind: Kind = "empirical",
    parameters: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, summed over single examples::

        empirical:  sum_n (d log p(y_n | x_n) / d theta)^2
        true:       sum_n sum_c p(c | x_n) (d log p(c | x_n) / d theta)^2

    Each example is a forward pass and one backward pass (C of them for "true") by itself, in
    evaluation mode: no dropout, running statistics. p is the softmax of the logits; the log
    likelihood of a sequence is the sum over its positions. Beside the model's own, memory is for
    the scores and for the gradient of one example. Modes, gradients and random number generators
    are as they were afterwards.

    Args:
        model: gives logits ``[B, C]``, or ``[B, ..., C]`` of sequences.
        batches: ``(inputs, targets)``: inputs a tensor, or a tuple of the model's arguments, with
            examples along the first axis of all; targets int64, of the logits' shape without C.
            Targets of -100 do not count.
        examples: how many to take, the first ones.
        kind: the given label, or the expectation over the C classes, for targets ``[B]``.
        parameters: leaf tensors that the model computes with and that require gradients, by name;
            None is all the parameters that do.

    Returns:
        Scores of each tensor's shape, by name; fp32 for half precision.

    Raises:
        ValueError: an option is out of range, targets do not fit the logits, or there are too few
            examples.

    Source: Sung et al., "Training Neural Networks with Fixed Sparse Masks" (arXiv 2111.09839),
    section 2.
    """
    if kind not in ("empirical", "true"):
        raise ValueError(f'kind must be "empirical" or "true", got {kind!r}')
    if examples < 1:
        raise ValueError(f"examples must be >= 1, got {examples}")
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors, count = list(parameters.values()), 0
    scores = [
        torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors
    ]
    with _evaluated(model), torch.enable_grad():
        for inputs, targets in islice(single_examples(batches), examples):
            count += 1
            terms = _terms(model(*inputs), targets, kind)
            for i, term in enumerate(terms, start=1):
                more = i < len(terms)
                found = torch.autograd.grad(term, tensors, retain_graph=more, allow_unused=True)
                for score, gradient in zip(scores, found, strict=True):
                    if gradient is not None:
                        score += gradient.detach().to_dense().to(score.dtype).square()
    if count < examples:
        raise ValueError(f"examples must be <= {count}, those of the batches, got {examples}")
    return dict(zip(parameters, scores, strict=True))


def single_examples(
    batches: Iterable[tuple[Any, Tensor]],
) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Each example of the batches, as a batch of its own with a tuple of inputs."""
    for inputs, targets in batches:
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        for i in range(len(targets)):
            one = slice(i, i + 1)
            yield tuple(argument[one] for argument in arguments), targets[one]


def _terms(logits: Tensor, targets: Tensor, kind: Kind) -> list[Tensor]:
    """Scalars whose squared gradients add up to the example's score."""
    if logits.shape[:-1] != targets.shape or (kind == "true" and targets.ndim != 1):
        wanted = "[B] for logits [B, C]" if kind == "true" else "of the logits' shape without C"
        raise ValueError(
            f'kind="{kind}": targets must be {wanted}, got {list(targets.shape)} for logits '
            f"{list(logits.shape)}"
        )
    if kind == "empirical":
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
        return [loss]
    log_p = F.log_softmax(logits[targets != _IGNORED], -1).flatten()
    # p (d log p)^2 = (d sqrt(p) log p)^2, where sqrt(p) is held.
    return list((log_p * (log_p.detach() / 2).exp()).unbind())


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; modes and generators come back as they were."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module in training:
            module.training = True

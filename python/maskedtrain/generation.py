"""Beam search with cached keys, batched; greedy search is a beam of one.

# B sentences that are still searched, K hypotheses of each, V vocabulary, t tokens written
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maskedtrain.data.vocabulary import BOS, EOS, PAD
from maskedtrain.models.transformer import Transformer
from maskedtrain.training.loop import NonFiniteError, evaluation_mode

__all__ = ["Hypothesis", "beam_search"]


@dataclass(frozen=True)
class Hypothesis:
    """A translation without bos and eos, and its log probability by token."""

    tokens: list[int]
    score: float


@dataclass
class _Sentence:
    """A sentence's place in the batch, its longest translation, and what has been found."""

    index: int
    limit: int
    found: list[Hypothesis] = field(default_factory=list)

    def over(self, beam: int, best: float) -> bool:
        """Whether the search has ended, ``best`` being the score of the best hypothesis left:
        -inf if there is none, at the limit at the latest.
        """
        if best == -math.inf:
            return True
        scores = sorted((hypothesis.score for hypothesis in self.found), reverse=True)
        return len(scores) >= beam and scores[beam - 1] >= best


@torch.no_grad()
def beam_search(
    model: nn.Module,
    source: Tensor,
    *,
    beam: int = 5,
    length_penalty: float = 1.0,
    max_length_ratio: float = 1.2,
    max_length_offset: int = 10,
    nbest: int = 1,
) -> list[list[Hypothesis]]:
    """The best translations of each sentence, best first, by the sub-network that is active.

    A hypothesis of n tokens with its eos scores ``log p / n ** length_penalty``. At each step the
    2 K best continuations of a sentence are looked at: those among the first K that end are found,
    the first K that do not go on. The search of a sentence is over when K are found that score as
    well as the best one that goes on would if it ended here, or at its limit, where all that is
    left must end. It is exhaustive where K is the number of all sequences.

    What is found does not depend on the other sentences of the batch, but for rounding.

    Args:
        model: a ``Transformer``.
        source: int64 ``[B, S]``: sentences that end with eos, padded with 0 on the right.
        beam: K.
        length_penalty: exponent of the length; more than 0 favours longer translations.
        max_length_ratio: a translation has at most ``max_length_ratio * n + max_length_offset``
            tokens, for n tokens of the source with its eos; those of fairseq.
        max_length_offset: see there.
        nbest: translations to return of each sentence.

    Raises:
        ValueError: beam, nbest or source is out of range.
        TypeError: the model is no ``Transformer``.
        NonFiniteError: the model's logits are NaN or infinite.

    Source: fairseq's sequence generator, but for when it stops.
    """
    if beam < 1:
        raise ValueError(f"beam must be >= 1, got {beam}")
    if not 1 <= nbest <= beam:
        raise ValueError(f"nbest must be in [1, beam = {beam}], got {nbest}")
    if not isinstance(model, Transformer):
        raise TypeError(f"model must be a Transformer, got {type(model).__name__}")
    if source.ndim != 2:
        raise ValueError(f"source must be [B, S], got {list(source.shape)}")
    lengths = (source != PAD).sum(1).tolist()
    if not all(lengths):
        raise ValueError(f"sentence {lengths.index(0)} of source is empty: it lacks even its eos")
    limits = (int(max_length_ratio * n) + max_length_offset for n in lengths)
    sentences = [_Sentence(i, limit) for i, limit in enumerate(limits)]
    if not sentences:
        return []
    with evaluation_mode(model):
        _search(model, source, list(sentences), beam, length_penalty)
    return [
        sorted(sentence.found, key=lambda hypothesis: -hypothesis.score)[:nbest]
        for sentence in sentences
    ]


def _search(
    model: Transformer, source: Tensor, alive: list[_Sentence], beam: int, penalty: float
) -> None:
    """Fill what is found of each sentence."""
    device = source.device
    state = model.start(source)
    tokens = torch.full((len(alive), 1, 1), BOS, device=device)
    scores = torch.zeros(len(alive), 1, device=device)
    while True:
        written = tokens.shape[2] - 1
        at_limit = torch.tensor([written >= sentence.limit for sentence in alive], device=device)
        logits = model.step(tokens[:, :, -1], state)
        ids, origins, values = _candidates(logits, scores, at_limit, 2 * beam)
        # The order of NaN is that of the largest; without this nothing would be found.
        if values[:, 0].isnan().any():
            raise NonFiniteError("the model's logits are NaN or infinite: nothing to choose from")
        _collect(alive, tokens, ids, origins, values, beam, penalty)
        ends = ids == EOS
        # The first K that go on, in order; where there are fewer, what is left scores -inf.
        kept = ends.to(torch.int8).argsort(dim=1, stable=True)[:, :beam]
        scores = values.masked_fill(ends, -torch.inf).gather(1, kept)
        origins, ids = origins.gather(1, kept), ids.gather(1, kept)
        best = (scores[:, 0] / (written + 1) ** penalty).tolist()
        over = [s.over(beam, score) for s, score in zip(alive, best, strict=True)]
        first = torch.arange(len(alive), device=device)[:, None] * tokens.shape[1]
        alive = [sentence for sentence, done in zip(alive, over, strict=True) if not done]
        if not alive:
            return
        rows = None
        if any(over):
            rows = torch.tensor([i for i, done in enumerate(over) if not done], device=device)
            scores, origins, ids, first = (t[rows] for t in (scores, origins, ids, first))
        order = (first + origins).flatten()
        state.select(rows, order)
        tokens = torch.cat([tokens.flatten(0, 1)[order], ids.flatten()[:, None]], 1)
        tokens = tokens.unflatten(0, ids.shape)


def _candidates(
    logits: Tensor, scores: Tensor, at_limit: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of each sentence: tokens, hypotheses they continue, log
    probabilities, each ``[B, count]``, best first.
    """
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    logits[..., [PAD, BOS]] = -torch.inf
    ends = logits[..., EOS].clone()
    logits = logits.masked_fill(at_limit[:, None, None], -torch.inf)
    logits[..., EOS] = ends
    # Of no hypothesis can more than these be among the best of its sentence.
    values, ids = logits.topk(min(count, logits.shape[-1]), -1)
    values = values - total + scores[:, :, None]
    width = values.shape[-1]
    values, places = values.flatten(1).topk(min(count, width * values.shape[1]), -1)
    return ids.flatten(1).gather(1, places), places // width, values


def _collect(
    alive: list[_Sentence],
    tokens: Tensor,
    ids: Tensor,
    origins: Tensor,
    values: Tensor,
    beam: int,
    penalty: float,
) -> None:
    """Note the hypotheses that end, among the first K candidates of each sentence."""
    ended = ((ids == EOS) & ~values.isinf())[:, :beam].nonzero()
    if not len(ended):
        return
    sentences, places = ended.unbind(1)
    texts = tokens[sentences, origins[sentences, places], 1:].tolist()
    found = values[sentences, places] / tokens.shape[2] ** penalty
    for i, text, score in zip(sentences.tolist(), texts, found.tolist(), strict=True):
        alive[i].found.append(Hypothesis(text, score))

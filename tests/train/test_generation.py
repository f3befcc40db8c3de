"""Beam search finds what exhaustive search finds, by itself or in a batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from maskedtrain import SubNetwork
from maskedtrain.generation import beam_search
from maskedtrain.models import Transformer

BOS, EOS = 1, 2
# 4 words beside the special ones; unknown counts as a word.
VOCAB, WORDS = 7, (3, 4, 5, 6)
SOURCE = torch.tensor([[5, 6, 7, 2], [9, 2, 0, 0]])


def model_of(seed: int, spread: float = 0.3, **options: Any) -> Transformer:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"d_model": 16, "heads": 2, "ffn": 32}
    model = Transformer(20, VOCAB, **sizes, encoder_layers=1, decoder_layers=1, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model.double()


@torch.no_grad()
def score(model: Transformer, source: Tensor, tokens: list[int], penalty: float) -> float:
    """By the whole forward pass."""
    log_p = model.eval()(source[source != 0][None], torch.tensor([[BOS, *tokens]])).log_softmax(-1)
    total = sum(log_p[0, i, token].item() for i, token in enumerate([*tokens, EOS]))
    return total / (len(tokens) + 1) ** penalty


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_is_exhaustive(seed: int, penalty: float):
    model = model_of(seed)
    limit = {"max_length_ratio": 0.0, "max_length_offset": 3}
    found = beam_search(model, SOURCE, beam=100, nbest=100, length_penalty=penalty, **limit)
    for source, hypotheses in zip(SOURCE, found, strict=True):
        texts = [list(t) for n in range(4) for t in itertools.product(WORDS, repeat=n)]
        scored = sorted(((score(model, source, t, penalty), t) for t in texts), reverse=True)
        # All that there are, though the beam has room for more.
        assert [h.tokens for h in hypotheses] == [text for _, text in scored]
        for hypothesis, (expected, _) in zip(hypotheses, scored, strict=True):
            # The search adds up log probabilities in fp32.
            assert hypothesis.score == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_a_beam_of_one_is_greedy():
    model = model_of(1).eval()
    found = beam_search(model, SOURCE, beam=1)
    for source, (hypothesis,) in zip(SOURCE, found, strict=True):
        source = source[source != 0][None]
        tokens: list[int] = []
        limit = int(1.2 * source.shape[1]) + 10
        while len(tokens) < limit:
            logits = model(source, torch.tensor([[BOS, *tokens]]))[0, -1]
            logits[[0, BOS]] = -torch.inf
            if (token := int(logits.argmax())) == EOS:
                break
            tokens.append(token)
        assert hypothesis.tokens == tokens


@pytest.mark.parametrize("beam", [1, 3, 5])
def test_scores_are_those_of_the_tokens_alone_or_in_a_batch(beam: int):
    model = model_of(2)
    batch = torch.nn.functional.pad(SOURCE, (0, 4)).repeat(3, 1)
    found = beam_search(model, batch, beam=beam, nbest=beam)
    for source, hypotheses in zip(batch, found, strict=True):
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(h.tokens) for h in hypotheses}) == beam
        (alone,) = beam_search(model, source[source != 0][None], beam=beam, nbest=beam)
        assert [h.tokens for h in alone] == [h.tokens for h in hypotheses]
        for hypothesis in hypotheses:
            expected = score(model, source, hypothesis.tokens, 1.0)
            assert hypothesis.score == pytest.approx(expected, rel=1e-5)
            assert not {0, BOS, EOS} & set(hypothesis.tokens)


class Certain(Transformer):
    """Writes 3, 4, 3, 4 ... and ends after so many, with all else equally improbable."""

    words = 8

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        logits = torch.zeros(*tokens.shape, VOCAB)
        following = {BOS: 3, 3: 4, 4: 3}
        for place in itertools.product(*map(range, tokens.shape)):
            token = EOS if state.length == self.words else following.get(int(tokens[place]), 5)
            logits[(*place, token)] = 8.0
        super().step(tokens, state)
        return logits


def certain() -> Certain:
    return Certain(20, VOCAB, d_model=4, heads=1, ffn=4, encoder_layers=1, decoder_layers=1)


@pytest.mark.parametrize("beam", [1, 3, 6])
def test_improbable_ends_do_not_end_the_search(beam: int):
    # Among few words, the ends of bad hypotheses come into the beam at every step.
    for best, *_ in beam_search(certain(), SOURCE, beam=beam):
        assert best.tokens == [3, 4] * 4


@pytest.mark.parametrize("beam", [1, 3])
def test_limits_are_reached_and_kept(beam: int):
    model = certain()
    model.words = 1000
    for offset in (0, 1, 5):
        limits = {"max_length_ratio": 0.5, "max_length_offset": offset}
        found = beam_search(model, SOURCE, beam=beam, **limits)
        # Half of 4 and of 2 tokens.
        assert [len(best.tokens) for best, *_ in found] == [2 + offset, 1 + offset]
    found = beam_search(model, SOURCE, beam=beam, max_length_ratio=0.0, max_length_offset=0)
    assert [best.tokens for best, *_ in found] == [[], []]


def test_the_active_sub_network_translates_and_modes_come_back():
    model = model_of(3, dropout=0.5).train()
    model.encoder.eval()
    modes = [m.training for m in model.modules()]
    core = SubNetwork.width(model, 0.5, round_to=1)
    with core.activate():
        found = beam_search(model, SOURCE, beam=3)
    assert [m.training for m in model.modules()] == modes
    small: Any = core.extract()
    assert [h[0].tokens for h in beam_search(small, SOURCE, beam=3)] == [h[0].tokens for h in found]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam must be >= 1, got 0"),
        ({"nbest": 0}, r"nbest must be in \[1, beam = 5\], got 0"),
        ({"beam": 2, "nbest": 3}, r"nbest must be in \[1, beam = 2\], got 3"),
        ({"source": torch.tensor([[5, 2], [0, 0]])}, "sentence 1 of source is empty"),
        ({"source": torch.tensor([5, 2])}, r"source must be \[B, S\], got \[2\]"),
    ],
)
def test_errors(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        beam_search(model_of(0), **{"source": SOURCE, **options})


def test_no_sentence_has_no_translation():
    assert beam_search(model_of(0), torch.empty(0, 3, dtype=torch.int64)) == []

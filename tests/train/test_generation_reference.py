"""Beam search is the algorithm that its docstring tells, one sentence and hypothesis at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maskedtrain.generation import Hypothesis, beam_search
from maskedtrain.models import Transformer
from maskedtrain.training.loop import NonFiniteError

PAD, BOS, EOS = 0, 1, 2
SOURCE = torch.tensor([[5, 6, 7, 2], [9, 2, 0, 0], [11, 12, 2, 0]])
# 6 tokens at most of the shortest sentence, 8 of the longest.
LIMITS = {"max_length_ratio": 1.0, "max_length_offset": 4}


def model_of(seed: int, vocab: int = 9, spread: float = 0.3) -> Transformer:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"d_model": 16, "heads": 2, "ffn": 32}
    model = Transformer(20, vocab, **sizes, encoder_layers=1, decoder_layers=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model.double()


@torch.no_grad()
def reference(
    model: Transformer, source: Tensor, beam: int, penalty: float, limit: int
) -> list[Hypothesis]:
    """Plain lists, and the whole forward pass for every hypothesis."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    found: list[Hypothesis] = []
    for written in range(limit + 1):
        candidates: list[tuple[float, list[int], int]] = []
        for total, tokens in alive:
            log_p = model(source, torch.tensor([[BOS, *tokens]]))[0, -1].log_softmax(-1)
            words = [EOS] if written == limit else set(range(len(log_p))) - {PAD, BOS}
            candidates += [(total + log_p[word].item(), tokens, word) for word in words]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beam]
        length = (written + 1) ** penalty
        for total, tokens, word in candidates[:beam]:
            if word == EOS:
                found.append(Hypothesis(tokens, total / length))
        alive = [(total, [*t, word]) for total, t, word in candidates if word != EOS][:beam]
        found.sort(key=lambda hypothesis: -hypothesis.score)
        if not alive or (len(found) >= beam and found[beam - 1].score >= alive[0][0] / length):
            break
    return found


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("beam", [1, 2, 5])
def test_it_is_the_reference(beam: int, penalty: float):
    for seed in range(6):
        model = model_of(seed).eval()
        options: dict[str, Any] = {"beam": beam, "nbest": beam, "length_penalty": penalty}
        found = beam_search(model, SOURCE, **options, **LIMITS)
        for row, hypotheses in zip(SOURCE, found, strict=True):
            row = row[row != PAD]
            expected = reference(model, row[None], beam, penalty, len(row) + 4)[:beam]
            assert [h.tokens for h in hypotheses] == [h.tokens for h in expected]
            for hypothesis, other in zip(hypotheses, expected, strict=True):
                # The search adds up log probabilities in fp32.
                assert hypothesis.score == pytest.approx(other.score, rel=1e-5)


@pytest.mark.parametrize("vocab", [4, 5])
def test_a_beam_may_be_wider_than_the_vocabulary(vocab: int):
    # Less than 2 K continuations of the first steps, and some that are no words.
    for hypotheses in beam_search(model_of(0, vocab), SOURCE, beam=12, nbest=12, **LIMITS):
        assert all(math.isfinite(h.score) for h in hypotheses)
        texts = [tuple(h.tokens) for h in hypotheses]
        assert len(set(texts)) == len(texts) and not {PAD, BOS, EOS} & set().union(*texts)


@torch.no_grad()
def test_log_probabilities_of_a_bf16_model_are_fp32():
    model = model_of(1).bfloat16().eval()
    logits = model.step(torch.full((3, 1), BOS), model.start(SOURCE))
    assert logits.dtype == torch.bfloat16
    expected = logits[:, 0].float().log_softmax(-1)[:, EOS]
    # Of 8 bits they would be off by up to 2^-9.
    found = beam_search(model, SOURCE, max_length_ratio=0.0, max_length_offset=0)
    assert [best.score for best, *_ in found] == pytest.approx(expected.tolist(), rel=1e-6)


def test_nothing_is_kept_for_a_backward_pass():
    model = model_of(0)
    kinds: list[bool] = []
    model.decoder.output_projection.register_forward_hook(
        lambda module, inputs, output: kinds.append(output.requires_grad)
    )
    beam_search(model, SOURCE, beam=2, **LIMITS)
    assert kinds and not any(kinds)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverged_is_an_error(value: float):
    model = model_of(0).train()
    with torch.no_grad():
        model.decoder.layers[0].final_layer_norm.bias.fill_(value)
    with pytest.raises(NonFiniteError, match="logits are NaN or infinite"):
        beam_search(model, SOURCE)
    assert model.training


def test_only_a_transformer_can_be_searched():
    with pytest.raises(TypeError, match="model must be a Transformer, got Linear"):
        beam_search(torch.nn.Linear(2, 2), SOURCE)

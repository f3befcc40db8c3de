"""What holds for every batch, network and sub-network: of random sentences, alone or together."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from maskedtrain import SubNetwork, lowrank
from maskedtrain.generation import beam_search
from maskedtrain.models import Transformer

BOS, EOS = 1, 2
VOCAB = 9
words = st.lists(st.integers(3, VOCAB - 1), max_size=6)
SOURCE = torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]])
TARGET = torch.tensor([[1, 4, 5], [1, 7, 0]])


def padded(rows: list[list[int]], more: int = 0) -> Tensor:
    batch = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return nn.functional.pad(batch, (0, more))


def transformer(**options: Any) -> Transformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "heads": 2, "ffn": 24, "dropout": 0.0}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    model = Transformer(VOCAB, VOCAB, **{**sizes, **layers, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


@cache
def networks() -> list[tuple[Transformer, SubNetwork]]:
    """Whole, narrow, and of low rank; norms after and before."""
    narrow, thin = transformer(), transformer(norm="pre")
    low_rank = lowrank(thin, thin.lowrank_targets, 0.25)
    cores = [SubNetwork.full(narrow), SubNetwork.width(narrow, 0.5, round_to=1)]
    return [*((narrow, core) for core in cores), (thin, SubNetwork.full(thin)), (thin, low_rank)]


@settings(max_examples=25)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.integers(0, 3))
@torch.no_grad()
def test_a_sentence_has_the_logits_it_has_alone(
    pairs: list[tuple[list[int], list[int]]], more: int
):
    sources = padded([[*source, EOS] for source, _ in pairs], more)
    targets = padded([[BOS, *target] for _, target in pairs], more)
    for model, core in networks():
        with core.activate():
            logits = model(sources, targets)
            assert logits.isfinite().all()
            for i, (source, target) in enumerate(pairs):
                alone = model(torch.tensor([[*source, EOS]]), torch.tensor([[BOS, *target]]))[0]
                torch.testing.assert_close(logits[i, : len(alone)], alone, rtol=1e-9, atol=1e-11)


@settings(max_examples=10)
@given(st.lists(words, min_size=2, max_size=4), st.integers(0, 3), st.integers(1, 4))
def test_a_sentence_has_the_translations_it_has_alone(
    sentences: list[list[int]], more: int, beam: int
):
    limits = {"max_length_ratio": 1.0, "max_length_offset": 2}
    batch = padded([[*sentence, EOS] for sentence in sentences], more)
    for model, core in networks():
        with core.activate():
            together = beam_search(model, batch, beam=beam, nbest=beam, **limits)
            for sentence, found in zip(sentences, together, strict=True):
                source = torch.tensor([[*sentence, EOS]])
                (alone,) = beam_search(model, source, beam=beam, nbest=beam, **limits)
                assert [h.tokens for h in found] == [h.tokens for h in alone]
                # Sums of log probabilities in fp32.
                expected = pytest.approx([h.score for h in alone], rel=1e-5)
                assert [h.score for h in found] == expected


@torch.no_grad()
def test_steps_of_sub_networks_are_their_whole_forward():
    for model, core in networks():
        with core.activate():
            expected = model(SOURCE, TARGET)
            state = model.start(SOURCE)
            for t in range(TARGET.shape[1]):
                found = model.step(TARGET[:, t : t + 1], state)[:, 0]
                torch.testing.assert_close(found, expected[:, t], rtol=1e-9, atol=1e-11)


def test_every_row_attends_to_something():
    # What a softmax over nothing is depends on the kernel: 0 in some, NaN in others.
    _, mask = transformer().encode(torch.tensor([[5, 2, 0], [0, 0, 0]]))
    assert mask[:, 0, 0].tolist() == [[True, True, False], [True, False, False]]


def test_one_embedding_may_be_all_three():
    model = transformer(share_embeddings=True)
    weight = model.encoder.embed_tokens.weight
    assert model.decoder.embed_tokens.weight is weight
    assert model.decoder.output_projection.weight is weight
    free = transformer(share_embeddings=True, tie_output=False)
    assert free.decoder.embed_tokens.weight is free.encoder.embed_tokens.weight
    assert free.decoder.output_projection.weight is not free.encoder.embed_tokens.weight


class Times(nn.Module):
    """In the place of dropout, to show what passes there."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def with_factors(model: nn.Module, factors: dict[str, float]) -> Any:
    for module in model.modules():
        for name, factor in factors.items():
            if isinstance(getattr(module, name, None), nn.Dropout):
                setattr(module, name, Times(factor))
    return model


@pytest.mark.parametrize("norm", ["post", "pre"])
@torch.no_grad()
def test_dropout_is_where_torchs_is(norm: Any):
    model = with_factors(transformer(norm=norm), {"dropout": 2.0, "activation_dropout": 3.0})
    tokens = SOURCE[:1]
    memory, _ = model.encode(tokens)
    layer = model.encoder.layers[0]
    theirs = nn.TransformerEncoderLayer(
        16, 2, 24, 0.0, batch_first=True, norm_first=norm == "pre", dtype=torch.float64
    )
    theirs = with_factors(theirs, {"dropout": 3.0, "dropout1": 2.0, "dropout2": 2.0})
    theirs.self_attn.in_proj_weight.copy_(
        torch.cat([getattr(layer.self_attn, f"{x}_proj").weight for x in "qkv"])
    )
    theirs.self_attn.in_proj_bias.copy_(
        torch.cat([getattr(layer.self_attn, f"{x}_proj").bias for x in "qkv"])
    )
    theirs.self_attn.out_proj.load_state_dict(layer.self_attn.out_proj.state_dict())
    theirs.linear1.load_state_dict(layer.fc1.state_dict())
    theirs.linear2.load_state_dict(layer.fc2.state_dict())
    theirs.norm1.load_state_dict(layer.self_attn_layer_norm.state_dict())
    theirs.norm2.load_state_dict(layer.final_layer_norm.state_dict())
    expected = model.encoder.layer_norm(theirs(model.encoder.embed(tokens)))
    torch.testing.assert_close(memory, expected, rtol=1e-10, atol=1e-10)


def test_rates_of_dropout_have_their_places():
    model = transformer(dropout=0.1, attention_dropout=0.2, activation_dropout=0.3)
    assert model.encoder.dropout.p == model.decoder.dropout.p == 0.1
    for layer in (*model.encoder.layers, *model.decoder.layers):
        assert (layer.dropout.p, layer.activation_dropout.p) == (0.1, 0.3)
        assert layer.self_attn.dropout == 0.2
    assert model.decoder.layers[0].encoder_attn.dropout == 0.2


class Certain(Transformer):
    """Is always as sure of the same word, in bf16."""

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        logits = torch.zeros(*tokens.shape, VOCAB, dtype=torch.bfloat16)
        logits[..., EOS] = 8.0
        super().step(tokens, state)
        return logits


def test_scores_are_finer_than_their_logits():
    model = Certain(VOCAB, VOCAB, d_model=4, heads=1, ffn=4, encoder_layers=1, decoder_layers=1)
    for (best,) in beam_search(model, SOURCE):
        # In bf16 the sum of these exponentials would be e^8, and the score 0.
        assert best.score == pytest.approx(-math.log1p((VOCAB - 1) * math.exp(-8)), rel=1e-3)

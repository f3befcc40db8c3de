"""``TextClassifier``: what it computes, padding, cores by width and low rank, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskedtrain import SubNetwork, lowrank
from maskedtrain.data.vocabulary import EOS, PAD
from maskedtrain.layers import MaskedModule
from maskedtrain.methods import ATS
from maskedtrain.models import TextClassifier
from maskedtrain.models.text_classifier import Config
from maskedtrain.optim import MaskedAdamW
from maskedtrain.widths import widths_of
from tests.train.toolbox import assert_equal, snapshot

VOCABULARY, CLASSES = 30, 3

OPTIONS: dict[str, dict[str, Any]] = {
    "bag": {"encoder": "bag", "hidden": (16, 8)},
    "pre": {"encoder": "transformer", "ffn": 16, "heads": 2},
    "post": {"encoder": "transformer", "ffn": 16, "heads": 2, "norm": "post"},
}
ENCODERS = pytest.mark.parametrize("encoder", OPTIONS)

# Two sentences of unequal lengths, as batches come.
TOKENS = torch.tensor([[5, 9, 7, 20, EOS], [8, EOS, PAD, PAD, PAD]])


def model(encoder: str, **options: Any) -> TextClassifier:
    torch.manual_seed(0)
    return TextClassifier(VOCABULARY, CLASSES, d_model=8, **{**OPTIONS[encoder], **options})


def padded(*sentences: list[int], extra: int = 0) -> Tensor:
    rows = [torch.tensor([*ids, EOS] + [PAD] * extra) for ids in sentences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


# What it computes


def test_the_bag_is_the_mean_of_the_embeddings_and_an_mlp():
    bag: Any = model("bag").double().eval()
    for row, ids in enumerate(([5, 9, 7, 20, EOS], [8, EOS])):
        x = bag.encoder.weight[ids].mean(0)
        for layer in bag.head.hidden:
            x = torch.relu(layer.weight @ x + layer.bias)
        expected = bag.head.output.weight @ x + bag.head.output.bias
        torch.testing.assert_close(bag(TOKENS)[row], expected)


@pytest.mark.parametrize("encoder", ["pre", "post"])
def test_the_transformer_is_the_mean_of_its_outputs_and_a_linear_layer(encoder: str):
    network: Any = model(encoder).double().eval()
    for row, ids in enumerate(([5, 9, 7, 20, EOS], [8, EOS])):
        tokens = torch.tensor([ids])
        x = network.encoder(tokens, torch.ones(1, 1, 1, len(ids), dtype=torch.bool))
        torch.testing.assert_close(network(TOKENS)[row], network.head(x.mean(1))[0])


sentences = st.lists(st.lists(st.integers(4, VOCABULARY - 1), max_size=6), min_size=1, max_size=5)


@ENCODERS
@settings(max_examples=20)
@given(rows=sentences, extra=st.integers(0, 9))
def test_padding_and_neighbours_never_change_a_result(
    encoder: str, rows: list[list[int]], extra: int
):
    network = model(encoder).double().eval()
    together = network(padded(*rows, extra=extra))
    alone = torch.cat([network(padded(row)) for row in rows])
    # float64: the same sums in another order.
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@ENCODERS
def test_padding_changes_no_gradient(encoder: str):
    network = model(encoder, dropout=0.0).double()
    found = []
    for extra in (0, 7):
        network.zero_grad()
        network(padded([5, 9, 7, 20], [8], extra=extra)).square().sum().backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    embedding = next(name for name in found[0] if "encoder" in name)
    assert not found[1][embedding][PAD].any() and found[1][embedding][EOS].any()


@ENCODERS
def test_a_row_of_padding_alone_is_finite(encoder: str):
    assert model(encoder)(torch.full((2, 3), PAD)).isfinite().all()


@ENCODERS
def test_only_training_drops(encoder: str):
    network = model(encoder, dropout=0.5)
    assert not torch.equal(network(TOKENS), network(TOKENS))
    network.eval()
    assert torch.equal(network(TOKENS), network(TOKENS))
    without = model(encoder, dropout=0.0)
    assert torch.equal(without(TOKENS), without(TOKENS))


# Cores


def cores(encoder: str) -> tuple[TextClassifier, dict[str, SubNetwork]]:
    network = model(encoder).double().eval()
    narrow = SubNetwork.width(network, 0.5, name="narrow", round_to=2)
    low = lowrank(network, network.lowrank_targets, 0.5, name="low")
    return network, {"full": SubNetwork.full(network), "narrow": narrow, "low": low}


@ENCODERS
@pytest.mark.parametrize("name", ["full", "narrow", "low"])
def test_what_is_extracted_gives_the_same(encoder: str, name: str):
    network, subnets = cores(encoder)
    with subnets[name].activate():
        expected = network(TOKENS)
    plain = subnets[name].extract()
    assert not any(isinstance(module, MaskedModule) for module in plain.modules())
    # Merged weights W + V U, and smaller products, round otherwise: float64.
    torch.testing.assert_close(plain(TOKENS), expected, rtol=1e-12, atol=1e-12)
    others = [output for other, output in outputs(network, subnets).items() if other != name]
    assert not any(torch.allclose(expected, other) for other in others)


def outputs(network: nn.Module, subnets: dict[str, SubNetwork]) -> dict[str, Tensor]:
    found = {}
    for name, subnet in subnets.items():
        with subnet.activate():
            found[name] = network(TOKENS)
    return found


@ENCODERS
def test_cores_cost_less(encoder: str):
    _, subnets = cores(encoder)
    flops = {name: subnet.flops(TOKENS, training=True) for name, subnet in subnets.items()}
    assert 0 < flops["narrow"] < flops["full"]
    sizes = {name: sum(p.numel() for p in s.extract().parameters()) for name, s in subnets.items()}
    assert sizes["narrow"] < sizes["full"]
    assert sizes["narrow"] == subnets["narrow"].numel() - factors(subnets["narrow"])


def factors(subnet: SubNetwork) -> int:
    """Elements of low-rank factors, which are merged into weights when extracted."""
    return sum(
        mask.numel(parameter.shape)
        for name, parameter in subnet.model.named_parameters()
        if name.split(".")[-1] in ("u", "v") and (mask := subnet.masks[name]) is not None
    )


def test_the_widths_of_the_bag_are_its_hidden_layers():
    bag = model("bag")
    assert widths_of(bag) == {"head.hidden.0": 16, "head.hidden.1": 8}
    core: Any = SubNetwork.width(bag, {"head.hidden.0": 0.25}, round_to=1).extract()
    assert [layer.out_features for layer in core.head.hidden] == [4, 8]
    assert core.encoder.weight.shape == (VOCABULARY, 8)


def test_the_widths_of_the_transformer_are_ffn_and_heads():
    network = model("pre", encoder_layers=1)
    assert widths_of(network) == {"encoder.layers.0.fc1": 16, "encoder.layers.0.self_attn": 4}
    core: Any = SubNetwork.width(network, 0.25, round_to=1).extract()
    (layer,) = core.encoder.layers
    assert (layer.fc1.out_features, layer.self_attn.q_proj.out_features) == (4, 2)
    assert (layer.self_attn.v_proj.out_features, core.head.in_features) == (8, 8)


@ENCODERS
def test_a_core_step_leaves_the_rest_alone(encoder: str):
    network = model(encoder)
    core = SubNetwork.width(network, 0.5, round_to=2)
    method = ATS([SubNetwork.full(network), core])
    optimizer = MaskedAdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(2):
        before = snapshot(network)
        plan = method.plan(step)
        plan.backward(lambda: network(TOKENS).square().sum())
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        optimizer.zero_grad()
    after = snapshot(network)
    given: Any = core.masks
    masks = {name: given[name].dense(t.shape) for name, t in after.items()}
    outside = {name: ~mask for name, mask in masks.items()}
    assert sum(int(mask.sum()) for mask in outside.values()) > 0
    for name, tensor in after.items():
        assert torch.equal(tensor[outside[name]], before[name][outside[name]]), name
    assert any(not torch.equal(after[n][m], before[n][m]) for n, m in masks.items())


# Options


def test_the_configuration_builds_the_model():
    config = Config(encoder="bag", d_model=8, hidden=(16, 8), dropout=0.25)
    torch.manual_seed(0)
    built = config.build(vocab=VOCABULARY, num_classes=CLASSES)
    assert_equal(snapshot(built), snapshot(model("bag")))
    assert {m.p for m in built.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert config.vocabulary() is None and config.task == "text"
    options = Config(d_model=8, heads=2, ffn=16, encoder_layers=3, norm="post")
    built = options.build(vocab=VOCABULARY, num_classes=CLASSES)
    assert_equal(
        {n: torch.empty_like(t).zero_() for n, t in snapshot(built).items()},
        {n: t.zero_() for n, t in snapshot(model("post", encoder_layers=3)).items()},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "lstm"}, 'encoder must be "bag" or "transformer", got \'lstm\''),
        ({"heads": 3}, "d_model must be a multiple of heads = 3, got 8"),
        ({"norm": "no"}, 'norm must be "post" or "pre"'),
        ({"encoder": "bag", "hidden": (0,)}, "hidden and classes must be >= 1"),
    ],
)
def test_values_that_do_not_fit(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TextClassifier(VOCABULARY, CLASSES, d_model=8, **options)

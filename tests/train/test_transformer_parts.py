"""What the Transformer is made of: names, first weights, places of dropout, gradients."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskedtrain import LFCLinear, SubNetwork
from maskedtrain.models import Transformer
from maskedtrain.models._transformer_layers import Attention, sinusoids
from tests.train.toolbox import gradients

SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0]])
TARGET = torch.tensor([[1, 4, 5, 6], [1, 7, 0, 0]])


def transformer(**options: Any) -> Transformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "heads": 4, "ffn": 24, "dropout": 0.0}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    model = Transformer(20, 12, **{**sizes, **layers, **options}).double()
    # Norms and biases that are all ones and zeros would hide a mistake.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def test_names_are_fairseqs():
    def both(*modules: str) -> set[str]:
        return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}

    def attention(name: str) -> set[str]:
        projections = (f"{name}.{letter}_proj" for letter in ("q", "k", "v", "out"))
        return both(*projections, f"{name}_layer_norm")

    def layer(stack: str) -> set[str]:
        prefix = f"{stack}.layers.0"
        own = both(f"{prefix}.fc1", f"{prefix}.fc2", f"{prefix}.final_layer_norm")
        return own | attention(f"{prefix}.self_attn")

    post = layer("encoder") | layer("decoder") | attention("decoder.layers.0.encoder_attn")
    post |= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    post |= {"decoder.output_projection.weight"}
    # Positions are computed, so that there is no table to be saved or outgrown.
    assert transformer().state_dict().keys() == post
    pre = post | both("encoder.layer_norm", "decoder.layer_norm")
    assert transformer(norm="pre", tie_output=False).state_dict().keys() == pre


def test_first_weights():
    torch.manual_seed(0)
    model = Transformer(500, 600, d_model=64, heads=4, ffn=128, tie_output=False)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) or name == "decoder.output_projection":
            drawn = layer.weight[1:] if isinstance(layer, nn.Embedding) else layer.weight
            # Of 32,000 draws and more the deviation is right to 0.4 %.
            assert drawn.std().item() == pytest.approx(64**-0.5, rel=0.03)
        elif isinstance(layer, nn.Linear):
            gain = 2**-0.5 if name.endswith(("q_proj", "k_proj", "v_proj")) else 1.0
            bound = gain * math.sqrt(6 / sum(layer.weight.shape))
            assert 0.99 * bound < layer.weight.abs().max() <= bound, name
            assert (layer.bias == 0).all()
    for stack in (model.encoder, model.decoder):
        assert (stack.embed_tokens.weight[0] == 0).all()


def test_low_rank_layers_begin_with_the_variance_of_plain_ones():
    torch.manual_seed(0)
    factory = partial(LFCLinear, rank_ratio=0.25)
    model = Transformer(20, 20, d_model=64, heads=4, ffn=128, linear=factory)
    shares: list[float] = []
    for name, layer in model.named_modules():
        if isinstance(layer, LFCLinear):
            gain = 2**-0.5 if name.endswith(("q_proj", "k_proj", "v_proj")) else 1.0
            variance = gain**2 * 2 / sum(layer.weight.shape)
            shares.append((layer.v @ layer.u).var().item() / variance)
            assert layer.weight.var().item() == pytest.approx(variance / 2, rel=0.1), name
    # 96 layers' products of 16 factors each; half of the variance is theirs.
    assert len(shares) == 6 * 6 + 6 * 10
    assert sum(shares) / len(shares) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_dropout_is_on_embeddings_and_on_what_is_added(norm: str):
    model = transformer(norm=norm, dropout=1.0)
    # With all of it dropped nothing of the tokens is left: zeros go through the norms alone.
    x = torch.zeros(*TARGET.shape, 16, dtype=torch.float64)
    layer = model.decoder.layers[0]
    if norm == "post":
        x = layer.encoder_attn_layer_norm(layer.self_attn_layer_norm(x))
        x = layer.final_layer_norm(x)
    expected = model.decoder.output_projection(model.decoder.layer_norm(x))
    torch.testing.assert_close(model(SOURCE, TARGET), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("option", "silenced"),
    [
        # What is dropped is the next layer's input: only that layer's bias is left.
        ("activation_dropout", ("fc2.weight",)),
        # Values have no way past the attention weights.
        ("attention_dropout", ("v_proj.weight", "v_proj.bias")),
    ],
)
def test_places_of_the_other_dropouts(option: str, silenced: tuple[str, ...]):
    dropped, plain = transformer(**{option: 1.0}), transformer()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith(silenced):
                parameter.zero_()
    expected = plain(SOURCE, TARGET)
    torch.testing.assert_close(dropped(SOURCE, TARGET), expected, rtol=1e-12, atol=1e-12)


def test_embeddings_are_scaled_and_placed():
    model = transformer()
    for stack, tokens in ((model.encoder, SOURCE), (model.decoder, TARGET)):
        table = sinusoids(3, tokens.shape[1], 16, tokens.device).double()
        expected = 4 * stack.embed_tokens.weight[tokens] + table
        torch.testing.assert_close(stack.embed(tokens, 3), expected, rtol=1e-12, atol=1e-12)


def test_two_dimensions_are_one_wavelength():
    # (half - 1) is 0 there.
    model = transformer(d_model=2, heads=1)
    assert model(SOURCE, TARGET).isfinite().all()


def test_padding_is_embedded_without_a_gradient():
    model = transformer(tie_output=False)
    # Even where padding stands in for words: all logits count, and a source has nothing else.
    model(torch.zeros_like(SOURCE), torch.zeros_like(TARGET)).square().sum().backward()
    for stack in (model.encoder, model.decoder):
        grad = stack.embed_tokens.weight.grad
        assert grad is not None and (grad == 0).all()
    assert all(p.grad.abs().max() > 0 for p in model.decoder.layers[0].fc1.parameters())


def test_tied_weights_have_the_sum_of_the_gradients():
    tied, free = transformer(), transformer(tie_output=False)
    free.load_state_dict(tied.state_dict())
    for model in (tied, free):
        model(SOURCE, TARGET).square().sum().backward()
    grads = gradients(free)
    parts = "decoder.embed_tokens.weight", "decoder.output_projection.weight"
    expected = grads[parts[0]] + grads[parts[1]]
    assert grads[parts[0]].abs().max() > 0
    torch.testing.assert_close(gradients(tied)[parts[0]], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradients_of_a_narrow_network(norm: str):
    model = transformer(norm=norm)
    core = SubNetwork.width(model, 0.5, round_to=1)
    dense = copy.deepcopy(model)
    inside = {
        name: torch.ones_like(p, dtype=torch.bool) if mask is None else mask.dense(p.shape)
        for name, p in model.named_parameters()
        for mask in [core.masks[name]]
    }
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.mul_(inside[name])
    dense(SOURCE, TARGET).square().sum().backward()
    with core.activate():
        y = model(SOURCE, TARGET)
    y.square().sum().backward()
    expected = gradients(dense)
    for name, grad in gradients(model).items():
        assert not grad[~inside[name]].any(), name
        torch.testing.assert_close(
            grad[inside[name]], expected[name][inside[name]], rtol=1e-9, atol=1e-11
        )


def test_whole_heads_can_be_shared():
    model = transformer()
    core = SubNetwork.width(model, {"*.fc1": 0.5}, round_to=1)
    small: Any = core.extract(share=True)
    for mine, theirs in zip(model.modules(), small.modules(), strict=True):
        if isinstance(mine, Attention):
            assert theirs.q_proj.weight.data_ptr() == mine.q_proj.weight.data_ptr()
            assert theirs.k_proj.weight.shape == (16, 16)
    with core.activate():
        torch.testing.assert_close(small(SOURCE, TARGET), model(SOURCE, TARGET))


@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_steps_after_a_reordering_keep_the_new_order(norm: str):
    model = transformer(norm=norm).eval()
    state = model.start(SOURCE[:1])
    model.step(torch.tensor([[1]]), state)
    state.select(None, torch.tensor([0, 0]))
    model.step(torch.tensor([[4, 5]]), state)
    state.select(None, torch.tensor([1, 0]))
    written = torch.tensor([[1, 5, 6], [1, 4, 7]])
    # Then two steps without a selection: the first order must not be applied to them again.
    for more in ([8, 9], [10, 11]):
        found = model.step(written[:, -1][None], state)
        whole = model(SOURCE[:1].expand(2, -1), written)[:, -1]
        torch.testing.assert_close(found[0], whole, rtol=1e-10, atol=1e-12)
        written = torch.cat([written, torch.tensor(more)[:, None]], 1)


@torch.no_grad()
def test_exports_for_every_size():
    model = transformer().eval()
    rows, read, written = (torch.export.Dim(n, min=2) for n in ("rows", "read", "written"))
    sizes = {0: rows, 1: read}, {0: rows, 1: written}
    program = torch.export.export(model, (SOURCE, TARGET), dynamic_shapes=sizes).module()
    source, target = (t.repeat(2, 2) for t in (SOURCE, TARGET[:, :3]))
    expected: Tensor = model(source, target)
    torch.testing.assert_close(program(source, target), expected)

"""The Transformer equals torch's own, and padding, caching and masks change nothing they should
not.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import LFCLinear, MaskedLinear, SubNetwork, lowrank
from maskedtrain.methods import ATS
from maskedtrain.models import Transformer
from maskedtrain.models._transformer_layers import Attention, sinusoids
from maskedtrain.optim import MaskedAdamW
from maskedtrain.training.losses import cross_entropy
from tests.train.toolbox import assert_equal, snapshot

SIZES: dict[str, Any] = {
    "d_model": 16, "heads": 4, "ffn": 24, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0
}  # fmt: skip
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0], [11, 2, 0, 0, 0]])
TARGET = torch.tensor([[1, 4, 5, 6], [1, 7, 0, 0], [1, 8, 9, 0]])


def transformer(**options: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(20, 12, **{**SIZES, **options}).double()
    # Norms and biases that are all ones and zeros would hide a mistake.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def torchs(model: Transformer, norm: str) -> nn.Transformer:
    """torch's Transformer with the model's weights."""
    theirs = nn.Transformer(
        16, 4, 2, 2, 24, 0.0, batch_first=True, norm_first=norm == "pre", dtype=torch.float64
    )
    if norm == "post":
        # torch has a last norm there as well, fairseq has none.
        theirs.encoder.norm = theirs.decoder.norm = None

    def attention(to: Any, of: Attention) -> None:
        projections = of.q_proj, of.k_proj, of.v_proj
        to.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        to.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        to.out_proj.load_state_dict(of.out_proj.state_dict())

    with torch.no_grad():
        for ours, other in ((model.encoder, theirs.encoder), (model.decoder, theirs.decoder)):
            if norm == "pre":
                other.norm.load_state_dict(ours.layer_norm.state_dict())  # pyright: ignore[reportOptionalMemberAccess]
            for layer, to in zip(ours.layers, other.layers, strict=True):
                to: Any
                norms = [layer.self_attn_layer_norm, layer.final_layer_norm]
                attention(to.self_attn, layer.self_attn)
                if hasattr(layer, "encoder_attn"):
                    attention(to.multihead_attn, layer.encoder_attn)
                    norms.insert(1, layer.encoder_attn_layer_norm)
                for i, of in enumerate(norms, start=1):
                    getattr(to, f"norm{i}").load_state_dict(of.state_dict())
                to.linear1.load_state_dict(layer.fc1.state_dict())
                to.linear2.load_state_dict(layer.fc2.state_dict())
    return theirs


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_it_is_torchs_transformer(norm: Any):
    model = transformer(norm=norm)
    theirs = torchs(model, norm)
    padding = SOURCE == 0
    y = theirs(
        model.encoder.embed(SOURCE),
        model.decoder.embed(TARGET),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    expected = model.decoder.output_projection(y)
    torch.testing.assert_close(model(SOURCE, TARGET), expected, rtol=1e-10, atol=1e-10)


def test_positions_are_sines_then_cosines():
    table = sinusoids(0, 7, 16, torch.device("cpu"))
    for position in range(7):
        for i in range(8):
            # fairseq counts from one beyond the padding's index, and its last wavelength is exact.
            angle = (position + 1) / 10_000 ** (i / 7)
            assert table[position, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 8 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)
    assert torch.equal(sinusoids(3, 4, 16, torch.device("cpu")), table[3:])
    assert transformer()(SOURCE.repeat(1, 300), TARGET).isfinite().all()


def test_padding_and_batching_change_nothing():
    model = transformer()
    logits = model(SOURCE, TARGET)
    for i, (source, target) in enumerate(zip(SOURCE, TARGET, strict=True)):
        source, target = source[source != 0][None], target[target != 0][None]
        alone = model(source, target)[0]
        torch.testing.assert_close(logits[i, : len(alone)], alone, rtol=1e-10, atol=1e-12)
    more = torch.nn.functional.pad(SOURCE, (0, 3))
    torch.testing.assert_close(model(more, TARGET), logits, rtol=1e-10, atol=1e-12)


def test_the_future_is_not_seen():
    model = transformer()
    logits = model(SOURCE, TARGET)
    changed = TARGET.clone()
    changed[:, 2:] = 10
    later = model(SOURCE, changed)
    assert torch.equal(later[:, :2], logits[:, :2])
    assert not torch.allclose(later[:, 2:], logits[:, 2:])


def test_a_row_of_padding_is_no_nan_and_padding_has_no_gradient():
    model = transformer()
    source = torch.cat([SOURCE, torch.zeros(1, 5, dtype=torch.int64)])
    target = torch.cat([TARGET, torch.zeros(1, 4, dtype=torch.int64)])
    targets = target.roll(-1, 1).masked_fill(target == 0, -100)
    logits = model(source, target)
    assert logits.isfinite().all()
    cross_entropy(logits, targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    embedding = model.encoder.embed_tokens.weight
    assert (embedding[0] == 0).all()
    assert embedding.grad is not None and (embedding.grad[0] == 0).all()


def test_embeddings_are_tied_and_shared_on_demand():
    model = transformer()
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
    free = transformer(tie_output=False)
    assert free.decoder.output_projection.weight is not free.decoder.embed_tokens.weight
    shared = Transformer(12, 12, **SIZES, share_embeddings=True)
    assert shared.encoder.embed_tokens.weight is shared.decoder.embed_tokens.weight
    with pytest.raises(ValueError, match="share_embeddings needs one vocabulary, got sizes 20 and"):
        transformer(share_embeddings=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads must be >= 1, got 0"),
        ({"attention_dropout": 1.5}, r"attention_dropout must be in \[0, 1\], got 1.5"),
        ({"heads": 3}, "d_model must be a multiple of heads = 3, got 16"),
        ({"d_model": 15, "heads": 5}, "d_model must be even, for sines and cosines, got 15"),
        ({"norm": "both"}, 'norm must be "post" or "pre", got \'both\''),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        transformer(**options)


@pytest.mark.parametrize("where", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_for_training(where: str):
    model = transformer(**{where: 0.5})
    assert not torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))
    model.eval()
    assert torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))
    torch.testing.assert_close(model(SOURCE, TARGET), transformer()(SOURCE, TARGET))


@torch.no_grad()
def test_steps_with_cached_keys_are_the_whole_forward():
    model = transformer().eval()
    logits = model(SOURCE, TARGET)
    state = model.start(SOURCE)
    for t in range(4):
        found = model.step(TARGET[:, t : t + 1], state)[:, 0]
        torch.testing.assert_close(found, logits[:, t], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_steps_follow_hypotheses_that_are_reordered_and_sentences_that_leave():
    model = transformer().eval()
    state = model.start(SOURCE)
    written = torch.full((3, 1, 1), 1)
    model.step(written[:, :, -1], state)
    # Two hypotheses of each sentence, then swapped ones of the first and the last.
    moves = [(None, [0, 0, 1, 1, 2, 2], 3), (torch.tensor([0, 2]), [1, 0, 5, 4], 2)]
    for rows, order, count in moves:
        index = torch.tensor(order)
        state.select(rows, index)
        tokens = torch.arange(4, 4 + 2 * count).view(count, 2)
        written = torch.cat([written.flatten(0, 1)[index], tokens.view(-1, 1)], 1)
        written = written.unflatten(0, (count, 2))
        found = model.step(tokens, state)
        source = SOURCE if rows is None else SOURCE[[0, 2]]
        whole = model(source.repeat_interleave(2, 0), written.flatten(0, 1))[:, -1]
        torch.testing.assert_close(found.flatten(0, 1), whole, rtol=1e-10, atol=1e-12)


def zeroed_dense(model: Transformer, subnet: SubNetwork) -> Transformer:
    """A copy whose weights outside the sub-network are zero."""
    dense = transformer()
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        mask = subnet.masks[name]
        assert mask is not None
        state[name] = torch.where(mask.dense(parameter.shape), parameter, 0)
    dense.load_state_dict(state)
    return dense


def test_a_narrow_network_is_the_dense_one_with_zeros():
    model = transformer()
    core = SubNetwork.width(model, 0.5, round_to=1)
    assert core.masks["encoder.layers.0.fc1.weight"] == pk.Prefix(12)
    rows = pk.Index([0, 1, 4, 5, 8, 9, 12, 13])
    assert core.masks["decoder.layers.1.encoder_attn.k_proj.weight"] == rows
    assert core.issubset(SubNetwork.full(model))
    expected = zeroed_dense(model, core)(SOURCE, TARGET)
    with core.activate():
        found = model(SOURCE, TARGET)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(core.extract()(SOURCE, TARGET), expected, rtol=1e-10, atol=1e-12)
    # By layer and token: q, k of half the rows, v, out; the hidden half; attention's products.
    S, T, B = 5, 4, 3
    attention = 2 * (8 + 8 + 16 + 16) * 16
    hidden = 2 * 2 * 16 * 12
    scores = 2 * (8 + 16) * (S * S + T * T + S * T)
    cross = 2 * ((8 + 16) * 16 * T + (8 + 16) * 16 * S)
    by_sentence = (S + T) * (attention + hidden) + cross + scores
    assert core.flops(SOURCE, TARGET) == B * (2 * by_sentence + T * 2 * 16 * 12)


def test_a_low_rank_core():
    model = transformer()
    core = lowrank(model, model.lowrank_targets, 0.25)
    factors = {name for name, m in model.named_modules() if isinstance(m, LFCLinear)}
    parts = {name.rsplit(".", 1)[1] for name in factors}
    assert parts == {"fc1", "fc2", "q_proj", "k_proj"} and len(factors) == 2 * 4 + 2 * 6
    full = SubNetwork.full(model)
    small = core.extract()
    with core.activate():
        torch.testing.assert_close(small(SOURCE, TARGET), model(SOURCE, TARGET))
    method, optimizer = ATS([full, core]), MaskedAdamW(model.parameters(), lr=0.01)
    targets = TARGET.roll(-1, 1).masked_fill(TARGET == 0, -100)
    for step in range(4):
        before = snapshot(model)
        plan = method.plan(step)
        plan.backward(lambda: cross_entropy(model(SOURCE, TARGET), targets))
        optimizer.step(plan.update)
        optimizer.zero_grad()
        for name in factors if step % 2 else ():
            assert torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
            assert not torch.equal(model.state_dict()[f"{name}.u"], before[f"{name}.u"])


@pytest.mark.parametrize("linear", [nn.Linear, MaskedLinear, partial(LFCLinear, rank_ratio=0.25)])
def test_layers_come_from_a_factory(linear: Any):
    model = transformer(linear=linear)
    kind = getattr(linear, "func", linear)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    # Six of an encoder's layer, ten of a decoder's, and the output's.
    assert [type(m) for m in layers].count(kind) == 2 * 6 + 2 * 10 + (kind is nn.Linear)
    assert model(SOURCE, TARGET).isfinite().all()


def test_weights_of_a_standard_transformer_go_in_and_out():
    standard = transformer(linear=nn.Linear)
    expected = standard(SOURCE, TARGET)
    model = transformer()
    model.load_state_dict(standard.state_dict())
    assert torch.equal(model(SOURCE, TARGET), expected)
    lowrank(model, model.lowrank_targets, 0.25, init="zeros")
    assert torch.equal(model(SOURCE, TARGET), expected)
    back = SubNetwork.full(model).extract()
    assert_equal(dict(back.state_dict()), snapshot(standard))

    model = transformer()
    model.load_state_dict(standard.state_dict())
    lowrank(model, model.lowrank_targets, 0.25, init="svd")
    torch.testing.assert_close(model(SOURCE, TARGET), expected, rtol=1e-10, atol=1e-10)
    back = SubNetwork.full(model).extract()
    for name, tensor in back.state_dict().items():
        torch.testing.assert_close(tensor, standard.state_dict()[name], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_for_every_size():
    torch._dynamo.reset()
    model = transformer(encoder_layers=1, decoder_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 2):
        source, target = SOURCE[:rows].repeat(1, rows), TARGET[:rows]
        torch.testing.assert_close(compiled(source, target), model(source, target))
    torch._dynamo.reset()


def test_bf16():
    model = transformer().float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(SOURCE, TARGET)
    expected: Tensor = model(SOURCE, TARGET)
    assert logits.dtype == torch.bfloat16
    # Each of some twenty layers rounds to 8 bits.
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()

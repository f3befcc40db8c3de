"""``width``: narrow networks of models that know nothing of masks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import MaskedLinear, SubNetwork, width
from maskedtrain.optim import MaskedAdamW
from maskedtrain.surgery import Heads
from tests.train.surgery_toolbox import (
    FEED_FORWARD,
    Attention,
    Block,
    assert_is,
    blocks,
    seeded,
    torch_encoder,
    train,
    zeroed_twin,
)
from tests.train.toolbox import assert_equal, element, gradients, noise, snapshot

# Widths


@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_widths(bias: bool) -> None:
    model = blocks(bias=bias)
    original, modules = copy.deepcopy(model), list(model.modules())
    core = width(model, [FEED_FORWARD], ratio=0.25, round_to=8)
    for i in range(2):
        assert core.masks[f"{i}.fc1.weight"] == pk.Prefix(8)
        assert core.masks[f"{i}.fc2.weight"] == pk.Prefix(None, 8)
        if bias:
            assert core.masks[f"{i}.fc1.bias"] == pk.Prefix(8)
            assert core.masks[f"{i}.fc2.bias"] == pk.Full()
    x = noise(5, 6).double()
    assert_is(core, original, x)
    assert torch.equal(model(x), original(x))
    assert_equal(model.state_dict(), original.state_dict())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert type(model[2]) is nn.Linear
    # Multiply-adds: two products of 6 x 8 a block, and the last layer.
    assert core.flops(x) == 2 * 5 * (2 * 2 * 6 * 8 + 6 * 3)
    full = SubNetwork.full(model)
    assert full.flops(x) == 2 * 5 * (2 * 2 * 6 * 32 + 6 * 3)
    assert core.issubset(full) and not full.issubset(core)


def test_a_layer_may_be_consumer_and_producer() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)
        )
    )
    original = copy.deepcopy(model)
    core = width(model, [("0", "2"), ("2", "4")], ratio=0.5, round_to=2)
    assert core.masks["2.weight"] == pk.Prefix(10, 6)
    assert_is(core, original, noise(5, 4).double())


def test_several_producers_of_one_consumer() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(4, 16), nn.Linear(4, 16)
            self.down = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    model = seeded(lambda: nn.Sequential(Gated(), Gated()))
    original = copy.deepcopy(model)
    core = width(model, [("*.gate", "*.up", "*.down")], ratio=0.25, round_to=1)
    assert core.masks["1.gate.weight"] == core.masks["1.up.weight"] == pk.Prefix(4)
    assert core.masks["1.down.weight"] == pk.Prefix(None, 4)
    assert_is(core, original, noise(5, 4).double())


def test_ratios_by_pattern_of_the_producer() -> None:
    model = blocks()
    core = width(model, [FEED_FORWARD], ratio={"1.*": 0.5}, round_to=1)
    assert core.masks["0.fc1.weight"] == pk.Prefix(32)
    assert core.masks["1.fc2.weight"] == pk.Prefix(None, 16)
    with pytest.raises(ValueError, match=r"'2\.\*' matches no width of the model, which has 0\.fc"):
        width(blocks(), [FEED_FORWARD], ratio={"2.*": 0.5})


def test_smaller_ratios_are_nested() -> None:
    model = blocks()
    cores = [
        width(model, [FEED_FORWARD], ratio=ratio, name=f"core{ratio}", round_to=4)
        for ratio in (0.25, 0.5)
    ]
    assert cores[0].issubset(cores[1]) and not cores[1].issubset(cores[0])


def test_the_consumers_pattern_may_match_more() -> None:
    model = nn.ModuleDict({"a": Block(), "b": nn.ModuleDict({"fc2": nn.Linear(2, 2)})})
    core = width(model, [FEED_FORWARD], ratio=0.5)
    assert core.masks["a.fc2.weight"] == pk.Prefix(None, 16)
    assert type(model["b"]["fc2"]) is nn.Linear  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        (("?.fc1", "?.fc2"), [0, 1]),
        (("[0-9].fc1", "[0-9].fc2"), [0, 1]),
        (("[!0].fc1", "[!0].fc2"), [1]),
        (("1.fc1", "1.fc2"), [1]),
    ],
)
def test_patterns_are_those_of_fnmatch(patterns: tuple[str, str], layers: list[int]) -> None:
    model = blocks()
    width(model, [patterns], ratio=0.5)
    assert [i for i in range(2) if type(model[i].fc1) is MaskedLinear] == layers


# Attention heads


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("head_dim", "dims"), [(8, 4), (12, 9), (64, 16)])
def test_heads(head_dim: int, dims: int, bias: bool) -> None:
    model = seeded(lambda: nn.Sequential(Attention(24, head_dim, bias=bias)))
    original = copy.deepcopy(model)
    heads = Heads("*.q_proj", "*.k_proj", head_dim=head_dim)
    core = width(model, [heads], ratio=dims / head_dim, round_to=dims)
    for name, count in (("q_proj", 4), ("k_proj", 2)):
        weight = core.masks[f"0.{name}.weight"]
        assert isinstance(weight, pk.Block if head_dim == 64 else pk.Element)
        rows = torch.tensor([i < dims for _ in range(count) for i in range(head_dim)])
        assert torch.equal(weight.dense((len(rows), 24)), rows[:, None].expand(-1, 24))
        if bias:
            assert core.masks[f"0.{name}.bias"] == pk.Element(rows)
    assert_is(core, original, noise(2, 5, 24).double())


def test_fewer_dimensions_are_those_of_a_narrower_attention() -> None:
    model = seeded(lambda: nn.Sequential(Attention()))
    core = width(model, [Heads("*.q_proj", "*.k_proj", head_dim=8)], ratio=0.5, round_to=1)
    x = noise(2, 5, 24).double()
    attention = model[0]
    q, k, v = (
        p(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    y = F.scaled_dot_product_attention(q[..., :4], k[..., :4], v, scale=8**-0.5, enable_gqa=True)
    with core.activate():
        torch.testing.assert_close(model(x), attention.o_proj(y.transpose(1, 2).flatten(2)))


# What stays as it was


def test_mode_dtype_freezing_hooks_and_optimizers_stay() -> None:
    model = blocks().to(torch.bfloat16).eval()
    model[0].fc1.weight.requires_grad_(False)
    calls: list[torch.Size] = []
    model[0].fc1.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    optimizer = MaskedAdamW(model.parameters())
    parameters = list(model.parameters())
    core = width(model, [FEED_FORWARD], ratio=0.5)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model[0].fc1.training and not model[0].fc1.weight.requires_grad
    before = snapshot(model)
    with core.activate():
        model(noise(5, 6).bfloat16()).sum().backward()
    optimizer.step(core)
    assert calls == [(5, 16)]
    assert torch.equal(model[0].fc1.weight, before["0.fc1.weight"])
    assert not torch.equal(model[1].fc1.weight, before["1.fc1.weight"])


def test_earlier_sub_networks_stay_valid() -> None:
    model = blocks()
    mask = element(32, 6)
    early = SubNetwork(model, {"1.fc1.weight": mask}, name="early")
    first = width(model, [("0.fc1", "0.fc2")], ratio=0.25, name="first")
    x = noise(5, 6).double()
    expected = {}
    for subnet in (early, first):
        with subnet.activate():
            expected[subnet.name] = model(x)
    second = width(model, [("1.fc1", "1.fc2")], ratio=0.5, name="second")
    for subnet in (early, first):
        with subnet.activate():
            assert torch.equal(model(x), expected[subnet.name]), subnet.name
    assert second.masks["0.fc1.weight"] == pk.Full()
    for parameter in model.parameters():
        assert all(s.mask_of(parameter) is not None for s in (early, first, second))


def test_a_shared_layer_is_changed_once() -> None:
    block = Block()
    model = nn.Sequential(block, nn.ReLU(), block).double()
    original = copy.deepcopy(model)
    core = width(model, [FEED_FORWARD], ratio=0.5)
    assert_is(core, original, noise(5, 6).double())


def test_masked_layers_are_taken_as_they_are() -> None:
    model = nn.ModuleDict({"a": Block()})
    layer = MaskedLinear(6, 32)
    model["a"].fc1 = layer
    assert width(model, [FEED_FORWARD], ratio=0.5).masks["a.fc1.weight"] == pk.Prefix(16)
    assert model["a"].fc1 is layer


# torch's own Transformer


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("padded", [True, False])
def test_inference_of_torchs_encoder_is_the_cores(padded: bool) -> None:
    model, x = seeded(torch_encoder).eval(), noise(2, 5, 8).double()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    original = copy.deepcopy(model)
    core = width(model, [("*.linear1", "*.linear2")], ratio=0.25, round_to=4)
    inside = padding.logical_not() if padding is not None else slice(None)
    with torch.no_grad():
        expected = zeroed_twin(original, core)(x, src_key_padding_mask=padding)
        with core.activate():
            y = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(y[inside], expected[inside])
        assert not torch.allclose(y[inside], model(x, src_key_padding_mask=padding)[inside])
    # torch's own choice of the fast path is left to other models.
    assert original.use_nested_tensor and original.layers[0].activation_relu_or_gelu


def test_encoder_and_decoder() -> None:
    make = lambda: nn.Transformer(8, 2, 1, 1, 32, dropout=0.0, batch_first=True)  # noqa: E731
    model = seeded(make)
    original = copy.deepcopy(model)
    core = width(model, [("*.linear1", "*.linear2")], ratio=0.5)
    assert_is(core, original, noise(2, 5, 8).double(), noise(2, 4, 8, seed=1).double())


# Training


def test_training_steps_leave_what_is_outside_alone() -> None:
    model = seeded(lambda: nn.Sequential(Attention(6), Block(), Block()))
    heads = Heads("*.q_proj", "*.k_proj", head_dim=8)
    core = width(model, [FEED_FORWARD, heads], ratio=0.5)
    small = width(model, [FEED_FORWARD, heads], ratio=0.25, name="small", round_to=2)
    train(model, [core, small], noise(3, 5, 6).double())


def test_gradients_are_those_of_the_narrow_network() -> None:
    model = blocks()
    core = width(model, [FEED_FORWARD], ratio=0.5)
    x, extracted = noise(5, 6).double(), core.extract()
    extracted(x).square().sum().backward()
    with core.activate():
        model(x).square().sum().backward()
    narrow, wide = gradients(extracted), gradients(model)
    for name, gradient in wide.items():
        mask = core.masks[name]
        assert mask is not None
        torch.testing.assert_close(mask.restrict(gradient), narrow[name])
        assert not gradient[~mask.dense(gradient.shape)].any()

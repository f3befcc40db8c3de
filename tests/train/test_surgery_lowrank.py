"""``lowrank``: low-rank cores of models that know nothing of masks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import Heads, MaskedLinear, SubNetwork, lowrank, width
from maskedtrain.layers import LFCLinear, MaskedModule
from tests.train.surgery_toolbox import (
    FEED_FORWARD,
    Attention,
    Block,
    assert_is,
    blocks,
    kinds,
    seeded,
    torch_encoder,
    train,
)
from tests.train.toolbox import assert_equal, noise, snapshot


def lowrank_by_hand(original: nn.Module, model: nn.Module, names: Sequence[str], rank: int) -> Any:
    """The original model with V U, of the first ``rank``, in the place of these layers' weights."""
    twin: Any = copy.deepcopy(original)
    with torch.no_grad():
        for name in names:
            layer: Any = model.get_submodule(name)
            twin.get_submodule(name).weight.copy_(layer.v[:, :rank] @ layer.u[:rank])
    return twin


def assert_is_core(
    core: SubNetwork, original: nn.Module, names: Sequence[str], rank: int, *inputs: Tensor
) -> None:
    """The active and the extracted core compute with V U alone."""
    expected = lowrank_by_hand(original, core.model, names, rank)(*inputs)
    with core.activate():
        y = core.model(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y, core.model(*inputs), rtol=1e-3)
    extracted = core.extract()
    assert not any(isinstance(module, MaskedModule) for module in extracted.modules())
    torch.testing.assert_close(extracted(*inputs), y, rtol=1e-12, atol=1e-12)


FIRST = ["0.fc1", "1.fc1"]


@pytest.mark.parametrize("bias", [True, False])
def test_low_rank_core(bias: bool) -> None:
    model = blocks(bias=bias)
    original, modules = copy.deepcopy(model), list(model.modules())
    parameters = dict(model.named_parameters())
    core = lowrank(model, ["*.fc1"], ratio=0.5)
    assert [name for name, kind in kinds(model).items() if kind is LFCLinear] == FIRST
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    added = {f"{name}.{factor}" for name in FIRST for factor in "uv"}
    assert after.keys() - parameters.keys() == added
    for name in after:
        expected = None if name in ("0.fc1.weight", "1.fc1.weight") else pk.Full()
        assert core.masks[name] == expected, name
    x = noise(5, 6).double()
    assert_is_core(core, original, FIRST, 3, x)
    # x U^T, then V: 6 x 3 and 3 x 32; the second layer; the last one.
    assert core.flops(x) == 2 * 5 * (2 * (6 * 3 + 3 * 32 + 32 * 6) + 6 * 3)
    full = SubNetwork.full(model)
    assert core.flops(x) < full.flops(x)
    assert core.issubset(full) and not full.issubset(core)


def test_a_decomposed_model_is_what_it_was() -> None:
    model = blocks()
    original, x = copy.deepcopy(model), noise(5, 6).double()
    core = lowrank(model, ["*.fc?"], ratio=0.5, init="svd")
    torch.testing.assert_close(model(x), original(x), rtol=1e-12, atol=1e-12)
    # The best of its rank, as the Eckart-Young theorem has it.
    weight = original[0].fc2.weight.detach()
    error = weight - core.extract().get_parameter("0.fc2.1.weight") @ core.extract().get_parameter(
        "0.fc2.0.weight"
    )
    torch.testing.assert_close(error.norm(), torch.linalg.svdvals(weight)[3:].norm())


def test_smaller_ranks_are_nested() -> None:
    model = blocks()
    original, x = copy.deepcopy(model), noise(5, 6).double()
    core = lowrank(model, ["0.fc1", "*.fc1"], ratio=0.5)
    state = snapshot(model)
    small = lowrank(model, ["*.fc1"], ratio=0.25, name="small")
    assert_equal(snapshot(model), state)
    assert small.masks["1.fc1.u"] == pk.Prefix(2)
    assert small.masks["1.fc1.v"] == pk.Prefix(None, 2)
    assert small.issubset(core) and not core.issubset(small)
    assert_is_core(core, original, FIRST, 3, x)
    assert_is_core(small, original, FIRST, 2, x)
    assert small.flops(x) == core.flops(x) - 2 * 5 * 2 * (6 + 32)
    again = lowrank(model, ["*.fc1"], ratio=0.5, name="again")
    assert again.issubset(core) and core.issubset(again)
    before = kinds(model)
    with pytest.raises(
        ValueError, match=r"0\.fc1 has rank 3 already; ratio must be <= 0\.5, got 1"
    ):
        lowrank(model, ["*.fc?"], ratio=1.0)
    assert kinds(model) == before


def test_both_kinds_of_core_of_one_model() -> None:
    model = seeded(lambda: nn.Sequential(Attention(6), Block()))
    x = noise(2, 5, 6).double()
    narrow = width(model, [FEED_FORWARD], ratio=0.5, name="narrow")
    with narrow.activate():
        expected = model(x)
    low = lowrank(model, ["*.q_proj", "*.k_proj"], ratio=0.5, name="low", init="svd")
    with narrow.activate():
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    with low.activate():
        low_y = model(x)
    other = width(model, [FEED_FORWARD], ratio=0.25, name="other")
    with low.activate():
        assert torch.equal(model(x), low_y)
    full = SubNetwork.full(model)
    assert all(core.issubset(full) for core in (narrow, low, other))
    # The layers are others now, for an earlier sub-network, too.
    assert narrow.mask_of(model[0].q_proj.u) == pk.Full()
    assert other.mask_of(model[0].q_proj.u) == pk.Full()


def test_a_narrow_network_of_low_rank_layers() -> None:
    model = blocks()
    lowrank(model, ["*.fc1"], ratio=0.5, name="low")
    core = width(model, [FEED_FORWARD], ratio=0.5)
    assert kinds(model)["0.fc1"] is LFCLinear
    original = copy.deepcopy(model)
    assert_is(core, original, noise(5, 6).double())
    with pytest.raises(TypeError, match=r"0\.fc1 is a maskedtrain\.layers\.lfc\.LFCLinear, whose"):
        width(model, [Heads("*.fc1", "*.fc2", head_dim=2)], ratio=0.5)


def test_training_a_low_rank_core() -> None:
    model = seeded(lambda: nn.Sequential(Attention(6), Block(), Block()))
    targets = ["*.fc1", "*.q_proj", "*.k_proj"]
    core = lowrank(model, targets, ratio=0.5)
    small = lowrank(model, targets, ratio=0.25, name="small")
    train(model, [core, small], noise(3, 5, 6).double())


def test_low_rank_layers_keep_mode_dtype_freezing_and_hooks() -> None:
    model = blocks().to(torch.bfloat16).eval()
    layer = model[0].fc1
    layer.weight.requires_grad_(False)
    calls: list[torch.Size] = []
    layer.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    core = lowrank(model, ["*.fc1"], ratio=0.5)
    assert model[0].fc1 is layer and not layer.training
    assert not layer.weight.requires_grad
    assert layer.u.dtype == layer.v.dtype == layer.weight.dtype == torch.bfloat16
    with core.activate():
        model(noise(5, 6).bfloat16()).sum().backward()
    assert calls == [(5, 32)]
    assert layer.u.grad is not None and layer.v.grad is not None and layer.weight.grad is None


def test_a_shared_low_rank_layer_is_changed_once() -> None:
    block = Block()
    model = nn.Sequential(block, nn.ReLU(), block).double()
    original = copy.deepcopy(model)
    core = lowrank(model, ["*.fc1"], ratio=0.5)
    assert len(list(model.parameters())) == 6
    assert_is_core(core, original, ["0.fc1"], 3, noise(5, 6).double())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_inference_of_torchs_encoder_is_the_low_rank_cores() -> None:
    model, x = seeded(torch_encoder).eval(), noise(2, 5, 8).double()
    original, names = copy.deepcopy(model), ["layers.0.linear1", "layers.1.linear1"]
    core = lowrank(model, ["*.linear1"], ratio=0.25, init="svd")
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        for mask in (None, padding):
            inside = slice(None) if mask is None else mask.logical_not()
            whole, y = (net(x, src_key_padding_mask=mask)[inside] for net in (original, model))
            torch.testing.assert_close(y, whole)
            expected = lowrank_by_hand(original, model, names, 2)(x, src_key_padding_mask=mask)
            with core.activate():
                y = model(x, src_key_padding_mask=mask)
            torch.testing.assert_close(y[inside], expected[inside])
            assert not torch.allclose(y[inside], whole)


def test_earlier_sub_networks_of_masked_layers_follow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(8, 16), nn.ReLU(), MaskedLinear(16, 4)).double()
    masks = {"0.weight": pk.Prefix(6), "2.weight": pk.Prefix(None, 6)}
    full, narrow = SubNetwork.full(model), SubNetwork(model, masks, name="narrow")
    x = torch.randn(5, 8).double()
    expected = []
    for subnet in (full, narrow):
        with subnet.activate():
            expected.append(model(x))
    core = lowrank(model, ["*"], 0.5, init="svd")
    for subnet, y in zip((full, narrow), expected, strict=True):
        with core.activate(), subnet.activate():
            torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(subnet.extract()(x), y, rtol=1e-12, atol=1e-12)
    assert full.mask_of(model[0].u) == pk.Full()
    assert narrow.mask_of(model[0].v) == pk.Prefix(6)
    assert core.issubset(full) and not core.issubset(narrow)

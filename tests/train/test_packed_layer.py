"""``PackedLinear``: a frozen weight, N trained values, and what they cost and become."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import partial_kernels as pk
from maskedtrain import LFCLinear, MaskedLinear, PackedLinear, SubNetwork
from maskedtrain.methods import Standard
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.training.checkpoint import Checkpoints
from partial_kernels.packed.reference import merged
from tests.train.toolbox import active_results, assert_equal, integers, noise, results, snapshot

O, I = 8, 6
INDEX = pk.Packed([0, 1, 7, 20, 33, 47])
N = 6


def layer_of_integers() -> PackedLinear:
    """Sums of its small integers are exact in any order."""
    layer = PackedLinear(I, O, INDEX)
    layer.double()
    with torch.no_grad():
        for seed, tensor in enumerate((layer.weight, layer.values, layer.bias)):
            assert tensor is not None
            tensor.copy_(integers(*tensor.shape, seed=seed))
    return layer


def dense(layer: PackedLinear) -> Tensor:
    weight = layer.weight.detach().clone()
    weight.view(-1)[layer.index.index] += layer.values.detach()
    return weight


@pytest.mark.parametrize("tokens", [1, 50])
def test_forward_and_gradients(tokens: int) -> None:
    layer = layer_of_integers()
    x, dy = integers(tokens, I, seed=5), integers(tokens, O, seed=99)
    found = results(layer, x)
    assert layer.bias is not None
    assert torch.equal(found["y"], x @ dense(layer).T + layer.bias)
    assert torch.equal(found["x"], dy @ dense(layer))
    assert torch.equal(found["values"], (dy.T @ x).flatten()[INDEX.index])
    assert torch.equal(found["bias"], dy.sum(0))
    assert "weight" not in found


def test_from_linear_is_over_the_same_weight_and_bias() -> None:
    linear = nn.Linear(I, O).eval()
    layer = PackedLinear.from_linear(linear, INDEX)
    x = noise(3, I)
    assert torch.equal(layer(x), linear(x))
    assert layer.bias is linear.bias and layer.weight.data_ptr() == linear.weight.data_ptr()
    assert linear.weight.requires_grad and not layer.weight.requires_grad
    assert not layer.training and not layer.values.any()
    assert list(dict(layer.named_parameters())) == ["values", "bias"]
    masked = MaskedLinear(I, O, bias=False, dtype=torch.float64)
    bare = PackedLinear.from_linear(masked, INDEX)
    assert bare.bias is None and bare.values.dtype == torch.float64
    assert repr(bare) == "PackedLinear(in_features=6, out_features=8, bias=False, trained=6)"
    assert torch.equal(bare(x.double()), masked(x.double()))


@pytest.mark.parametrize(
    ("linear", "index", "error", "message"),
    [
        (nn.Linear(I, O), pk.Packed([48]), ValueError, "Packed index must be < 48, got 48"),
        (nn.Linear(I, O), [1, 2], TypeError, "index must be a partial_kernels.Packed, got list"),
        (LFCLinear(I, O, rank=2), INDEX, TypeError, "got a LFCLinear with a behaviour of its own"),
    ],
)
def test_what_does_not_fit(linear: Any, index: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        PackedLinear.from_linear(linear, index)
    if type(linear) is nn.Linear:
        with pytest.raises(error, match=message):
            PackedLinear(I, O, index)


def test_the_bias_is_trained_or_not() -> None:
    frozen = PackedLinear(I, O, INDEX, train_bias=False)
    assert results(frozen, noise(3, I)).keys() == {"y", "x", "values"}
    assert PackedLinear(I, O, INDEX, bias=False, train_bias=False).bias is None
    linear = nn.Linear(I, O)
    linear.bias.requires_grad_(False)
    layer = PackedLinear.from_linear(linear, INDEX)
    assert layer.bias is linear.bias and not linear.bias.requires_grad
    # Made by itself, W and b are drawn as nn.Linear draws them.
    torch.manual_seed(0)
    made = PackedLinear(I, O, INDEX)
    torch.manual_seed(0)
    plain = nn.Linear(I, O)
    assert torch.equal(made.weight, plain.weight)
    assert_equal({"bias": made.bias}, {"bias": plain.bias})  # pyright: ignore[reportArgumentType]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "masked adamw": lambda p: MaskedAdamW(p, lr=0.1),
    "masked sgd": lambda p: MaskedSGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gradients_and_optimizer_states_have_as_many_elements_as_are_trained(make: Any) -> None:
    inputs = outputs = 64
    layer = PackedLinear(inputs, outputs, pk.Packed([5, 77, 4000]), bias=False)
    weight, saved = layer.weight.clone(), []
    optimizer = make(layer.parameters())
    for seed in range(3):
        with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = layer(noise(4, inputs, seed=seed))
        y.square().sum().backward()
        assert layer.values.grad is not None and layer.values.grad.shape == (3,)
        optimizer.step()
        optimizer.zero_grad()
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    assert state and all(t.numel() in (1, 3) for t in state)
    # Beside the layer's own tensors, no more than x is kept for a backward.
    own = {layer.weight.data_ptr(), layer.values.data_ptr(), layer.index.index.data_ptr()}
    assert all(t.numel() <= 4 * inputs for t in saved if t.data_ptr() not in own)
    assert torch.equal(layer.weight, weight) and layer.values.abs().min() > 0


def test_it_learns_what_its_elements_can() -> None:
    layer = layer_of_integers()
    target = layer.merged()
    with torch.no_grad():
        layer.values.zero_()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = noise(64, I).double()
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_the_forwards_weight(dtype: torch.dtype) -> None:
    layer = PackedLinear(I, O, INDEX, dtype=dtype).eval()
    with torch.no_grad():
        layer.values.normal_()
    plain = layer.merged()
    expected = merged(layer.weight, layer.values.detach(), INDEX.index, dtype)
    assert type(plain) is nn.Linear and torch.equal(plain.weight, expected)
    assert plain.weight.requires_grad and not plain.training
    x = noise(50, I).to(dtype)
    assert torch.equal(plain(x), layer(x))
    # A copy.
    with torch.no_grad():
        plain.weight.zero_()
    assert layer.weight.any() and layer.values.any()


# Checkpoints


def test_a_checkpoint_restores_values_and_index() -> None:
    layer = layer_of_integers()
    assert list(layer.state_dict()) == ["values", "bias", "weight", "_extra_state"]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = PackedLinear(I, O, pk.Packed(range(N)), dtype=torch.float64)
    other.load_state_dict(state)
    assert other.index == layer.index
    assert_equal(snapshot(other), snapshot(layer))
    x = noise(50, I).double()
    assert_equal(results(other, x), results(layer, x))
    # The state is not shared.
    state["_extra_state"].zero_()
    assert other.index == layer.index


def test_checkpoints_of_a_run_hold_it(tmp_path: Path) -> None:
    model = nn.Sequential(layer_of_integers(), nn.ReLU())
    saved = Checkpoints(tmp_path)
    saved.save(3, model.state_dict(), {})
    other = nn.Sequential(PackedLinear(I, O, pk.Packed(range(N)), dtype=torch.float64), nn.ReLU())
    other.load_state_dict(saved.load().weights)
    assert_equal(snapshot(other), snapshot(model))


def test_the_pretrained_part_of_a_checkpoint_is_nn_linears() -> None:
    plain = nn.Linear(I, O)
    layer = PackedLinear(I, O, INDEX)
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["values", "_extra_state"] and not missing.unexpected_keys
    assert torch.equal(layer(noise(3, I)), plain(noise(3, I)))
    assert layer.index == INDEX


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (torch.arange(4), ValueError, "must hold N = 6 positions as values does, got 4"),
        (torch.arange(6) + 43, ValueError, "Packed index must be < 48, got 48"),
        (torch.tensor([0, 1, 2, 4, 3, 5]), ValueError, "strictly increasing, got 3 after 4"),
        (torch.zeros(6), ValueError, "must be a 1-D int64 tensor, got 1-D float32"),
        ([1, 2], TypeError, "extra state must be a tensor of positions, got list"),
    ],
)
def test_positions_that_do_not_fit_are_refused(state: Any, error: Any, message: str) -> None:
    layer = PackedLinear(I, O, INDEX)
    with pytest.raises(error, match=message):
        layer.load_state_dict({**layer.state_dict(), "_extra_state": state})
    assert layer.index == INDEX


def test_copies_have_their_own_values() -> None:
    layer, x = layer_of_integers(), noise(50, I).double()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.index == layer.index
        assert_equal(results(twin, x), results(layer, x))
        with torch.no_grad():
            twin.values.add_(1)
        assert not torch.equal(twin(x), layer(x))


def test_dtypes_and_devices() -> None:
    layer = PackedLinear(I, O, INDEX, device="meta")
    assert layer.values.is_meta and layer.weight.is_meta and layer.index == INDEX
    layer.to_empty(device="cpu").half()
    assert layer.weight.dtype == layer.values.dtype == torch.float16
    assert layer.index == INDEX and layer.index.index.dtype == torch.int64


# In sub-networks


@pytest.mark.parametrize(
    "mask",
    [
        None,
        pk.Full(),
        pk.Element(torch.arange(N) % 2 == 0),
        pk.Packed([1, 5]),
        pk.Prefix(4),
        pk.Index([0, 3]),
    ],
    ids=str,
)
def test_a_sub_network_has_some_of_the_values(mask: pk.Mask | None) -> None:
    layer = layer_of_integers()
    subnet = SubNetwork(layer, {"values": mask}, name="part")
    x, dy = integers(50, I, seed=5), integers(50, O, seed=99)
    found = active_results(subnet, x)
    inside = torch.zeros(N).bool() if mask is None else mask.dense((N,))
    weight = layer.weight.clone()
    weight.view(-1)[INDEX.index] += layer.values.detach() * inside
    assert layer.bias is not None
    assert torch.equal(found["y"], x @ weight.T + layer.bias)
    if mask is None:
        assert "values" not in found
    else:
        assert torch.equal(found["values"], (dy.T @ x).flatten()[INDEX.index] * inside)
    extracted: Any = subnet.extract()
    assert type(extracted) is nn.Linear
    assert torch.equal(extracted.weight, weight)
    assert extracted.weight.requires_grad == (mask is not None)
    assert torch.equal(extracted(x), found["y"])


def test_views_of_a_sub_network() -> None:
    layer = PackedLinear(I, O, INDEX)
    with pytest.raises(ValueError, match=r"W \+ dW is no view: share=True needs W alone"):
        SubNetwork.full(layer).extract(share=True)
    alone: Any = SubNetwork(layer, {"values": None}, name="pretrained").extract(share=True)
    assert alone.weight.data_ptr() == layer.weight.data_ptr()


def test_a_bias_that_does_not_fit() -> None:
    for masks in ({"bias": pk.Prefix(1)}, {"bias": pk.Prefix(1), "values": None}):
        subnet = SubNetwork(PackedLinear(I, O, INDEX), masks, name="x")
        with subnet.activate(), pytest.raises(ValueError, match=r"bias must .*8.*, got \[?1"):
            subnet.model(noise(3, I))
        with pytest.raises(ValueError, match="bias must keep 8 elements, got 1"):
            subnet.extract()


def test_a_method_trains_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(PackedLinear(I, O, INDEX), nn.ReLU(), nn.Linear(O, 3))
    full = SubNetwork.full(model)
    assert full.numel() == N + O + 3 * (O + 1)
    # y and dvalues (there is no dx); y, dx and dW.
    expected = 2 * 20 * (O * I + N) + 3 * 2 * 20 * 3 * O
    assert full.flops(noise(20, I), training=True) == expected
    method, optimizer = Standard(full), MaskedAdamW(model.parameters(), lr=0.05)
    x, targets, losses = noise(20, I), torch.arange(20) % 3, []
    before = snapshot(model)
    for step in range(30):
        plan = method.plan(step)
        losses += plan.backward(lambda: nn.functional.cross_entropy(model(x), targets)).values()
        optimizer.step(plan.update)
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    moved = {n for n, value in snapshot(model).items() if not torch.equal(value, before[n])}
    assert moved == {"0.values", "0.bias", "2.weight", "2.bias"}


# Dynamo makes instances of autograd.Function, against torch's advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mask", ["inactive", pk.Full(), pk.Packed([1, 5]), None], ids=str)
def test_it_compiles_into_one_graph(mask: Any) -> None:
    torch._dynamo.reset()
    layer, x = layer_of_integers(), integers(50, I)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    if mask == "inactive":
        assert torch.equal(compiled(x), layer(x))
        compiled(x).sum().backward()
        grad, layer.values.grad = layer.values.grad, None
        layer(x).sum().backward()
        assert layer.values.grad is not None and torch.equal(grad, layer.values.grad)
        return
    with SubNetwork(layer, {"values": mask}, name="part").activate():
        assert torch.equal(compiled(x), layer(x))

"""Modules of which a few elements are trained in place: results, gradients, copies, masks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import LFCLinear, MaskedConv2d, MaskedLinear, SubNetwork, SwitchNorm
from maskedtrain.layers.sparse_tuning import (
    SparselyTuned,
    can_be_tuned,
    tune_elements,
    tuned_index,
    tuned_tensor,
)
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from partial_kernels.packed.reference import DVALUES
from tests.train.toolbox import TOKENS, Tied, assert_equal, integers, noise, snapshot

I, O, V, D = 6, 8, 9, 4
INDEX = [0, 1, 7, 20, 33, 35]


def exact(module: nn.Module) -> nn.Module:
    """Of small integers in fp64, whose sums are exact in any order."""
    module.double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = integers(*parameter.shape, seed=seed)
    return module


def tune(module: nn.Module, index: Any = INDEX, name: str = "weight") -> nn.Parameter:
    return tune_elements([(module, name)], pk.Packed(index))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(I, O), lambda: integers(3, 5, I, seed=5)),
    "no-bias": (lambda: nn.Linear(I, O, bias=False), lambda: integers(I, seed=5)),
    "no-token": (lambda: nn.Linear(I, O), lambda: integers(0, I)),
    "masked-linear": (lambda: MaskedLinear(I, O), lambda: integers(50, I, seed=5)),
    "embedding": (lambda: nn.Embedding(V, D), lambda: torch.tensor([[8, 0, 8], [5, 1, 0]])),
    "padding": (
        lambda: nn.Embedding(V, D, padding_idx=0),
        lambda: torch.tensor([[8, 0, 0], [5, 5, 0]], dtype=torch.int32),
    ),
    "no-words": (lambda: nn.Embedding(V, D), lambda: torch.zeros(2, 0, dtype=torch.int64)),
    "conv": (lambda: nn.Conv2d(2, 3, 3), lambda: integers(2, 2, 5, 5, seed=5)),
    "masked-conv": (lambda: MaskedConv2d(2, 3, 3), lambda: integers(2, 2, 5, 5, seed=5)),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_plain_modules_and_gradients_are_the_elements(name: str) -> None:
    make, inputs = CASES[name]
    plain, x = exact(make()), inputs()
    tuned = copy.deepcopy(plain)
    values = tune(tuned)
    results: list[list[Tensor]] = []
    for module in (plain, tuned):
        leaf = x.clone().requires_grad_() if x.is_floating_point() else x
        y = module(leaf)
        y.backward(integers(*y.shape, seed=99))
        grads = [leaf.grad] if x.is_floating_point() else []
        bias: Any = getattr(module, "bias", None)
        results.append([y, *grads, *([] if bias is None else [bias.grad])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    grad: Any = plain.weight.grad
    assert values.grad is not None and torch.equal(values.grad, grad.flatten()[INDEX])
    assert dict(tuned.named_parameters()).keys() == (
        {"weight_values", "bias"} if getattr(plain, "bias", None) is not None else {"weight_values"}
    )


@pytest.mark.parametrize("module", [nn.LayerNorm(I), nn.Linear(I, I), nn.BatchNorm1d(I)], ids=str)
def test_every_parameter_of_a_module_can_be_tuned(module: nn.Module) -> None:
    plain = exact(copy.deepcopy(module))
    tuned, x = copy.deepcopy(plain), integers(7, I, seed=5)
    values = [tune(tuned, [1, 4], name) for name in ("weight", "bias")]
    for m in (plain, tuned):
        m(x).backward(integers(7, I, seed=99))
    assert torch.equal(tuned(x), plain(x))
    for value, parameter in zip(values, (plain.weight, plain.bias), strict=True):
        assert value.grad is not None
        # LayerNorm's sums are rounded, the same way in both.
        assert torch.equal(value.grad, parameter.grad.flatten()[[1, 4]])  # pyright: ignore


def test_parents_that_read_a_parameter_read_the_values() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(D, 2).double()
    plain, x = copy.deepcopy(attention), noise(3, 2, D).double()
    values = tune(attention, [0, 17, 40], "in_proj_weight")
    with torch.no_grad():
        values.add_(1)
        plain.in_proj_weight.view(-1)[[0, 17, 40]] += 1
    for module in (attention, plain):
        module(x, x, x)[0].square().sum().backward()
    assert values.grad is not None and plain.in_proj_weight.grad is not None
    assert torch.equal(values.grad, plain.in_proj_weight.grad.flatten()[[0, 17, 40]])


def test_the_inference_path_of_torchs_encoder_has_the_values() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 8, batch_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 1).eval()
    plain, x = copy.deepcopy(encoder), noise(2, 3, D)
    for model, name in ((encoder, "linear1"), (plain, "linear1")):
        linear: Any = model.layers[0].get_submodule(name)
        with torch.no_grad():
            if model is encoder:
                tune(linear, [0, 9]).add_(1)
            else:
                linear.weight.view(-1)[[0, 9]] += 1
    with torch.no_grad():
        assert torch.equal(encoder(x), plain(x))


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
    "masked adamw": lambda p: MaskedAdamW(p, lr=0.1, weight_decay=0.3),
    "masked sgd": lambda p: MaskedSGD(p, lr=0.1, momentum=0.9, weight_decay=0.3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_values_are_trained_as_within_the_weight_and_the_rest_stays(make: Any) -> None:
    torch.manual_seed(0)
    tuned = nn.Linear(I, O, bias=False).double()
    plain = copy.deepcopy(tuned)
    start, values = tuned.weight.detach().clone(), tune(tuned)
    optimizers = [make(tuned.parameters()), make(plain.parameters())]
    inside = torch.zeros(O * I, dtype=torch.bool).index_fill_(0, torch.tensor(INDEX), True)
    for step in range(4):
        x = noise(5, I, seed=step).double()
        for module, optimizer in zip((tuned, plain), optimizers, strict=True):
            module(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        # Elements do not see one another in these optimizers; gradients do, through the forward.
        with torch.no_grad():
            plain.weight.view(-1)[~inside] = start.view(-1)[~inside]
    weight = tuned.state_dict()["weight"]
    assert torch.equal(weight.view(-1)[~inside], start.view(-1)[~inside])
    assert (weight.view(-1)[inside] != start.view(-1)[inside]).all()
    # Sums of the gradient in another order.
    torch.testing.assert_close(weight, plain.weight.detach(), rtol=1e-10, atol=1e-12)
    state = [t for s in optimizers[0].state.values() for t in s.values() if isinstance(t, Tensor)]
    assert state and all(t.numel() in (1, len(INDEX)) for t in state)
    assert values.shape == (len(INDEX),)


def test_positions_take_four_bytes_where_they_fit() -> None:
    layer = nn.Linear(I, O)
    tune(layer)
    assert tuned_index((layer, "weight")).dtype == torch.int32
    for rows, dtype in ((2**15, torch.int32), (2**15 + 1, torch.int64)):
        large = nn.Linear(2**16 - 1, rows, bias=False, device="meta")
        tune(large)
        assert tuned_index((large, "weight")).dtype == dtype


def test_it_is_the_same_object_with_its_hooks() -> None:
    layer, called = nn.Linear(I, O).eval(), []
    layer.register_forward_hook(lambda *_: called.append(1))
    tune(layer)
    layer(noise(2, I))
    assert called == [1] and isinstance(layer, nn.Linear | SparselyTuned) and not layer.training
    assert repr(layer) == f"SparselyTunedLinear(in_features={I}, out_features={O}, bias=True)"


def test_tied_modules_share_the_values() -> None:
    model = Tied().double()
    plain = copy.deepcopy(model)
    places: Any = [(model.embedding, "weight"), (model.output, "weight")]
    values = tune_elements(places, pk.Packed([0, 5, 19]))
    assert list(model.parameters()) == [values]
    for module in (model, plain):
        module(TOKENS).square().sum().backward()
    assert values.grad is not None and plain.embedding.weight.grad is not None
    torch.testing.assert_close(values.grad, plain.embedding.weight.grad.flatten()[[0, 5, 19]])
    extracted: Any = SubNetwork.full(model).extract()
    assert type(extracted.embedding) is nn.Embedding and type(extracted.output) is nn.Linear
    assert extracted.embedding.weight is extracted.output.weight
    assert torch.equal(extracted(TOKENS), plain(TOKENS))


def test_a_module_may_run_twice_before_a_backward() -> None:
    layer = nn.Sequential(nn.Linear(I, I), nn.LayerNorm(I)).double()
    plain = copy.deepcopy(layer)
    values = [tune(layer[0], [3]), tune(layer[1], [2]), tune(layer[1], [2], "bias")]
    x = noise(4, I).double()
    for module in (layer, plain):
        (module(module(x)) + module(x)).square().sum().backward()
    expected = [plain[0].weight.grad, plain[1].weight.grad, plain[1].bias.grad]  # pyright: ignore
    for value, grad, at in zip(values, expected, (3, 2, 2), strict=True):
        torch.testing.assert_close(value.grad, grad.flatten()[[at]])  # pyright: ignore


@pytest.mark.parametrize("name", ["linear", "embedding", "conv"])
def test_a_change_between_forward_and_backward_is_noticed(name: str) -> None:
    make, inputs = CASES[name]
    module = make().double()
    values = tune(module)
    y = module(inputs())
    with torch.no_grad():
        values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_whole_weight_can_have_a_gradient_for_a_while() -> None:
    layer = exact(nn.Linear(I, O))
    plain, values, x = copy.deepcopy(layer), tune(layer), integers(5, I, seed=5)
    with torch.no_grad():
        values.add_(1)
        plain.weight.view(-1)[INDEX] += 1  # pyright: ignore
    weight = tuned_tensor((layer, "weight"))
    weight.requires_grad_()
    (found,) = torch.autograd.grad(layer(x).sum(), weight)
    (expected,) = torch.autograd.grad(plain(x).sum(), plain.weight)  # pyright: ignore
    assert torch.equal(found, expected)
    weight.requires_grad_(False)
    layer(x).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, expected.flatten()[INDEX])


def test_other_elements_take_the_place_of_earlier_ones() -> None:
    layer = nn.Linear(I, O)
    values = tune(layer)
    with torch.no_grad():
        values.add_(1)
    values.grad = torch.ones_like(values)
    trained = layer.state_dict()["weight"].clone()
    assert tune(layer, [1, 2]) is values
    assert values.grad is None and torch.equal(values, trained.view(-1)[[1, 2]])
    assert torch.equal(layer.state_dict()["weight"], trained)
    assert list(layer.state_dict()) == ["bias", "weight_values", "weight", "weight_index"]


# Checkpoints and copies


def test_checkpoints_hold_the_weight_as_trained() -> None:
    layer = nn.Linear(I, O)
    with torch.no_grad():
        tune(layer).add_(1)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state, other = torch.load(buffer, weights_only=True), nn.Linear(I, O)
    tune(other, range(len(INDEX)))
    other.load_state_dict(state)
    assert_equal(snapshot(other), snapshot(layer))
    assert torch.equal(other(noise(3, I)), layer(noise(3, I)))


def test_a_plain_modules_checkpoint_loads() -> None:
    layer, plain = nn.Linear(I, O), nn.Linear(I, O)
    tune(layer)
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["weight_values", "weight_index"]
    assert torch.equal(layer(noise(3, I)), plain(noise(3, I)))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_their_own_values(twin: Callable[[Any], Any]) -> None:
    layer, x = nn.Linear(I, O), noise(3, I)
    tune(layer)
    other = twin(layer)
    assert type(other) is type(layer) and torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight_values.add_(1)
    assert not torch.equal(other(x), layer(x))


# In sub-networks


@pytest.mark.parametrize("mask", [None, pk.Full(), pk.Packed([1, 5]), pk.Prefix(4)], ids=str)
@pytest.mark.parametrize("name", ["linear", "embedding", "conv"])
def test_a_sub_network_has_some_of_the_values(name: str, mask: pk.Mask | None) -> None:
    make, inputs = CASES[name]
    plain, x = exact(make()), inputs()
    module = copy.deepcopy(plain)
    values = tune(module)
    subnet = SubNetwork(module, {"weight_values": mask}, name="part")
    inside = torch.zeros(len(INDEX)).bool() if mask is None else mask.dense((len(INDEX),))
    weight: Any = plain.weight
    with torch.no_grad():
        weight.view(-1)[INDEX] *= inside
    expected = plain(x)
    expected.backward(integers(*expected.shape, seed=99))
    with subnet.activate():
        y = module(x)
        if mask is not None:
            y.backward(integers(*y.shape, seed=99))
    assert torch.equal(y, expected)
    if mask is not None:
        assert values.grad is not None
        assert torch.equal(values.grad, weight.grad.flatten()[INDEX] * inside)
    extracted = subnet.extract()
    assert type(extracted) in (nn.Linear, nn.Embedding, nn.Conv2d)
    assert_equal(snapshot(extracted), snapshot(plain))
    assert extracted.weight.requires_grad == (mask is not None)  # pyright: ignore
    assert torch.equal(extracted(x), expected)


def test_an_extracted_module_can_be_a_view() -> None:
    layer = nn.Linear(I, O)
    with torch.no_grad():
        tune(layer).add_(1)
    shared: Any = SubNetwork.full(layer).extract(share=True)
    weight = tuned_tensor((layer, "weight"))
    assert type(shared) is nn.Linear and shared.weight.data_ptr() == weight.data_ptr()
    assert shared.bias.data_ptr() == layer.bias.data_ptr()
    with pytest.raises(ValueError, match="share=True"):
        SubNetwork(layer, {"weight_values": pk.Packed([1])}, name="x").extract(share=True)


def test_frozen_parameters_stay_frozen() -> None:
    layer = nn.Linear(I, O)
    layer.bias.requires_grad_(False)
    tune(layer)
    with SubNetwork(layer, {"bias": None}, name="x").activate():
        assert torch.equal(layer(noise(3, I)), F.linear(noise(3, I), layer.weight))
    layer(noise(3, I)).sum().backward()
    assert layer.bias.grad is None


# What runs it


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["linear", "embedding", "conv"])
def test_it_compiles_into_one_graph(name: str) -> None:
    torch._dynamo.reset()
    make, inputs = CASES[name]
    module, x = exact(make()), inputs()
    values = tune(module)
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        values.add_(1)
    expected = module(x)
    expected.sum().backward()
    grad, values.grad = values.grad, None
    found = compiled(x)
    found.sum().backward()
    assert torch.equal(found, expected) and torch.equal(values.grad, grad)  # pyright: ignore


def test_autocast_is_the_plain_modules() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(I, O), noise(5, I).requires_grad_()
    plain = copy.deepcopy(layer)
    values = tune(layer)
    grads: list[Tensor] = []
    for module in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        grads += torch.autograd.grad(y.float().square().sum(), [x, module.bias])
        grads.append(y)
    assert all(torch.equal(a, b) for a, b in zip(grads[:3], grads[3:], strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert values.grad is not None and values.grad.dtype == torch.float32


def test_two_derivatives_are_refused() -> None:
    layer, x = nn.Linear(I, O), noise(3, I).requires_grad_()
    tune(layer)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    "module",
    [nn.LSTM(2, 2), LFCLinear(I, O, rank=2), SwitchNorm(3), nn.Embedding(V, D, max_norm=1.0)],
    ids=lambda m: type(m).__name__,
)
def test_what_cannot_be_tuned(module: nn.Module) -> None:
    assert not can_be_tuned(module)
    name = next(name for name, _ in module.named_parameters())
    with pytest.raises(TypeError, match=f"a {type(module).__name__} cannot train some elements"):
        tune(module, [0], name)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="Packed index must be < 48, got 48"):
        tune(nn.Linear(I, O), [48])
    places: Any = [(nn.Linear(I, O), "weight"), (nn.Linear(I, O), "weight")]
    with pytest.raises(ValueError, match="the modules must share one parameter, weight"):
        tune_elements(places, pk.Packed([1]))
    with pytest.raises(ValueError, match="the modules must share one parameter, bias"):
        tune(nn.Linear(I, O, bias=False), [0], "bias")


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_the_gradients_op_takes_positions_of_four_bytes(impl: str) -> None:
    if impl not in {backend.name for backend in DVALUES.backends}:
        pytest.skip("there is no compiled library")
    dy, x, index = noise(70, O), noise(70, I, seed=1), torch.tensor(INDEX)
    wide = DVALUES(dy, x, torch.zeros(len(INDEX)), index, impl)
    assert torch.equal(DVALUES(dy, x, torch.zeros(len(INDEX)), index.int(), impl), wide)
    assert wide.all()

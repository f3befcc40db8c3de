"""Dropout's steps: what is computed, updated and paid for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from maskedtrain import SubNetwork, SwitchNorm
from maskedtrain.methods import ElementDropout, Method, NeuronDropout, Standard
from maskedtrain.models import MLP, Transformer, resnet8
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.theory.criteria import measure_plan
from tests.train.toolbox import assert_equal, gradients, noise, snapshot

BATCH = 8
KINDS: list[type[NeuronDropout | ElementDropout]] = [NeuronDropout, ElementDropout]


def mlp() -> Any:
    torch.manual_seed(0)
    return MLP(12, (40, 20), 4)


def resnet(width: int = 8) -> Any:
    torch.manual_seed(0)
    return resnet8(width=width, num_classes=4)


def transformer(ffn: int = 8) -> Any:
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    sizes = {"d_model": 8, "heads": 2, "ffn": ffn, "dropout": 0.0}
    return Transformer(9, 9, tie_output=False, **sizes, **layers)


MODELS: dict[str, Callable[[], Any]] = {"mlp": mlp, "resnet": resnet, "transformer": transformer}


def inputs_of(model: nn.Module, seed: int = 0) -> tuple[Tensor, ...]:
    if isinstance(model, Transformer):
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(1, 9, (BATCH, n), generator=generator) for n in (5, 6))
    shape = (12,) if isinstance(model, MLP) else (3, 8, 8)
    return (noise(BATCH, *shape, seed=seed).to(next(model.parameters()).dtype),)


def loss_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    inputs = inputs_of(model, seed)
    return lambda: cross_entropy(model(*inputs))


def cross_entropy(logits: Tensor) -> Tensor:
    rows = logits.flatten(0, -2)
    return F.cross_entropy(rows, torch.arange(len(rows)) % 4)


def dense_masks(model: nn.Module, subnet: SubNetwork) -> dict[str, Tensor]:
    """By name, True inside."""
    masks = {name: subnet.mask_of(p) for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return {name: mask.dense(shapes[name]) for name, mask in masks.items() if mask is not None}


# What a step computes


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("count", ["exact", "bernoulli"])
def test_it_is_dropout_of_the_same_neurons_for_every_example(count: Any, rescale: bool) -> None:
    """Against zeroed activations, as ``nn.Dropout`` has them."""
    model = mlp().double()
    # 16 of 40 and 16 of 20 where the numbers are exact.
    factors = {"exact": (40 / 16, 20 / 16), "bernoulli": (1 / 0.4, 1 / 0.4)}[count]
    method = NeuronDropout(
        model, 0.4 if count == "bernoulli" else 0.5, count=count, rescale=rescale
    )
    plan = method.plan(1)
    assert plan.lr_scale == 1.0
    losses = plan.backward(loss_of(model))
    found = gradients(model)

    (x,) = inputs_of(model)
    kept = [dense_masks(model, plan.update)[f"hidden.{i}.bias"] for i in (0, 1)]
    model.zero_grad()
    for layer, stays, factor in zip(model.hidden, kept, factors, strict=True):
        assert 0 < stays.sum() < len(stays)
        x = F.relu(layer(x)) * stays * (factor if rescale else 1.0)
    expected = cross_entropy(model.output(x))
    expected.backward()
    # Of sums of at most 40 terms in fp64.
    close = {"rtol": 1e-12, "atol": 1e-14}
    assert list(losses) == ["dropout"]
    torch.testing.assert_close(losses["dropout"], expected.detach(), **close)
    torch.testing.assert_close(found, gradients(model), **close)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_model_with_zeros(name: str, kind: Any, rescale: bool) -> None:
    """With p x in the place of x, and weights scaled where their inputs were."""
    model = MODELS[name]().double()
    method = kind(model, 0.5, rescale=rescale)
    plan = method.plan(3)
    masks = dense_masks(model, plan.update)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    point = {
        n: x * masks[n] * (factor_of(plan.update.masks[n], x) if rescale else 1.0)
        for n, x in leaves.items()
    }
    state = {n: buffer.clone() for n, buffer in model.named_buffers()}
    expected = cross_entropy(
        torch.func.functional_call(model, {**point, **state}, inputs_of(model))
    )
    expected.backward()

    losses = plan.backward(loss_of(model))
    # Values near 1 and gradients of tens of layers' sums in fp64.
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(losses["dropout"], expected.detach(), **close)
    dropped = 0
    for n, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, leaves[n].grad, **close)
        assert gradient[~masks[n]].count_nonzero() == 0
        # Keys have no bias: attention does not depend on it.
        assert gradient[masks[n]].any() or n.endswith("k_proj.bias"), n
        dropped += int((~masks[n]).sum())
    assert dropped > 0.2 * sum(p.numel() for p in model.parameters()) or name == "transformer"


def factor_of(mask: Any, weight: Tensor) -> float:
    """By what rescaling multiplies a weight of this mask."""
    if isinstance(mask, pk.Element):
        return 2.0
    cols = mask.cols if isinstance(mask, pk.Index) else None
    return 1.0 if cols is None else weight.shape[1] / len(cols)


@pytest.mark.parametrize("kind", KINDS)
def test_to_keep_all_is_standard_training(kind: Any) -> None:
    ends: list[dict[str, Tensor]] = []
    for make in (lambda m: kind(m, 1.0), lambda m: Standard(SubNetwork.full(m))):
        model = mlp()
        train(model, make(model), MaskedSGD(model.parameters(), lr=0.1, momentum=0.9), 3)
        ends.append(snapshot(model))
    assert_equal(*ends)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_pass_the_model_is_whole(kind: Any) -> None:
    model = mlp()
    method, (x,) = kind(model, 0.5), inputs_of(model)
    before, seen = model(x), []

    def failing() -> Tensor:
        seen.append(model(x))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        method.plan(0).backward(failing)
    assert not torch.equal(seen[0], before)
    assert torch.equal(model(x), before)


# What a step leaves alone


def train(model: nn.Module, method: Method, optimizer: Any, steps: int) -> None:
    """A stock loop."""
    for step in range(steps):
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: MaskedSGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: MaskedAdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_what_was_dropped_is_bitwise_unchanged(name: str, kind: Any, optimizer: str) -> None:
    model = MODELS[name]()
    method, stepping = kind(model, 0.5), OPTIMIZERS[optimizer](model.parameters())

    def held() -> dict[tuple[str, str], Tensor]:
        """Parameters and the optimizer's tensors, by the parameter's name."""
        found = {(n, "value"): p.detach().clone() for n, p in model.named_parameters()}
        for n, parameter in model.named_parameters():
            for key, tensor in stepping.state.get(parameter, {}).items():
                if isinstance(tensor, Tensor):
                    found[n, key] = tensor.clone()
        return found

    for step in range(4):
        before, plan = held(), method.plan(step)
        plan.backward(loss_of(model, step))
        stepping.step(plan.update)
        stepping.zero_grad()
        masks = dense_masks(model, plan.update)
        for (n, key), tensor in held().items():
            earlier = before.get((n, key), torch.zeros_like(tensor))
            assert torch.equal(tensor[~masks[n]], earlier[~masks[n]]), (n, key)
            assert (tensor != earlier)[masks[n]].float().mean() > 0.5, (n, key)


def test_of_batch_norms_the_drawn_channels_alone_move() -> None:
    model = resnet()
    plan = NeuronDropout(model, 0.5).plan(0)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, SwitchNorm)}
    before = snapshot(model)
    plan.backward(loss_of(model))
    after, masks = snapshot(model), dense_masks(model, plan.update)
    for name in norms:
        drawn = masks[f"{name}.weight"]
        assert 0 < drawn.sum() < len(drawn)
        for statistic in ("running_mean", "running_var"):
            key = f"{name}.{statistic}"
            assert torch.equal(before[key] != after[key], drawn)
        assert after[f"{name}.num_batches_tracked"] == 1


# What a step costs


def flops(model: nn.Module, method: Method) -> int:
    """Counted by torch, of a forward and backward pass."""
    # torch counts nothing of attention's fused kernel on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method.plan(0).backward(loss_of(model))
    return counter.get_total_flops()


def dense_flops(model: nn.Module) -> int:
    return flops(model, Standard(SubNetwork.full(model)))


@pytest.mark.parametrize(
    ("make", "narrow", "share"),
    [
        (lambda: MLP(12, (256, 256), 4), lambda: MLP(12, (128, 128), 4), 0.27),
        (lambda: resnet(width=32), lambda: resnet(width=16), 0.26),
        # Attention is whole.
        (lambda: transformer(ffn=512), lambda: transformer(ffn=256), 0.54),
    ],
    ids=MODELS,
)
def test_a_step_costs_a_network_of_so_many_neurons(
    make: Callable[[], Any], narrow: Callable[[], Any], share: float
) -> None:
    model = make()
    expected = dense_flops(narrow())
    assert expected < share * dense_flops(model)
    assert flops(model, NeuronDropout(model, 0.5)) == expected
    assert flops(model, NeuronDropout(model, 0.5, rescale=False)) == expected
    # What a run is charged for.
    networks = NeuronDropout(model, 0.5, count="bernoulli").networks
    assert list(networks) == ["full", "dropout"]
    assert networks["dropout"].flops(*inputs_of(model), training=True) == expected


def test_elements_save_no_compute() -> None:
    model = mlp()
    method, dense = ElementDropout(model, 0.1), dense_flops(model)
    assert flops(model, method) == dense
    assert list(method.networks) == ["full", "dropout"]
    assert method.networks["dropout"].flops(*inputs_of(model), training=True) == dense


# Dynamo makes instances of autograd.Function, against torch's advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("rescale", [True, False])
def test_elements_are_compiled_once(rescale: bool) -> None:
    torch._dynamo.reset()
    model = mlp()
    method = ElementDropout(model, 0.5, rescale=rescale)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for step in range(3):
        plan, (x,) = method.plan(step), inputs_of(model, step)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            losses = plan.backward(lambda x=x: cross_entropy(compiled(x)))
        assert torch.equal(losses["dropout"], plan.backward(loss_of(model, step))["dropout"])


# What is drawn from


def test_patterns_of_widths() -> None:
    model = resnet(width=32)
    drawn = NeuronDropout(model, 0.5, widths=["*.conv*"]).plan(0).update
    cut = {n for n, mask in drawn.masks.items() if isinstance(mask, pk.Index)}
    blocks = [f"layer{i}.0" for i in (1, 2, 3)]
    inner = ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight")
    assert cut == {f"{block}.{name}" for block in blocks for name in inner}
    channels: Any = drawn.masks["layer1.0.bn1.weight"]
    assert drawn.masks["layer1.0.conv2.weight"] == pk.Index(None, channels.rows)


def test_patterns_of_weights() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    for patterns, expected in ((["*"], ["0.weight", "3.weight"]), (["3.*"], ["3.weight"])):
        drawn = ElementDropout(model, 0.5, weights=patterns).plan(0).update
        assert [n for n, m in drawn.masks.items() if isinstance(m, pk.Element)] == expected


def test_tied_weights_are_drawn_once() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()).double()
    model[2].weight = model[0].weight
    plan = ElementDropout(model, 0.5).plan(0)
    mask = plan.update.masks["0.weight"]
    assert isinstance(mask, pk.Element) and plan.update.masks["2.weight"] is mask
    x = noise(BATCH, 4).double()
    losses = plan.backward(lambda: model(x).square().sum())
    weight = model[0].weight.detach().clone().requires_grad_()
    y = x
    for layer in (model[0], model[2]):
        y = F.linear(y, 2 * mask.mask * weight, layer.bias).tanh()
    y.square().sum().backward()
    # Of sums of four terms in fp64.
    torch.testing.assert_close(losses["dropout"], y.square().sum().detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model[0].weight.grad, weight.grad, rtol=1e-12, atol=1e-14)


def test_the_perturbation_is_what_was_dropped() -> None:
    model = mlp()
    for rescale in (True, False):
        plan = NeuronDropout(model, 0.5, rescale=rescale).plan(0)
        measured = measure_plan(model, plan, loss_of(model))["dropout"].whole
        masks = dense_masks(model, plan.update)
        away = sum(
            float(p.detach()[~masks[n]].double().square().sum())
            for n, p in model.named_parameters()
        )
        assert measured.displacement_sq == pytest.approx(away, rel=1e-6)
        assert measured.c_norm > 1

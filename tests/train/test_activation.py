"""``SubNetwork.activate``: zeros in plain modules, nesting, exceptions, torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import MaskedLinear, SubNetwork, SwitchNorm
from partial_kernels._core.testing import assert_zero_outside
from tests.train.toolbox import assert_equal, element, gradients, noise, snapshot

Masks = dict[str, pk.Mask | None]


TOKENS = torch.tensor([[0, 3], [4, 1]])


# Zeros in plain modules


class Attention(nn.MultiheadAttention):
    """Reads its child's parameters itself, so that the child's forward is never called."""

    def __init__(self) -> None:
        super().__init__(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, x, x, need_weights=False)[0]


PLAIN: dict[str, tuple[Callable[[], nn.Module], Tensor, Masks]] = {
    "linear": (lambda: nn.Linear(4, 3), noise(2, 4), {"weight": element(3, 4), "bias": None}),
    "packed": (
        lambda: nn.Linear(4, 3),
        noise(2, 4),
        {"weight": pk.Packed([1, 2, 7]), "bias": element(3)},
    ),
    "block": (
        lambda: nn.Linear(4, 3),
        noise(2, 4),
        {"weight": pk.Block(torch.tensor([[True, False], [False, True]]), 2)},
    ),
    "conv": (
        lambda: nn.Conv2d(2, 3, 2),
        noise(2, 2, 4, 4),
        {"weight": element(3, 2, 2, 2), "bias": element(3)},
    ),
    "embedding": (lambda: nn.Embedding(5, 4), TOKENS, {"weight": element(5, 4)}),
    "layer-norm": (lambda: nn.LayerNorm(4), noise(2, 4), {"weight": element(4), "bias": None}),
    "batch-norm": (lambda: nn.BatchNorm1d(4), noise(6, 4), {"weight": element(4)}),
    "attention": (
        Attention,
        noise(2, 3, 4),
        {"in_proj_weight": element(12, 4), "out_proj.weight": element(4, 4), "out_proj.bias": None},
    ),
}


@pytest.fixture(params=PLAIN)
def plain(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Masks]:
    make, x, masks = PLAIN[request.param]
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed))
    return nn.Sequential(module), x, {f"0.{name}": mask for name, mask in masks.items()}


def expected_plain(model: nn.Module, x: Tensor, masks: Masks) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients with zeros in a copy's parameters."""
    zeros = copy.deepcopy(model)
    for name, mask in masks.items():
        parameter = zeros.get_parameter(name)
        parameter.data *= 0 if mask is None else mask.dense(parameter.shape)
    y = zeros(x)
    (y * torch.ones_like(y).cumsum(-1)).sum().backward()
    return y.detach(), gradients(zeros)


def test_plain_modules_compute_with_zeros(plain: tuple[nn.Module, Tensor, Masks]) -> None:
    model, x, masks = plain
    model.eval()
    part = SubNetwork(model, masks, name="part")
    expected, expected_grads = expected_plain(model, x, masks)
    parameters, state = dict(model.named_parameters()), snapshot(model)
    whole = model(x).detach()
    assert not torch.equal(whole, expected)
    with part.activate():
        # A forward and backward each, then two forwards at once: no graph is used up.
        for forwards in (1, 1, 2):
            model.zero_grad()
            for y in [model(x) for _ in range(forwards)]:
                assert torch.equal(y, expected)
                (y * torch.ones_like(y).cumsum(-1)).sum().backward()
            for name, parameter in model.named_parameters():
                assert parameter is parameters[name]
                mask = masks.get(name, pk.Full())
                if mask is None:
                    assert parameter.grad is None
                else:
                    assert parameter.grad is not None
                    assert_zero_outside(parameter.grad, mask.dense(parameter.shape), what=name)
                    inside = expected_grads[name] * mask.dense(parameter.shape)
                    assert torch.equal(parameter.grad, inside * forwards), name
        last = model(x)
    assert torch.equal(model(x), whole)
    # Backward may come after.
    model.zero_grad()
    last.sum().backward()
    for name, mask in masks.items():
        if mask is not None:
            grad = parameters[name].grad
            assert grad is not None
            assert not grad[~mask.dense(grad.shape)].any()
    assert_equal(snapshot(model), state)
    assert torch.equal(part.extract()(x), expected)


def test_a_plain_module_wholly_outside_counts_as_zero() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    part = SubNetwork(model, {"0.weight": None}, name="part")
    with part.activate():
        y = model(TOKENS)
    bias = model.get_parameter("1.bias")
    assert torch.equal(y, bias.expand(2, 2, 3)) and part.numel() == 4 * 3 + 3
    y.sum().backward()
    assert set(gradients(model)) == {"1.weight", "1.bias"}
    assert torch.equal(part.extract()(TOKENS), y)


def test_state_and_substituted_parameters_of_active_plain_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    mask = element(3, 4)
    part = SubNetwork(model, {"0.weight": mask}, name="part")
    x, state = noise(2, 4), snapshot(model)
    other = {name: noise(*tensor.shape, seed=5) for name, tensor in state.items()}
    with part.activate():
        assert_equal(snapshot(model), state)
        y = torch.func.functional_call(model, other, (x,))
        model.load_state_dict(other)
        assert torch.equal(model(x), y)
    assert torch.equal(y, F.linear(x, other["0.weight"] * mask.mask, other["0.bias"]))
    assert_equal(snapshot(model), other)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_plain_modules_follow_the_activation() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    subnets = [
        SubNetwork.full(model),
        SubNetwork(model, {"0.weight": element(4, 4)}, name="part"),
        SubNetwork(model, {"0.weight": None, "2.bias": None}, name="none"),
    ]
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = noise(3, 4)
    seen: list[int] = []
    for _ in range(3):
        for subnet in subnets:
            with subnet.activate():
                assert torch.equal(compiled(x), model(x))
        seen.append(len(graphs))
    assert seen == [3, 3, 3]
    torch._dynamo.reset()


@pytest.mark.parametrize("mask", [pk.Prefix(2), pk.Index([0, 2])], ids=repr)
def test_compact_masks_need_aware_modules(mask: pk.Mask) -> None:
    model = nn.Sequential(MaskedLinear(4, 4), nn.Linear(4, 3))
    # As a mask of updates alone it is welcome.
    part = SubNetwork(model, {"1.bias": mask}, name="part")
    assert part.numel() == 4 * 5 + 3 * 4 + 2
    for use in (part.activate().__enter__, part.extract):
        with pytest.raises(TypeError, match=r"Linear\.bias has the compact mask .*Element"):
            use()
    assert model[0].active is None
    whole = SubNetwork(model, {"1.bias": pk.Prefix(3), "1.weight": pk.Prefix(3, 4)}, name="whole")
    x = noise(2, 4)
    with whole.activate():
        assert torch.equal(model(x), model[1](model[0](x)))


def test_recurrent_modules_keep_no_masks() -> None:
    model = nn.LSTM(3, 2)
    part = SubNetwork(model, {"weight_hh_l0": element(8, 2)}, name="part")
    with pytest.raises(TypeError, match="LSTM keeps its weights in a list"):
        part.activate().__enter__()
    with SubNetwork.full(model).activate():
        model(noise(2, 1, 3))
    extracted: Any = part.extract()
    assert torch.equal(extracted.weight_hh_l0 != 0, element(8, 2).mask)


# Nesting and exceptions


def mixed() -> tuple[nn.Sequential, dict[str, SubNetwork]]:
    """Aware and plain modules, and sub-networks that mask different parts of both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), MaskedLinear(6, 8), SwitchNormOf1d(8), nn.Linear(8, 2))
    subnets = {
        "full": SubNetwork.full(model),
        "first": SubNetwork(
            model, {"0.weight": element(6, 6), "1.weight": element(8, 6)}, name="a"
        ),
        "second": SubNetwork(model, {"0.bias": None, "3.weight": element(2, 8)}, name="b"),
    }
    return model, subnets


class SwitchNormOf1d(SwitchNorm):
    """Over features of ``[B, C]``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input[..., None, None])[..., 0, 0]


def test_the_innermost_activation_counts_and_all_is_restored() -> None:
    model, subnets = mixed()
    model.eval()
    x, parameters, classes = noise(3, 6), dict(model.named_parameters()), list(map(type, model))
    attributes = [set(vars(module)) for module in model]
    alone: dict[str, Tensor] = {}
    for name, subnet in subnets.items():
        with subnet.activate() as entered:
            assert entered is subnet
            alone[name] = model(x)
    assert len({tuple(y.flatten().tolist()) for y in alone.values()}) == 3
    for outer in subnets:
        for inner in subnets:
            with subnets[outer].activate():
                assert torch.equal(model(x), alone[outer])
                with subnets[inner].activate():
                    assert torch.equal(model(x), alone[inner])
                    with subnets["full"].activate():
                        assert torch.equal(model(x), alone["full"])
                    assert torch.equal(model(x), alone[inner])
                assert torch.equal(model(x), alone[outer])
            assert torch.equal(model(x), alone["full"])
    assert dict(model.named_parameters()) == parameters
    assert list(map(type, model)) == classes
    assert all(module.active is None for module in model if isinstance(module, MaskedLinear))
    # "active" itself stays as an attribute of the aware ones.
    assert [set(vars(m)) - {"active"} for m in model] == attributes


@pytest.mark.parametrize("inside", [False, True], ids=["in-the-body", "in-a-forward"])
def test_an_exception_restores_the_outer_activation(inside: bool) -> None:
    model, subnets = mixed()
    model.eval()
    x = noise(3, 6)
    whole = model(x)
    with subnets["first"].activate():
        y = model(x)
        with pytest.raises((RuntimeError, KeyError)), subnets["second"].activate():
            model(noise(3, 5)) if inside else {}["nothing"]
        assert torch.equal(model(x), y)
    assert torch.equal(model(x), whole)


def test_extract_within_an_activation_is_plain() -> None:
    model, subnets = mixed()
    model.eval()
    x = noise(3, 6)
    with subnets["first"].activate():
        extracted: Any = subnets["second"].extract()
        first = model(x)
    with subnets["second"].activate():
        expected = model(x)
    assert [type(module) for module in extracted.children()] == [
        nn.Linear,
        nn.Linear,
        nn.BatchNorm2d,
        nn.Linear,
    ]
    images = extracted[1](extracted[0](x))[..., None, None]
    found = extracted[3](extracted[2](images)[..., 0, 0])
    assert torch.equal(found, expected) and not torch.equal(first, expected)

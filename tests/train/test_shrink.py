"""``take_neurons``: what is left computes what it did, and everything that knew it follows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from maskedtrain import SubNetwork, TopKLinear
from maskedtrain.models import MLP, Transformer, resnet8
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.shrink import check_widths, take_neurons
from tests.train.toolbox import active_results, assert_equal, integers, noise, results, snapshot

# Of 9 and 7 neurons.
KEPT = {"hidden.0": torch.tensor([0, 2, 3, 5, 8]), "hidden.1": torch.tensor([1, 2, 6])}


def mlp() -> Any:
    """An MLP of small integers, whose sums are exact in any order."""
    model = MLP(4, (9, 7), 3).double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed))
    return model


def parts(name: str, kept: dict[str, Tensor] = KEPT) -> pk.Index:
    """What is left of a parameter of the MLP."""
    rows = kept.get(name.rpartition(".")[0])
    cols = {"hidden.1.weight": "hidden.0", "output.weight": "hidden.1"}.get(name)
    return pk.Index(rows, None if cols is None else kept.get(cols))


def zeroed(model: Any, kept: dict[str, Tensor] = KEPT) -> Any:
    """The same, with the columns zero that take the neurons that go."""
    model = copy.deepcopy(model)
    for width, layer in (("hidden.0", model.hidden[1]), ("hidden.1", model.output)):
        gone = torch.ones(layer.in_features).bool()
        gone[kept.get(width, slice(None))] = False
        with torch.no_grad():
            layer.weight[:, gone] = 0
    return model


@pytest.mark.parametrize("widths", [["hidden.0"], ["hidden.1"], ["hidden.0", "hidden.1"]])
def test_outputs_are_those_with_the_outgoing_weights_zero(widths: list[str]) -> None:
    model, kept = mlp(), {width: KEPT[width] for width in widths}
    expected, x = zeroed(model, kept), integers(6, 4, seed=50)
    take_neurons(model, kept)
    found, wanted = results(model, x), results(expected, x)
    assert found["y"].any() and found["x"].any()
    for name, value in found.items():
        whole = wanted[name]
        assert torch.equal(
            value, whole if name in ("x", "y") else parts(name, kept).restrict(whole)
        )


def test_parameters_are_fewer_and_the_same_objects() -> None:
    model = mlp()
    before, seen = dict(model.named_parameters()), []
    model.hidden[0].weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    results(model, integers(6, 4))
    take_neurons(model, KEPT, optimizer)
    assert all(p is before[name] for name, p in model.named_parameters())
    # The last bias is what it was.
    assert all(p.grad is None for p in [*model.parameters()][:-1])
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    assert [(layer.in_features, layer.out_features) for layer in (*model.hidden, model.output)] == [
        (4, 5),
        (5, 3),
        (3, 3),
    ]
    assert sum(p.numel() for p in model.parameters()) == 5 * 5 + 6 * 3 + 4 * 3
    assert SubNetwork.full(model).numel() == 5 * 5 + 6 * 3 + 4 * 3
    with FlopCounterMode(display=False) as counter:
        model(integers(6, 4))
    assert counter.get_total_flops() == 2 * 6 * (4 * 5 + 5 * 3 + 3 * 3)
    results(model, integers(6, 4))
    assert seen == [(9, 4), (5, 4)]


def test_a_graph_of_before_is_in_no_ones_way_and_does_not_run() -> None:
    model, x = mlp(), integers(6, 4)
    used, unused = model(x).sum(), model(x).sum()
    used.backward()
    take_neurons(model, KEPT)
    # The first one is alive still, and with it what accumulated gradients of the former shapes.
    model(x).sum().backward()
    assert model.hidden[0].weight.grad.shape == (5, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        unused.backward()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "masked-sgd": lambda p: MaskedSGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "masked-sgd-plain": lambda p: MaskedSGD(p, 0.1),
    "masked-adamw": lambda p: MaskedAdamW(p, 0.1, weight_decay=0.1),
    "masked-adamw-capturable": lambda p: MaskedAdamW(p, 0.1, capturable=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
}


def step(model: MLP, optimizer: Any, seed: int, subnet: SubNetwork | None, small: bool) -> None:
    """A step by gradients that are drawn for the whole model, of which the small one's are part."""
    whole = {"hidden.0": 9, "hidden.1": 7, "output": 3}
    inputs = {"hidden.0": 4, "hidden.1": 9, "output": 7}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        layer, _, own = name.rpartition(".")
        shape = (whole[layer], inputs[layer]) if own == "weight" else (whole[layer],)
        grad = noise(*shape, seed=10 * seed + i).double()
        parameter.grad = parts(name).restrict(grad) if small else grad
    optimizer.step() if subnet is None else optimizer.step(subnet)


CORES: dict[str, dict[str, pk.Mask | None]] = {
    "prefix": {
        "hidden.0.weight": pk.Prefix(4),
        "hidden.1.weight": pk.Prefix(5, 4),
        "output.weight": pk.Prefix(None, 5),
    },
    "index": {
        "hidden.0.weight": pk.Index([1, 2, 5]),
        "hidden.1.weight": pk.Index(None, [1, 2, 5]),
    },
    "element": {"hidden.1.weight": pk.Element(noise(7, 9) > 0), "hidden.0.bias": pk.Packed([2, 4])},
    "outside": {"hidden.1.bias": None, "hidden.0.weight": pk.Block(noise(9, 4) > 0, 1)},
}


@pytest.mark.parametrize(
    ("name", "core"),
    # Those of torch take no sub-network.
    [(n, c) for n in OPTIMIZERS for c in (None, *CORES) if c is None or n.startswith("masked")],
)
def test_the_optimizer_goes_on_with_what_is_left(name: str, core: str | None) -> None:
    model = mlp()
    whole = copy.deepcopy(model)
    made = [(net, OPTIMIZERS[name](net.parameters())) for net in (model, whole)]
    nets = [None if core is None else SubNetwork(net, CORES[core], name="core") for net, _ in made]
    for seed, narrow in enumerate((True, False, True)):
        for (net, optimizer), subnet in zip(made, nets, strict=True):
            step(net, optimizer, seed, subnet if narrow else None, small=False)
    groups = [[*group["params"]] for group in made[0][1].param_groups]
    take_neurons(model, KEPT, made[0][1])
    for group, params in zip(made[0][1].param_groups, groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], params, strict=True))
    for seed, narrow in enumerate((False, True, True, False), start=3):
        for (net, optimizer), subnet in zip(made, nets, strict=True):
            step(net, optimizer, seed, subnet if narrow else None, small=net is model)
        for name_, parameter in model.named_parameters():
            other = whole.get_parameter(name_)
            assert torch.equal(parameter, parts(name_).restrict(other)), name_
            state, expected = made[0][1].state[parameter], made[1][1].state[other]
            assert state.keys() == expected.keys()
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    assert torch.equal(value, parts(name_).restrict(expected[key])), key


def test_the_state_is_saved_and_loaded_as_ever(assert_identical: Any) -> None:
    model = mlp()
    optimizer = MaskedAdamW(model.parameters())
    core = SubNetwork(model, CORES["prefix"], name="core")
    for seed, subnet in enumerate((core, None)):
        step(model, optimizer, seed, subnet, small=False)
    take_neurons(model, KEPT, optimizer)
    twin = copy.deepcopy(model)
    other = MaskedAdamW(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt, subnet in (
        (model, optimizer, core),
        (twin, other, SubNetwork(twin, core.masks, name="core")),
    ):
        step(net, opt, 5, subnet, small=True)
    assert_equal(snapshot(model), snapshot(twin))
    assert_identical(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("core", ["prefix", "index", "element"])
def test_sub_networks_have_what_is_left_of_their_part(core: str) -> None:
    model, x = mlp(), integers(6, 4, seed=50)
    expected = zeroed(model)
    subnet, wanted = (SubNetwork(net, CORES[core], name="core") for net in (model, expected))
    nested = SubNetwork(nn.Sequential(model), {"0.hidden.0.weight": pk.Prefix(9)}, name="nested")
    take_neurons(model, KEPT)
    with torch.no_grad():
        found = active_results_of(subnet, x)
        assert found.any() and torch.equal(found, active_results_of(wanted, x))
    assert nested.masks["0.hidden.0.weight"] == pk.Prefix(5)
    assert nested.masks["0.hidden.0.bias"] == pk.Prefix(5)
    extracted = subnet.extract()
    assert torch.equal(extracted(x), found)
    if core == "prefix":
        # Of the first 4 and 5 neurons.
        assert subnet.masks["hidden.1.weight"] == pk.Prefix(2, 3)
        assert active_results(subnet, x).keys() >= {"y", "hidden.0.weight"}


def active_results_of(subnet: SubNetwork, x: Tensor) -> Tensor:
    with subnet.activate():
        return subnet.model(x)


def test_a_layer_of_any_linear_kind() -> None:
    model = mlp()
    layer = TopKLinear.from_linear(model.hidden[0], 2)
    model.hidden[0] = layer
    model.output = nn.Linear(7, 3, bias=False).double()
    take_neurons(model, KEPT)
    assert layer.weight.shape == (5, 4) and model.output.weight.shape == (3, 3)
    assert results(model, integers(6, 4))["hidden.0.weight"].shape == (5, 4)


def test_feed_forward_layers_of_a_transformer() -> None:
    torch.manual_seed(0)
    model = Transformer(20, 20, d_model=8, heads=2, ffn=6, encoder_layers=1, decoder_layers=1)
    model.double().eval()
    widths = ["encoder.layers.0.fc1", "decoder.layers.0.fc1"]
    assert [*check_widths(model, widths).values()] == [model.get_submodule(w) for w in widths]
    kept = torch.tensor([0, 4])
    expected = copy.deepcopy(model)
    for width in widths:
        with torch.no_grad():
            expected.get_parameter(f"{width[:-1]}2.weight")[:, [1, 2, 3, 5]] = 0
    take_neurons(model, dict.fromkeys(widths, kept))
    tokens = torch.tensor([[4, 5, 6, 2]]), torch.tensor([[1, 7, 8]])
    # Sums of six terms and of two of them: a rounding or two of fp64.
    torch.testing.assert_close(model(*tokens), expected(*tokens), rtol=1e-12, atol=1e-12)


def test_new_neurons_are_zeros() -> None:
    model, x = mlp(), integers(6, 4, seed=50)
    before = copy.deepcopy(model)
    take_neurons(model, {"hidden.0": torch.tensor([0, 2])})
    y = model(x)
    take_neurons(model, {"hidden.0": torch.tensor([-1, 0, -1, -1, 1])})
    assert model.hidden[0].out_features == model.hidden[1].in_features == 5
    assert torch.equal(model(x), y)
    kept = before.hidden[0].weight[[0, 2]]
    assert torch.equal(model.hidden[0].weight[[1, 4]], kept)
    assert not model.hidden[0].weight[[0, 2, 3]].any()
    assert not model.hidden[1].weight[:, [0, 2, 3]].any()
    assert not model.hidden[0].bias[[0, 2, 3]].any()


class Normed(MLP):
    """A layer norm over the first width."""

    def __init__(self) -> None:
        super().__init__(4, (9, 7), 3)
        self.norm = nn.LayerNorm(9)

    def width_masks(self, kept: Any) -> Any:
        masks = super().width_masks(kept)
        rows = kept("hidden.0", 9)
        return {**masks, "norm.weight": pk.Index(rows), "norm.bias": pk.Index(rows)}


def tied() -> MLP:
    model = MLP(9, (9, 9), 9)
    model.hidden[1].weight = model.output.weight
    return model


@pytest.mark.parametrize(
    ("make", "kept", "kind", "message"),
    [
        (lambda: nn.Linear(3, 3), {"a": [0]}, TypeError, "Linear has no width_masks"),
        (mlp, {"hiden.0": [0]}, ValueError, r"did you mean hidden\.0\?"),
        (mlp, {"hidden.0": [0, 9]}, ValueError, "hidden.0 has 9 neurons: Index rows must be < 9"),
        (mlp, {"hidden.0": [3, 1]}, ValueError, "strictly increasing, got 1 after 3"),
        (mlp, {"hidden.0": []}, ValueError, "hidden.0 must keep at least one neuron"),
        (mlp, {"hidden.0": [-1, 0]}, ValueError, "hidden.0 has 9 neurons: .* >= 0, got -1"),
        (tied, {"hidden.0": [0]}, ValueError, "is tied to a parameter with another mask"),
        (Normed, {"hidden.0": [0]}, TypeError, "plain linear layers, got norm, a .*LayerNorm"),
        (
            lambda: resnet8(width=4),
            {"layer1.0.conv1": [0]},
            TypeError,
            r"neurons of layer1.0.conv1 must be those of plain linear layers, got layer1\.0\.conv1",
        ),
        (
            lambda: Transformer(9, 9, d_model=4, heads=2, ffn=4),
            {"encoder.layers.0.self_attn": [0]},
            TypeError,
            "a neuron of encoder.layers.0.self_attn is more than a row or column of .*q_proj",
        ),
        (
            lambda: Transformer(9, 9, d_model=4, heads=1, ffn=4),
            {"encoder.layers.0.self_attn": [0]},
            TypeError,
            "rows of encoder.*q_proj, encoder.*k_proj, columns of none",
        ),
    ],
)
def test_refusals_change_nothing(
    make: Callable[[], nn.Module], kept: Any, kind: type[Exception], message: str
) -> None:
    model = make()
    before = snapshot(model)
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    # One that could be taken comes first.
    good = {"hidden.1": torch.tensor([0])} if isinstance(model, MLP) else {}
    with pytest.raises(kind, match=message):
        take_neurons(
            model,
            good | {w: torch.tensor(i, dtype=torch.int64) for w, i in kept.items()},
            optimizer,
        )
    assert_equal(snapshot(model), before)


def test_a_layer_with_a_behaviour_of_its_own_is_refused() -> None:
    model = mlp()
    model.hidden[1].forward = lambda x: x
    with pytest.raises(TypeError, match=r"plain linear layers, got hidden\.1"):
        take_neurons(model, KEPT)


def test_not_within_a_sub_network() -> None:
    model = mlp()
    with (
        SubNetwork.full(model).activate(),
        pytest.raises(RuntimeError, match=r"hidden\.0 has an active sub-network"),
    ):
        take_neurons(model, KEPT)
    assert model.hidden[0].out_features == 9


def test_new_neurons_belong_to_no_part() -> None:
    model = mlp()
    core = SubNetwork(model, CORES["prefix"], name="core")
    with pytest.raises(ValueError, match="neither inside nor outside the mask Prefix"):
        take_neurons(model, {"hidden.0": torch.tensor([0, -1])})
    assert core.masks["hidden.0.weight"] == pk.Prefix(4) and model.hidden[0].out_features == 9


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p, 0.1),
        lambda p: torch.optim.Adafactor(p, 0.1),
    ],
    ids=["lbfgs", "adafactor"],
)
def test_state_that_cannot_follow_is_refused(make: Any) -> None:
    model, x = mlp(), integers(6, 4)
    optimizer = make(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = snapshot(model)
    with pytest.raises(ValueError, match="must have its parameter's shape"):
        take_neurons(model, KEPT, optimizer)
    assert_equal(snapshot(model), before)

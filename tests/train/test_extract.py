"""``SubNetwork.extract`` and ``flops``: the sub-network standing alone, and what it costs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from maskedtrain import MaskedConv2d, MaskedLinear, SubNetwork, SwitchNorm
from maskedtrain.models import ResNet, resnet8
from maskedtrain.models.resnet import BasicBlock
from tests.train.toolbox import (
    TOKENS,
    Tied,
    assert_equal,
    element,
    gradients,
    mlp,
    narrow_mlp,
    noise,
    small_resnet,
    snapshot,
)

Masks = dict[str, pk.Mask | None]


# Extraction


def own_layers(module: nn.Module) -> list[str]:
    return [
        name
        for name, m in module.named_modules()
        if type(m).__module__.startswith("maskedtrain.layers")
    ]


WIDTHS: dict[str, Callable[[ResNet], SubNetwork]] = {
    "full": SubNetwork.full,
    "core": lambda model: SubNetwork.width(model, 0.5),
    "shared-norm": lambda model: SubNetwork.width(model, 0.5, round_to=1, separate_norm=False),
    "index": lambda model: SubNetwork(
        model,
        {
            "layer1.0.conv1.weight": pk.Index([0, 3, 6]),
            "layer1.0.bn1.weight": pk.Index([0, 3, 6]),
            "layer1.0.conv2.weight": pk.Index(None, [0, 3, 6]),
            "fc.weight": element(10, 32),
            "fc.bias": None,
        },
        name="index",
    ),
}
widths = pytest.mark.parametrize("make", WIDTHS.values(), ids=WIDTHS)


@widths
def test_extracted_module_computes_what_the_active_sub_network_does(
    make: Callable[[ResNet], SubNetwork],
) -> None:
    model = small_resnet()
    model(noise(4, 3, 8, 8, seed=3))
    subnet = make(model)
    extracted = subnet.extract()
    assert own_layers(model) and not own_layers(extracted)
    if make is not WIDTHS["index"]:
        assert sum(p.numel() for p in extracted.parameters()) == subnet.numel()
    for training in (True, True, False):
        model.train(training)
        extracted.train(training)
        x = noise(4, 3, 8, 8, seed=int(training))
        with subnet.activate():
            assert torch.equal(extracted(x), model(x))
    # The two share nothing.
    state = snapshot(model)
    for tensor in extracted.state_dict().values():
        tensor.fill_(7)
    assert_equal(snapshot(model), state)


def test_extracted_module_keeps_mode_gradients_off_and_structure() -> None:
    model = small_resnet().eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    extracted: Any = SubNetwork.width(model, 0.5).extract()
    assert not any(module.training for module in extracted.modules())
    assert not extracted.conv1.weight.requires_grad and extracted.fc.weight.requires_grad
    assert extracted.fc.weight.grad is None
    assert [type(extracted.layer1[0]), type(extracted)] == [BasicBlock, ResNet]
    names = {name for name, _ in extracted.named_parameters()}
    assert names == {name for name, _ in resnet8(width=4).named_parameters()}


def test_what_is_outside_is_not_trained_in_the_extracted_module() -> None:
    model = nn.Sequential(MaskedConv2d(2, 3, 1), nn.Flatten(), nn.Linear(3, 2))
    part = SubNetwork(model, {"0.weight": None, "0.bias": pk.Full(), "2.bias": None}, name="part")
    extracted: Any = part.extract()
    assert not extracted[0].weight.any() and not extracted[0].weight.requires_grad
    assert not extracted[2].bias.any() and not extracted[2].bias.requires_grad
    assert extracted[0].bias.requires_grad and extracted[2].weight.requires_grad


@pytest.mark.parametrize("output", [nn.Linear, MaskedLinear])
@pytest.mark.parametrize("share", [False, True])
def test_tied_weights_stay_tied(output: type[nn.Linear], share: bool) -> None:
    model = Tied(output)
    extracted: Any = SubNetwork.full(model).extract(share=share)
    assert extracted.embedding.weight is extracted.output.weight
    assert len(list(extracted.parameters())) == 1
    assert torch.equal(extracted(TOKENS), model(TOKENS))


def test_tied_masked_weights_stay_tied() -> None:
    model = nn.Sequential(MaskedLinear(4, 4, bias=False), MaskedLinear(4, 4, bias=False))
    model[1].weight = model[0].weight
    masks: Masks = {"0.weight": pk.Prefix(2, 2), "1.weight": pk.Prefix(2, 2)}
    core = SubNetwork(model, masks, name="core")
    for share in (False, True):
        extracted: Any = core.extract(share=share)
        assert extracted[0].weight is extracted[1].weight
    none = SubNetwork(model, {"0.weight": None, "1.weight": None}, name="none").extract()
    assert len(list(none.parameters())) == 1


@pytest.mark.parametrize("separate_norm", [True, False])
def test_training_a_sharing_extract_trains_the_super_networks_part_alone(
    separate_norm: bool,
) -> None:
    model = small_resnet().double()
    core = SubNetwork.width(model, 0.5, separate_norm=separate_norm)
    before = snapshot(model)
    twin = core.extract()
    shared = core.extract(share=True)
    for network in (twin, shared):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for step in range(3):
            optimizer.zero_grad()
            x = noise(6, 3, 8, 8, seed=step).double()
            F.cross_entropy(network(x), torch.arange(6)).backward()
            optimizer.step()
    # Products with a view and with a copy of a weight may add up in another order.
    torch.testing.assert_close(shared.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-12)
    changed = snapshot(model)
    model.eval()
    with core.activate():
        assert torch.equal(model(x), shared.eval()(x))
    for name, parameter in model.named_parameters():
        mask = core.mask_of(parameter)
        inside = (
            torch.zeros(parameter.shape).bool() if mask is None else mask.dense(parameter.shape)
        )
        assert torch.equal(changed[name][~inside], before[name][~inside]), name
        if mask is not None:
            assert not torch.equal(changed[name][inside], before[name][inside]), name
    for name in before:
        if "running" in name and separate_norm:
            moved = not torch.equal(changed[name], before[name])
            assert moved == (".branches.core." in name), name


def test_sharing_extract_of_plain_modules() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), MaskedLinear(2, 2))
    shared: Any = SubNetwork.full(model).extract(share=True)
    for name, tensor in model.state_dict().items():
        assert shared.state_dict()[name].data_ptr() == tensor.data_ptr(), name
    # Gradients are apart: the optimizer of one does not clear those of the other.
    shared(noise(4, 3)).sum().backward()
    assert not gradients(model) and len(gradients(shared)) == 6


@pytest.mark.parametrize(
    ("masks", "name"),
    [
        ({"0.weight": pk.Index([0, 2])}, r"0\.weight has Index"),
        ({"0.weight": element(4, 3)}, r"0\.weight has Element"),
        ({"1.weight": element(2, 4)}, r"1\.weight has Element"),
    ],
)
def test_sharing_needs_views(masks: Masks, name: str) -> None:
    model = nn.Sequential(MaskedLinear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=rf"share=True needs masks that are views .*{name}"):
        SubNetwork(model, masks, name="part").extract(share=True)


def test_sharing_leaves_what_is_outside_alone() -> None:
    model = nn.Sequential(MaskedLinear(3, 4), nn.Linear(4, 2))
    masks: Masks = {"0.weight": pk.Full(), "0.bias": None, "1.bias": None}
    part = SubNetwork(model, masks, name="part")
    shared: Any = part.extract(share=True)
    state, x = snapshot(model), noise(2, 3)
    with part.activate():
        assert torch.equal(shared(x), model(x))
    assert_equal(snapshot(model), state)


@pytest.mark.parametrize("make", [MaskedLinear, nn.Linear])
def test_extract_of_a_model_that_is_one_layer(make: type[nn.Linear]) -> None:
    layer = make(4, 3)
    mask: pk.Mask = pk.Prefix(2, 3) if make is MaskedLinear else element(3, 4)
    part = SubNetwork(layer, {"weight": mask}, name="part")
    x = noise(5, *mask.restricted_shape((3, 4))[1:])
    extracted = part.extract()
    assert type(extracted) is nn.Linear
    with part.activate():
        assert torch.equal(extracted(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_extracted_module_exports_with_a_dynamic_batch() -> None:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1), width=8).eval()
    core = SubNetwork.width(model, 0.5)
    program = torch.export.export(
        core.extract(), (noise(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    for batch in (1, 5):
        x = noise(batch, 3, 8, 8)
        with core.activate():
            assert torch.equal(loaded(x), model(x))


# FLOPs


def counted(network: nn.Module, x: Tensor, *, training: bool) -> int:
    """By torch's counter, in a real pass."""
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(training):
        y = network(x)
        if training:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@widths
def test_flops_are_the_standalone_networks(
    make: Callable[[ResNet], SubNetwork], training: bool
) -> None:
    model = small_resnet()
    subnet = make(model)
    x = noise(3, 3, 8, 8)
    flops = subnet.flops(x, training=training)
    extracted = subnet.extract()
    assert flops == counted(extracted, x, training=training) > 0
    with subnet.activate():
        assert counted(model, x, training=training) == flops
    whole = SubNetwork.full(model).flops(x, training=training)
    assert flops == whole if subnet.name == "full" else flops < whole


def test_flops_of_linear_layers_by_hand() -> None:
    model = mlp(hidden=8)
    for subnet, hidden in (
        (SubNetwork.full(model), 8),
        (narrow_mlp(model, pk.Index([1, 2, 5])), 3),
    ):
        first, second = 2 * 5 * 6 * hidden, 2 * 5 * hidden * 3
        assert subnet.flops(noise(5, 6)) == first + second
        # Every layer has a gradient of its weight; only the second one of its input.
        assert subnet.flops(noise(5, 6), training=True) == 2 * first + 3 * second


def test_counting_flops_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        MaskedConv2d(3, 4, 3), SwitchNorm(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2)
    )
    model.append(nn.BatchNorm1d(2))
    core = SubNetwork(
        model, {"0.weight": pk.Prefix(4), "4.weight": element(2, 16), "4.bias": None}, name="core"
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state, grads, generator = snapshot(model), gradients(model), torch.get_rng_state()
    parameters = dict(model.named_parameters())
    x = noise(2, 3, 4, 4).requires_grad_()
    assert core.flops(x) < core.flops(x, training=True)
    assert_equal(snapshot(model), state)
    assert_equal(gradients(model), grads)
    assert torch.equal(torch.get_rng_state(), generator)
    assert dict(model.named_parameters()) == parameters
    assert x.grad is None
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert model[0].active is None


def test_flops_of_other_dtypes_and_inputs_and_of_tied_weights() -> None:
    model = Tied(MaskedLinear).to(torch.bfloat16)
    full = SubNetwork.full(model)
    assert full.flops(TOKENS) == 2 * TOKENS.numel() * 4 * 5
    # dW and dx: the embedding needs the latter.
    assert full.flops(TOKENS, training=True) == 3 * full.flops(TOKENS)
    assert model.output.weight.dtype == torch.bfloat16
    assert model.output.weight is model.embedding.weight
    on_meta = SubNetwork.full(copy.deepcopy(model).to("meta"))
    assert on_meta.flops(TOKENS.to("meta")) == full.flops(TOKENS)

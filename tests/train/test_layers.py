"""``MaskedLinear``, ``MaskedConv2d`` and ``SwitchNorm`` against torch's own layers.

Where two computations add in different orders the numbers are small integers in fp64, whose sums
are exact in any order: results are equal or wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import MaskedConv2d, MaskedLinear, SubNetwork, SwitchNorm
from partial_kernels._core.testing import assert_zero_outside
from tests.train.toolbox import active_results, assert_equal, integers, noise, results

Masks = dict[str, pk.Mask | None]


def with_integers(module: nn.Module) -> Any:
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = integers(*parameter.shape, seed=seed + 1)
    return module.double()


# Without an active sub-network

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...], dict[str, Any]]] = {
    "linear": (MaskedLinear, nn.Linear, (2, 3, 6), {"in_features": 6, "out_features": 4}),
    "linear-no-bias": (
        MaskedLinear,
        nn.Linear,
        (5, 6),
        {"in_features": 6, "out_features": 4, "bias": False},
    ),
    "conv": (
        MaskedConv2d,
        nn.Conv2d,
        (2, 4, 7, 7),
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "conv-grouped-circular": (
        MaskedConv2d,
        nn.Conv2d,
        (2, 4, 6, 6),
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": 3,
            "groups": 2,
            "padding": "same",
            "padding_mode": "circular",
            "bias": False,
        },
    ),
    "norm": (SwitchNorm, nn.BatchNorm2d, (3, 4, 2, 2), {"num_features": 4, "eps": 1e-3}),
    "norm-cumulative": (
        SwitchNorm,
        nn.BatchNorm2d,
        (3, 4, 2, 2),
        {"num_features": 4, "momentum": None},
    ),
    "norm-bare": (
        SwitchNorm,
        nn.BatchNorm2d,
        (3, 4, 2, 2),
        {"num_features": 4, "affine": False, "track_running_stats": False},
    ),
}


@pytest.mark.parametrize("active", [False, True], ids=["inactive", "full"])
@pytest.mark.parametrize("name", PAIRS)
def test_with_nothing_masked_a_layer_is_torchs_bit_for_bit(name: str, active: bool) -> None:
    ours, theirs, shape, options = PAIRS[name]
    torch.manual_seed(0)
    plain = theirs(**options)
    torch.manual_seed(0)
    masked = ours(**options)
    assert isinstance(masked, theirs)
    assert_equal(dict(masked.state_dict()), dict(plain.state_dict()))
    compute = active_results if active else results
    subject: Any = SubNetwork.full(masked) if active else masked
    for training in (True, True, False):
        plain.train(training)
        masked.train(training)
        for seed in range(2):
            x = noise(*shape, seed=seed)
            assert_equal(compute(subject, x), results(plain, x))
            assert_equal(dict(masked.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("name", PAIRS)
def test_checkpoints_fit_torchs_layer_and_back(name: str) -> None:
    ours, theirs, shape, options = PAIRS[name]
    plain, masked, x = theirs(**options), ours(**options), noise(*shape)
    plain(x)
    masked.load_state_dict(plain.state_dict(), strict=True)
    assert_equal(dict(masked.state_dict()), dict(plain.state_dict()))
    fresh = theirs(**options)
    fresh.load_state_dict(masked.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), plain.eval()(x))


def test_from_linear_is_over_the_same_parameters() -> None:
    linear = nn.Linear(3, 2).eval()
    masked = MaskedLinear.from_linear(linear)
    assert masked.weight is linear.weight and masked.bias is linear.bias
    assert not masked.training
    assert torch.equal(masked(noise(4, 3)), linear(noise(4, 3)))
    assert MaskedLinear.from_linear(nn.Linear(3, 2, bias=False)).bias is None


# With one: the dense computation with zeros

O, I = 7, 6
SELECTIONS: dict[str, pk.Mask] = {
    "full": pk.Full(),
    "prefix": pk.Prefix(3, 4),
    "prefix-rows": pk.Prefix(2),
    "prefix-cols": pk.Prefix(None, 1),
    "prefix-one-row": pk.Prefix(1, 2),
    "index": pk.Index([0, 3, 6], [1, 2, 5]),
    "index-rows": pk.Index([2, 5]),
    "index-cols": pk.Index(None, [0, 4]),
}
WIDE: dict[str, pk.Mask] = {
    "element": pk.Element(integers(O, I) > 0),
    "block": pk.Block(torch.tensor([[True, False], [False, True]]), 4),
    "packed": pk.Packed([0, 1, 8, 13, 40]),
}
biases = pytest.mark.parametrize("bias", ["follows", "outside", "absent"])


def given(weight: pk.Mask | None, bias: str) -> Masks:
    return {"weight": weight, "bias": None} if bias == "outside" else {"weight": weight}


def positions(length: int, kept: int | Tensor | None) -> Tensor:
    if kept is None:
        return torch.arange(length)
    return torch.arange(kept) if isinstance(kept, int) else kept


def axes(mask: pk.Mask | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Rows and columns that a compact layer computes with."""
    rows, cols = (mask.rows, mask.cols) if isinstance(mask, pk.Prefix | pk.Index) else (None, None)
    return positions(shape[0], rows), positions(shape[1], cols)


def kept(mask: pk.Mask | None, parameter: Tensor) -> Tensor:
    """1 inside, 0 outside, from the masks' own definition (tested on its own)."""
    if mask is None:
        return torch.zeros_like(parameter)
    return mask.dense(parameter.shape).to(parameter.dtype)


def dense_results(
    layer: Any, function: Callable[..., Tensor], masks: Masks, inputs: Tensor, x: Tensor
) -> dict[str, Tensor]:
    """The whole layer with zeros for what is outside: x spread over all inputs, y cut to rows."""
    rows, _ = axes(masks["weight"], layer.weight.shape)
    weight = layer.weight.detach().clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    x = x.clone().requires_grad_()
    dim = -1 if layer.weight.ndim == 2 else 1
    shape = list(x.shape)
    shape[dim] = layer.weight.shape[1] * getattr(layer, "groups", 1)
    x_whole = x.new_zeros(shape).index_copy(dim, inputs, x)
    bias_part = None if bias is None else bias * kept(masks.get("bias"), bias)
    y = function(x_whole, weight * kept(masks["weight"], weight), bias_part)
    y = y.index_select(dim, rows)
    y.backward(integers(*y.shape, seed=99))
    found = {"y": y.detach(), "x": x.grad, "weight": weight.grad}
    if bias is not None:
        found["bias"] = bias.grad
    return found  # pyright: ignore[reportReturnType]


def check_against_dense(
    layer: Any,
    function: Callable[..., Tensor],
    masks: Masks,
    inputs: Tensor,
    x: Tensor,
) -> Any:
    """Compare outputs and gradients; return the extracted layer, whose outputs equal too."""
    subnet = SubNetwork(layer, masks, name="part")
    expected = dense_results(layer, function, subnet.masks, inputs, x)
    found = active_results(subnet, x)
    for name, parameter in layer.named_parameters():
        mask = subnet.masks[name]
        if mask is None:
            assert name not in found
            del expected[name]
        else:
            assert_zero_outside(found[name], mask.dense(parameter.shape), what=name)
    assert_equal(found, expected)
    extracted = subnet.extract()
    assert torch.equal(extracted(x), expected["y"])
    return extracted


def linear_layer(bias: bool) -> MaskedLinear:
    return with_integers(MaskedLinear(I, O, bias))


@biases
@pytest.mark.parametrize("name", [*SELECTIONS, *WIDE])
def test_linear_is_the_dense_computation_with_zeros(name: str, bias: str) -> None:
    mask = {**SELECTIONS, **WIDE}[name]
    layer = linear_layer(bias != "absent")
    rows, cols = axes(mask, layer.weight.shape)
    x = integers(2, 5, len(cols), seed=7)
    extracted = check_against_dense(layer, F.linear, given(mask, bias), cols, x)
    assert type(extracted) is nn.Linear
    assert (extracted.out_features, extracted.in_features) == (len(rows), len(cols))
    assert (extracted.bias is None) == (bias != "follows")


def test_a_linear_weight_outside_counts_as_zero() -> None:
    layer, x = linear_layer(True), integers(3, I)
    outside = SubNetwork(layer, {"weight": None}, name="part")
    assert outside.mask_of(layer.bias) is None
    with outside.activate():
        assert torch.equal(layer(x), torch.zeros(3, O))
    biased = SubNetwork(layer, {"weight": None, "bias": pk.Full()}, name="part")
    found = active_results(biased, x)
    assert torch.equal(found["y"], layer.bias.expand(3, O))
    assert torch.equal(found["bias"], integers(3, O, seed=99).sum(0))
    assert "weight" not in found
    assert torch.equal(biased.extract()(x), found["y"])


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (pk.Full(), pk.Element(torch.arange(O) % 2 == 0)),
        (pk.Prefix(3, 4), pk.Index([0, 3, 6])),
        (WIDE["element"], pk.Packed([1, 2])),
        (None, pk.Element(torch.arange(O) > 4)),
    ],
    ids=["element", "index", "packed", "no-weight"],
)
def test_linear_bias_with_a_mask_of_its_own(weight: pk.Mask | None, bias: pk.Mask) -> None:
    layer = linear_layer(True)
    x = integers(4, len(axes(weight, layer.weight.shape)[1]), seed=7)
    subnet = SubNetwork(layer, {"weight": weight, "bias": bias}, name="part")
    rows = axes(weight, layer.weight.shape)[0]
    part = bias.restrict(layer.bias.detach())
    with torch.no_grad():
        dense = (layer.weight * kept(weight, layer.weight))[rows]
        expected = x @ dense[:, : x.shape[1]].T + part
    found = active_results(subnet, x)
    assert torch.equal(found["y"], expected)
    assert torch.equal(subnet.extract()(x), expected)
    column_sums = integers(*expected.shape, seed=99).sum(0)
    if isinstance(bias, pk.Index):
        column_sums = torch.zeros(O).double().index_copy(0, bias.rows, column_sums)
    assert torch.equal(found["bias"], column_sums * bias.dense((O,)))


@pytest.mark.parametrize(
    ("weight", "bias"), [(pk.Prefix(1), pk.Full()), (pk.Full(), pk.Prefix(1)), (None, pk.Prefix(2))]
)
def test_linear_bias_must_fit_the_rows(weight: pk.Mask | None, bias: pk.Mask) -> None:
    subnet = SubNetwork(linear_layer(True), {"weight": weight, "bias": bias}, name="part")
    rows = 1 if isinstance(weight, pk.Prefix) else O
    with (
        subnet.activate(),
        pytest.raises(ValueError, match=rf"bias must keep {rows} elements, got [127]"),
    ):
        subnet.model(integers(2, I))
    if weight is not None:
        with pytest.raises(ValueError, match=rf"bias must keep {rows} elements"):
            subnet.extract()


def test_linear_of_the_wrong_width_names_the_mask() -> None:
    subnet = SubNetwork(linear_layer(True), {"weight": pk.Prefix(3, 4)}, name="part")
    with subnet.activate(), pytest.raises(ValueError, match=r"x must have 4 features"):
        subnet.model(integers(2, I))


CONVS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided-dilated": {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": (2, 1)},
    "same": {"kernel_size": (3, 1), "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "replicate-same": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *((options, name) for options in CONVS for name in ("prefix", "index")),
        *(("3x3", name) for name in SELECTIONS),
    ],
)
@biases
def test_conv_is_the_dense_computation_with_zeros(options: str, name: str, bias: str) -> None:
    mask = SELECTIONS[name]
    conv = with_integers(MaskedConv2d(I, O, bias=bias != "absent", **CONVS[options]))
    rows, cols = axes(mask, conv.weight.shape)
    x = integers(2, len(cols), 6, 5, seed=7)
    extracted = check_against_dense(conv, conv._conv_forward, given(mask, bias), cols, x)
    assert type(extracted) is nn.Conv2d
    assert (extracted.out_channels, extracted.in_channels) == (len(rows), len(cols))
    assert extracted.padding_mode == conv.padding_mode
    assert (extracted.bias is None) == (bias != "follows")


@pytest.mark.parametrize("own_bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_with_an_element_mask_keeps_its_width(groups: int, own_bias: bool) -> None:
    conv = with_integers(MaskedConv2d(4, 6, 3, groups=groups))
    masks: Masks = {"weight": pk.Element(integers(*conv.weight.shape, seed=5) > 0)}
    if own_bias:
        masks["bias"] = pk.Element(torch.arange(6) % 2 == 0)
    x = integers(2, 4, 5, 5)
    extracted = check_against_dense(conv, conv._conv_forward, masks, torch.arange(4), x)
    assert extracted.groups == groups


def test_a_conv_weight_outside_counts_as_zero() -> None:
    conv, x = with_integers(MaskedConv2d(4, 6, 3, padding=1)), integers(2, 4, 5, 5)
    outside = SubNetwork(conv, {"weight": None}, name="part")
    assert outside.mask_of(conv.bias) is None
    with outside.activate():
        assert torch.equal(conv(x), torch.zeros(2, 6, 5, 5))
    biased = SubNetwork(conv, {"weight": None, "bias": pk.Full()}, name="part")
    found = active_results(biased, x)
    assert torch.equal(found["y"], conv.bias.view(6, 1, 1).expand(2, 6, 5, 5))
    assert "weight" not in found and found["bias"].any()
    assert torch.equal(biased.extract()(x), found["y"])


@pytest.mark.parametrize("mask", [pk.Prefix(2), pk.Index([1, 4]), pk.Prefix(3, 1)], ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_depthwise_conv_by_rows(mask: pk.Prefix | pk.Index, bias: bool) -> None:
    conv = with_integers(MaskedConv2d(6, 6, 3, groups=6, bias=bias, padding=1))
    rows = positions(6, mask.rows)
    x = integers(2, len(rows), 5, 5)
    extracted = check_against_dense(conv, conv._conv_forward, {"weight": mask}, rows, x)
    assert (extracted.in_channels, extracted.groups) == (len(rows), len(rows))


def test_other_grouped_convs_take_no_compact_mask() -> None:
    subnet = SubNetwork(MaskedConv2d(4, 8, 3, groups=2), {"weight": pk.Prefix(4)}, name="part")
    message = r"needs groups=1 or a depthwise convolution, got groups=2 with 4 -> 8"
    with subnet.activate(), pytest.raises(ValueError, match=message):
        subnet.model(noise(1, 4, 5, 5))
    with pytest.raises(ValueError, match=message):
        subnet.extract()

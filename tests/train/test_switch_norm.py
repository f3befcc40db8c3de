"""``SwitchNorm``: a part of one batch norm, or a batch norm of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import SubNetwork, SwitchNorm
from partial_kernels._core.testing import assert_zero_outside
from tests.train.toolbox import active_results, assert_equal, noise, results

Masks = dict[str, pk.Mask | None]


def positions(length: int, kept: int | Tensor | None) -> Tensor:
    if kept is None:
        return torch.arange(length)
    return torch.arange(kept) if isinstance(kept, int) else kept


CHANNELS = 5
NORM_MASKS = [pk.Full(), pk.Prefix(3), pk.Index([0, 2, 4])]
NORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "no-statistics": {"track_running_stats": False},
    "eps": {"eps": 0.1, "momentum": 0.5},
}
norms = pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
norm_masks = pytest.mark.parametrize("mask", NORM_MASKS, ids=repr)


def trained_norm(**options: Any) -> SwitchNorm:
    norm = SwitchNorm(CHANNELS, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(noise(CHANNELS, seed=seed))
    norm(noise(4, CHANNELS, 3, 3, seed=5))
    return norm


def gathered(norm: nn.BatchNorm2d, rows: Tensor, **options: Any) -> nn.BatchNorm2d:
    """A narrow batch norm with these channels' values."""
    narrow = nn.BatchNorm2d(len(rows), **options)
    state = {k: v[rows] if v.ndim else v for k, v in norm.state_dict().items() if "." not in k}
    narrow.load_state_dict(state)
    return narrow.train(norm.training)


@norm_masks
@norms
def test_shared_norm_is_a_narrow_one_over_the_kept_channels(
    options: dict[str, Any], mask: Any
) -> None:
    norm = trained_norm(**options)
    rows = positions(CHANNELS, getattr(mask, "rows", None))
    narrow = gathered(norm, rows, **options)
    subnet = SubNetwork(norm, {"weight": mask}, name="core")
    assert subnet.mask_of(norm.bias) == subnet.mask_of(norm.weight)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    for seed, training in enumerate([True, True, False]):
        norm.train(training)
        narrow.train(training)
        x = noise(4, len(rows), 3, 3, seed=seed)
        found, expected = active_results(subnet, x), results(narrow, x)
        for name, parameter in norm.named_parameters():
            assert_zero_outside(found[name], mask.dense(parameter.shape), what=name)
            found[name] = found[name][rows]
        assert_equal(found, expected)
        # Statistics of the kept channels move as the narrow norm's; of the others none moves.
        for name, buffer in narrow.named_buffers():
            whole = norm.get_buffer(name)
            expected_whole = before[name].index_copy(0, rows, buffer) if buffer.ndim else buffer
            assert torch.equal(whole, expected_whole), name
            moved = whole if not buffer.ndim else whole[rows]
            assert not torch.equal(moved, before[name][rows] if buffer.ndim else before[name])


@norm_masks
def test_statistics_frozen_by_hand_stay(mask: Any) -> None:
    norm = trained_norm()
    norm.track_running_stats = False
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    subnet = SubNetwork(norm, {"weight": mask}, name="core")
    x = noise(4, *mask.restricted_shape((CHANNELS,)), 3, 3)
    with subnet.activate():
        y = norm(x)
    weight, bias = mask.restrict(norm.weight), mask.restrict(norm.bias)
    assert torch.equal(y, F.batch_norm(x, None, None, weight, bias, training=True))
    assert_equal(dict(norm.named_buffers()), before)


def test_norm_with_an_element_mask_keeps_its_width() -> None:
    norm = trained_norm()
    mask = pk.Element(torch.tensor([True, False, True, True, False]))
    narrow = copy.deepcopy(norm)
    narrow.weight.data *= mask.mask
    x = noise(4, CHANNELS, 3, 3)
    found = active_results(SubNetwork(norm, {"weight": mask}, name="part"), x)
    expected = results(narrow, x)
    assert_zero_outside(found["weight"], mask.mask)
    expected["weight"] *= mask.mask
    assert_equal(found, expected)
    assert_equal(dict(norm.named_buffers()), dict(narrow.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("masks", "outside"),
    [
        ({"bias": None}, {"bias"}),
        ({"weight": None}, {"weight", "bias"}),
        ({"weight": None, "bias": pk.Full()}, {"weight"}),
    ],
)
def test_norm_parameters_outside_count_as_zero(
    masks: Masks, outside: set[str], training: bool
) -> None:
    norm, x = trained_norm().train(training), noise(4, CHANNELS, 3, 3)
    zeros = copy.deepcopy(norm)
    for name in outside:
        zeros.get_parameter(name).data.zero_()
    subnet = SubNetwork(norm, masks, name="part")
    assert {name for name, mask in subnet.masks.items() if mask is None} == outside
    extracted = subnet.extract()
    expected = zeros(x)
    with subnet.activate():
        assert torch.equal(norm(x), expected)
    assert torch.equal(extracted(x), expected)


@norm_masks
@pytest.mark.parametrize("affine", [True, False])
@norms
def test_a_branch_is_a_batch_norm_of_its_own(
    options: dict[str, Any], affine: bool, mask: Any
) -> None:
    options = {**options, "affine": affine}
    norm = trained_norm(**options)
    rows = positions(CHANNELS, getattr(mask, "rows", None))
    narrow = gathered(norm, rows, **options)
    norm.add_branch("core", mask)
    norm.add_branch("other", pk.Prefix(2))
    norm.add_branch("third-2", pk.Full())
    subnet = SubNetwork(norm, {}, name="core")
    outside = {n: v.clone() for n, v in norm.state_dict().items() if "branches.core." not in n}
    assert len(outside) > 0 or not (affine or norm.track_running_stats)
    for seed, training in enumerate([True, True, False]):
        norm.train(training)
        narrow.train(training)
        x = noise(4, len(rows), 3, 3, seed=seed)
        found = active_results(subnet, x)
        assert_equal(
            {k.removeprefix("branches.core."): v for k, v in found.items()}, results(narrow, x)
        )
        assert_equal(dict(norm.branches["core"].named_buffers()), dict(narrow.named_buffers()))
    now = norm.state_dict()
    assert_equal({name: now[name] for name in outside}, outside)
    # The super-network, in turn, leaves the branches alone.
    norm.train()
    branches = {n: v.clone() for n, v in norm.state_dict().items() if n.startswith("branches.")}
    found = active_results(SubNetwork.full(norm), noise(4, CHANNELS, 3, 3))
    assert not any(name.startswith("branches.") for name in found)
    now = norm.state_dict()
    assert_equal({name: now[name] for name in branches}, branches)


def test_masks_of_a_norm_with_branches() -> None:
    norm = SwitchNorm(CHANNELS)
    norm.add_branch("core", pk.Prefix(3))
    core, full = SubNetwork(norm, {}, name="core"), SubNetwork.full(norm)
    own = {name: name.startswith("branches.") for name, _ in norm.named_parameters()}
    for name, parameter in norm.named_parameters():
        assert (core.mask_of(parameter) is not None) == own[name], name
        assert (full.mask_of(parameter) is not None) != own[name], name
    assert (core.numel(), full.numel()) == (2 * 3, 2 * CHANNELS)


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("core", pk.Prefix(2), "there is a branch 'core' already"),
        ("a.b", pk.Prefix(2), r"needs a plain name, got 'a\.b'"),
        ("", pk.Prefix(2), "needs a plain name, got ''"),
        ("half", pk.Prefix(2), "'half' is a name that nn.ModuleDict uses"),
        ("new", pk.Prefix(6), "rows must be <= 5, got 6"),
        ("new", pk.Element(torch.ones(CHANNELS).bool()), r"over channels .*, got Element"),
    ],
)
def test_what_cannot_be_a_branch(name: str, mask: pk.Mask, message: str) -> None:
    norm = SwitchNorm(CHANNELS)
    norm.add_branch("core", pk.Prefix(3))
    with pytest.raises(ValueError, match=message):
        norm.add_branch(name, mask)
    assert list(norm.branches) == ["core"]


def test_a_norm_of_images_alone() -> None:
    norm = SwitchNorm(CHANNELS)
    subnet = SubNetwork(norm, {"weight": pk.Prefix(3)}, name="core")
    with subnet.activate(), pytest.raises(ValueError, match="expected 4D input"):
        norm(noise(4, 3))

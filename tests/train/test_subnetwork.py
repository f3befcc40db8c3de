"""``SubNetwork``: masks by name, tied and shared parameters, set relations, widths."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import SubNetwork, SwitchNorm
from maskedtrain.models import MLP, Transformer, resnet8
from maskedtrain.widths import active_count, widths_of
from tests.train.toolbox import (
    TOKENS,
    Tied,
    element,
    mlp,
    narrow_mlp,
    noise,
    small_resnet,
    snapshot,
)

Masks = dict[str, pk.Mask | None]


# Masks by name


def test_masks_are_given_implied_or_full() -> None:
    model = mlp()
    core = narrow_mlp(model, pk.Prefix(4))
    assert core.masks == {
        "0.weight": pk.Prefix(4),
        "0.bias": pk.Prefix(4),
        "2.weight": pk.Prefix(None, 4),
        "2.bias": pk.Full(),
    }
    for name, parameter in model.named_parameters():
        assert core.mask_of(parameter) == core.masks[name]
    assert core.numel() == 4 * 6 + 4 + 3 * 4 + 3
    assert repr(core) == "SubNetwork('core', 43 parameters)"
    assert SubNetwork.full(model).numel() == sum(p.numel() for p in model.parameters())
    assert SubNetwork(model, {"0.weight": None, "2.bias": None}, name="part").numel() == 24


def test_a_mask_given_outweighs_the_implied_one() -> None:
    core = SubNetwork(mlp(), {"0.weight": pk.Prefix(4), "0.bias": None}, name="core")
    assert core.masks["0.bias"] is None


def test_parameters_that_come_later_are_outside() -> None:
    model = mlp()
    full = SubNetwork.full(model)
    model.append(nn.Linear(3, 2))
    assert full.mask_of(model[3].weight) is None  # pyright: ignore[reportArgumentType]
    assert full.mask_of(nn.Parameter(torch.zeros(2))) is None


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"0.weigth": pk.Prefix(4)}, r"no parameter '0\.weigth'; did you mean 0\.weight\?"),
        ({"zzzzzz": None}, "no parameter 'zzzzzz'$"),
        ({"0.weight": pk.Prefix(9)}, r"0\.weight: Prefix.*rows must be <= 8, got 9"),
        ({"0.weight": pk.Index([2, 8])}, r"0\.weight: Index rows must be < 8, got 8"),
        ({"0.bias": pk.Prefix(2, 2)}, r"0\.bias: .* has cols"),
        ({"2.weight": element(3, 7)}, r"2\.weight: Element mask must have .* \[3, 8\]"),
    ],
)
def test_names_and_masks_that_do_not_fit(masks: Masks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubNetwork(mlp(), masks, name="core")


def test_tied_parameters_have_one_mask() -> None:
    model, mask = Tied(), element(5, 4)
    with pytest.raises(ValueError, match=r"output\.weight is tied .* another mask: Element.*Full"):
        SubNetwork(model, {"embedding.weight": mask}, name="part")
    part = SubNetwork(model, {"embedding.weight": mask, "output.weight": mask}, name="part")
    assert part.numel() == int(mask.mask.sum())
    weight = (model.embedding.weight * mask.mask).detach()
    with part.activate():
        y = model(TOKENS)
    assert torch.equal(y, weight[TOKENS] @ weight.T)


def test_a_shared_module_has_one_mask() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    part = SubNetwork(model, {"0.weight": None}, name="part")
    assert part.mask_of(layer.weight) is None
    with part.activate():
        assert torch.equal(model(noise(2, 3)), layer.bias.expand(2, 3))
    # The other name of the same parameter is not passed over.
    with pytest.raises(ValueError, match=r"2\.weight is tied to a parameter with another mask"):
        SubNetwork(model, {"2.weight": None}, name="part")
    both = SubNetwork(model, {"0.weight": None, "2.weight": None}, name="part")
    assert both.numel() == 3


# Set relations

NESTED = [pk.Prefix(2), pk.Prefix(5), pk.Prefix(8)]


def test_issubset() -> None:
    model = mlp()
    chain = [narrow_mlp(model, mask, f"s{i}") for i, mask in enumerate(NESTED)]
    for i, first in enumerate(chain):
        for j, second in enumerate(chain):
            assert first.issubset(second) == (i <= j)
    crossing = narrow_mlp(model, pk.Index([0, 7]))
    assert not crossing.issubset(chain[1]) and not chain[1].issubset(crossing)
    assert crossing.issubset(SubNetwork.full(model))
    without_bias = SubNetwork(model, {"2.bias": None}, name="part")
    assert without_bias.issubset(SubNetwork.full(model))
    assert not SubNetwork.full(model).issubset(without_bias)
    with pytest.raises(ValueError, match="belong to different models"):
        chain[0].issubset(SubNetwork.full(mlp()))


def test_norms_of_its_own_do_not_count_in_issubset() -> None:
    model = small_resnet()
    full_before = SubNetwork.full(model)
    core = SubNetwork.width(model, 0.5)
    tiny = SubNetwork.width(model, 0.25, name="tiny")
    for full in (full_before, SubNetwork.full(model)):
        assert tiny.issubset(core) and core.issubset(full)
        assert not full.issubset(core) and not core.issubset(tiny)


def test_union() -> None:
    model = mlp()
    low = narrow_mlp(model, pk.Prefix(4), "low")
    odd = SubNetwork(model, {"0.weight": pk.Index([1, 5]), "2.weight": None}, name="odd")
    both = SubNetwork.union(low, odd)
    for name, parameter in model.named_parameters():
        inside = torch.zeros(parameter.shape, dtype=torch.bool)
        for subnet in (low, odd):
            if (mask := subnet.masks[name]) is not None:
                inside |= mask.dense(parameter.shape)
        union_mask = both.mask_of(parameter)
        assert union_mask is not None
        assert torch.equal(union_mask.dense(parameter.shape), inside), name
    # Nested masks stay what they are: a union of Prefix masks costs no dense mask.
    full = SubNetwork.union(low, SubNetwork.full(model), low)
    assert full.masks["0.weight"] == pk.Full()
    assert SubNetwork.union(low).masks == low.masks
    assert SubNetwork.union(odd, odd).masks["2.weight"] is None
    with pytest.raises(ValueError, match="belong to different models"):
        SubNetwork.union(low, SubNetwork.full(mlp()))


def test_union_holds_every_norm() -> None:
    model = small_resnet()
    core = SubNetwork.width(model, 0.5)
    full = SubNetwork.full(model)
    union = SubNetwork.union(full, core)
    assert union.numel() == sum(p.numel() for p in model.parameters())
    assert full.numel() < union.numel() > core.numel()


# By width


def test_width_names_its_norms_and_nests() -> None:
    model = small_resnet()
    before = {name for name, _ in model.named_parameters()}
    core = SubNetwork.width(model, 0.5, round_to=1)
    tiny = SubNetwork.width(model, 0.25, name="tiny", round_to=1)
    added = {name for name, _ in model.named_parameters()} - before
    norms = [name for name, module in model.named_modules() if isinstance(module, SwitchNorm)]
    assert added == {
        f"{norm}.branches.{subnet}.{parameter}"
        for norm in norms
        for subnet in ("core", "tiny")
        for parameter in ("weight", "bias")
    }
    assert core.masks["layer1.0.conv1.weight"] == pk.Prefix(4, 4)
    assert tiny.masks["layer1.0.conv1.weight"] == pk.Prefix(2, 2)
    assert core.masks["conv1.weight"] == pk.Prefix(4, None)
    assert core.masks["fc.weight"] == pk.Prefix(None, 16)
    for norm in norms:
        assert core.masks[f"{norm}.weight"] is None
        assert core.masks[f"{norm}.branches.core.weight"] == pk.Full()
        assert tiny.masks[f"{norm}.branches.core.weight"] is None
        # It came after the core.
        assert f"{norm}.branches.tiny.weight" not in core.masks


def test_width_with_shared_norms_adds_nothing() -> None:
    model = small_resnet()
    before = set(model.state_dict())
    core = SubNetwork.width(model, 0.5, round_to=1, separate_norm=False)
    assert set(model.state_dict()) == before
    assert core.masks["bn1.weight"] == core.masks["bn1.bias"] == pk.Prefix(4)
    stats = snapshot(model)
    with core.activate():
        model(noise(4, 3, 8, 8))
    after = model.bn1.running_mean
    assert after is not None
    assert torch.equal(after[4:], stats["bn1.running_mean"][4:])
    assert not torch.equal(after[:4], stats["bn1.running_mean"][:4])


def test_width_needs_a_model_that_knows_its_widths() -> None:
    with pytest.raises(TypeError, match=r"Sequential has no width_masks\(kept\)"):
        SubNetwork.width(mlp(), 0.5)


@given(
    st.integers(1, 4096),
    st.floats(0, 1, exclude_min=True, allow_nan=False),
    st.sampled_from([1, 2, 8, 12, 16, 32]),
)
def test_active_count_is_in_range_and_a_multiple_where_one_fits(
    total: int, ratio: float, round_to: int
) -> None:
    count = active_count(total, ratio, round_to)
    assert 1 <= count <= total
    if ratio == 1:
        assert count == total
        return
    # All are kept only where the nearest whole number says so.
    assert count < max(2, total) or round(total * ratio) == total
    multiple = round_to
    while multiple > 1 and count % multiple:
        multiple //= 2
    assert abs(count - total * ratio) <= max(multiple / 2, 1)
    # A larger multiple was passed over only because it would leave nothing or everything.
    larger = round_to
    while larger > multiple:
        assert not 0 < round(total * ratio / larger) * larger < total
        larger //= 2


@given(
    st.integers(1, 2048),
    st.lists(st.floats(0.001, 1), min_size=2, max_size=2).map(sorted),
    st.sampled_from([1, 8, 12, 16]),
)
def test_active_count_grows_with_the_ratio(total: int, ratios: list[float], round_to: int) -> None:
    small, large = (active_count(total, ratio, round_to) for ratio in ratios)
    assert small <= large


@pytest.mark.parametrize(
    ("total", "ratio", "count"),
    [(64, 0.5, 32), (64, 0.4, 32), (24, 0.5, 16), (16, 0.5, 8), (16, 0.9, 14), (3, 0.1, 1)],
)
def test_active_count(total: int, ratio: float, count: int) -> None:
    assert active_count(total, ratio) == count


@pytest.mark.parametrize(
    ("ratio", "round_to", "message"),
    [
        (0.0, 16, "ratio must be in"),
        (1.5, 16, "got 1.5"),
        (float("nan"), 16, "got nan"),
        (0.5, 0, "round_to must be >= 1, got 0"),
    ],
)
def test_active_count_out_of_range(ratio: float, round_to: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        active_count(64, ratio, round_to)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (MLP(6, (8, 10), 3), (noise(4, 6),)),
        (resnet8(width=8), (noise(4, 3, 8, 8),)),
        (
            Transformer(11, 11, d_model=16, heads=2, ffn=12, encoder_layers=1, decoder_layers=1),
            (torch.randint(1, 11, (3, 5)), torch.randint(1, 11, (3, 4))),
        ),
    ],
    ids=["mlp", "resnet", "transformer"],
)
def test_any_neurons_of_a_width(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """What is left computes as the whole model does with the others' parameters at zero."""
    model.eval()
    odd = {name: torch.arange(1, size, 2) for name, size in widths_of(model).items()}
    some = SubNetwork.neurons(model, odd, name="odd")
    without = copy.deepcopy(model)
    with torch.no_grad():
        for other, parameter in zip(without.parameters(), model.parameters(), strict=True):
            mask = some.mask_of(parameter)
            assert mask is not None
            other.mul_(mask.dense(other.shape))
    with some.activate():
        torch.testing.assert_close(model(*inputs), without(*inputs))
    half = SubNetwork.width(model, 0.5, round_to=1, separate_norm=False)
    assert some.flops(*inputs) == half.flops(*inputs)


def test_neurons_names_the_widths_it_does_not_know() -> None:
    model = MLP(6, (8,), 3)
    with pytest.raises(ValueError, match=r"no width 'hiden\.0'; did you mean hidden\.0\?"):
        SubNetwork.neurons(model, {"hiden.0": torch.arange(3)}, name="few")
    with pytest.raises(ValueError, match="must be < 8, got 8"):
        SubNetwork.neurons(model, {"hidden.0": torch.arange(9)}, name="many")


def test_masks_of_parameters_that_are_gone_are_named() -> None:
    model = MLP(6, (8,), 3)
    core = SubNetwork(model, {"hidden.0.weight": pk.Prefix(4)}, name="narrow")
    layer = model.hidden[0]
    del layer.weight
    message = "'narrow' has masks of parameters that the model no longer has: hidden.0.weight; make"
    with pytest.raises(ValueError, match=message):
        SubNetwork.layers_changed([layer])
    del core

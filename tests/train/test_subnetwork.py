"""``SubNetwork``: masks by name, activation of aware and of plain modules, extraction, FLOPs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from maskedtrain import MaskedConv2d, MaskedLinear, SubNetwork, SwitchNorm
from maskedtrain.models import ResNet, resnet8
from maskedtrain.models.resnet import BasicBlock
from maskedtrain.subnetwork import active_count
from partial_kernels._core.testing import assert_zero_outside

Masks = dict[str, pk.Mask | None]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def element(*shape: int, seed: int = 0) -> pk.Element:
    return pk.Element(noise(*shape, seed=seed) > 0)


def mlp(hidden: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(MaskedLinear(6, hidden), nn.ReLU(), MaskedLinear(hidden, 3))


def narrow_mlp(model: nn.Module, mask: pk.Mask, name: str = "core") -> SubNetwork:
    """The hidden neurons that a mask of rows keeps."""
    masks: dict[type[pk.Mask], Callable[[Any], pk.Mask]] = {
        pk.Prefix: lambda m: pk.Prefix(None, m.rows),
        pk.Index: lambda m: pk.Index(None, m.rows),
    }
    return SubNetwork(model, {"0.weight": mask, "2.weight": masks[type(mask)](mask)}, name=name)


def small_resnet(**options: Any) -> ResNet:
    torch.manual_seed(0)
    return resnet8(width=8, **options)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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
        ({"0.weigth": pk.Prefix(4)}, r"no parameter '0\.weigth'; did you mean '0\.weight'\?"),
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


class Tied(nn.Module):
    """An embedding tied to the output layer, aware of masks or not."""

    def __init__(self, output: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.output = output(4, 5, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.embedding(tokens))


TOKENS = torch.tensor([[0, 3], [4, 1]])


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
    with pytest.raises(TypeError, match=r"Sequential has no width_masks\(ratio, round_to\)"):
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


# Activation of plain modules


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

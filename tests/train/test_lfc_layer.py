"""``LFCLinear``: a layer with a low-rank core, and what it becomes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import LFCLinear, SubNetwork
from maskedtrain.methods import ATS
from maskedtrain.optim import MaskedAdamW
from tests.train.toolbox import assert_equal, noise, snapshot


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(LFCLinear(12, 16, rank=3), nn.ReLU(), LFCLinear(16, 5, rank_ratio=0.4))


def core_of(model: nn.Module, name: str = "core") -> SubNetwork:
    masks = {
        f"{prefix}.weight": None for prefix, m in model.named_modules() if isinstance(m, LFCLinear)
    }
    return SubNetwork(model, masks, name=name)


def dense(layer: LFCLinear) -> Tensor:
    return (layer.weight.double() + layer.v.double() @ layer.u.double()).detach()


@pytest.mark.parametrize(
    ("ratio", "rank"), [(1 / 32, 1), (0.04, 1), (0.3, 4), (0.5, 6), (1.0, 12), (0.125, 2)]
)
def test_ranks(ratio: float, rank: int):
    # round(r * 12), to even at halves, and never 0.
    assert LFCLinear(12, 16, rank_ratio=ratio).rank == rank
    layer = LFCLinear(16, 12, rank_ratio=ratio)
    assert (layer.u.shape, layer.v.shape) == ((rank, 16), (12, rank))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of rank and rank_ratio must be given, got None and None"),
        ({"rank": 2, "rank_ratio": 0.5}, "one of rank and rank_ratio must be given, got 2 and 0.5"),
        ({"rank": 0}, r"rank must be in \[1, 4\], got 0"),
        ({"rank": 5}, r"rank must be in \[1, 4\], got 5"),
        ({"rank_ratio": 0.0}, r"rank_ratio must be in \(0, 1\], got 0.0"),
        ({"rank_ratio": 1.5}, r"rank_ratio must be in \(0, 1\], got 1.5"),
    ],
)
def test_ranks_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LFCLinear(6, 4, **options)


@pytest.mark.parametrize("tokens", [1, 50])
def test_the_super_network_and_its_core(tokens: int):
    model = network().double()
    first, _, second = model
    x = noise(tokens, 12).double()
    hidden = torch.relu(x @ dense(first).T + first.bias)
    torch.testing.assert_close(model(x), hidden @ dense(second).T + second.bias)
    with SubNetwork.full(model).activate():
        torch.testing.assert_close(model(x), hidden @ dense(second).T + second.bias)
    with core_of(model).activate():
        y = model(x)
    hidden = torch.relu(x @ first.u.T @ first.v.T + first.bias)
    torch.testing.assert_close(y, hidden @ second.u.T @ second.v.T + second.bias)


def test_the_core_never_reads_the_weight():
    model = network()
    core = core_of(model)
    x = noise(50, 12)
    with core.activate():
        expected = model(x)
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.fill_(float("nan"))
        y = model(x)
    assert torch.equal(y, expected) and y.isfinite().all()
    y.sum().backward()
    assert all(model[i].weight.grad is None for i in (0, 2))
    # 2 T K (I + O) of each layer.
    assert core.flops(x) == 2 * 50 * (3 * (12 + 16) + 2 * (16 + 5))
    assert core.numel() == 3 * (12 + 16) + 16 + 2 * (16 + 5) + 5


def test_only_the_factors_are_used_without_a_weight_and_only_the_weight_without_them():
    model = network()
    masks = {f"{i}.{name}": None for i in (0, 2) for name in ("u", "v")}
    plain = SubNetwork(model, masks, name="plain")
    x = noise(50, 12)
    with plain.activate():
        y = model(x)
    first, _, second = model
    hidden = torch.relu(nn.functional.linear(x, first.weight, first.bias))
    assert torch.equal(y, nn.functional.linear(hidden, second.weight, second.bias))
    assert torch.equal(plain.extract()(x), y)


def test_what_is_outside_counts_as_zero():
    model = network()
    x = noise(50, 12)
    # With a factor outside V U is zero; the bias follows the weight then, or stays if it is named.
    nothing = SubNetwork(model, {"0.weight": None, "0.u": None, "0.v": pk.Prefix(3)}, name="none")
    assert nothing.masks["0.bias"] is None
    biased = SubNetwork(model, {"0.weight": None, "0.v": None, "0.bias": pk.Full()}, name="biased")
    for subnet, hidden in ((nothing, torch.zeros(50, 16)), (biased, model[0].bias.expand(50, 16))):
        with subnet.activate():
            y = model(x)
        torch.testing.assert_close(y, model[2](hidden.relu()))
        torch.testing.assert_close(subnet.extract()(x), y)
    part = SubNetwork(model[0], {"u": None, "weight": pk.Prefix(5)}, name="part")
    with part.activate():
        y = model[0](x)
    torch.testing.assert_close(y, x @ model[0].weight[:5].T + model[0].bias[:5])
    assert torch.equal(part.extract()(x), y)


def test_smaller_ranks_are_nested():
    model = network()
    core = core_of(model)
    masks: dict[str, Any] = {"0.weight": None, "2.weight": None}
    masks |= {"0.u": pk.Prefix(2), "0.v": pk.Prefix(None, 2)}
    masks |= {"2.u": pk.Prefix(1), "2.v": pk.Prefix(None, 1)}
    small = SubNetwork(model, masks, name="small")
    assert small.issubset(core) and core.issubset(SubNetwork.full(model))
    assert not core.issubset(small)
    x = noise(20, 12)
    with small.activate():
        y = model(x)
    first, _, second = model
    hidden = torch.relu(x @ first.u[:2].T @ first.v[:, :2].T + first.bias)
    expected = hidden @ second.u[:1].T @ second.v[:, :1].T + second.bias
    torch.testing.assert_close(y, expected)
    extracted: Any = small.extract()
    assert torch.equal(extracted(x), y)
    assert extracted[0][0].weight.shape == (2, 12)


@pytest.mark.parametrize("mask", [pk.Prefix(5, 4), pk.Index([0, 3, 7], [1, 2]), pk.Prefix(5)])
def test_rows_and_columns_take_the_factors_along(mask: pk.Mask):
    torch.manual_seed(0)
    layer = LFCLinear(6, 8, rank=2).double()
    subnet = SubNetwork(layer, {"weight": mask}, name="narrow")
    merged = dense(layer)
    expected_weight = mask.restrict(merged)
    rows = mask.restrict(torch.arange(8.0)[:, None].expand(8, 6))[:, 0].long()
    x = noise(9, expected_weight.shape[1]).double()
    with subnet.activate():
        y = layer(x)
    torch.testing.assert_close(y, x @ expected_weight.T + layer.bias[rows])
    torch.testing.assert_close(subnet.extract()(x), y)


@pytest.mark.parametrize(
    "mask",
    [
        pk.Packed([1, 2, 40]),
        pk.Element(torch.arange(48).view(8, 6) % 3 == 0),
        pk.Block(torch.tensor([[True, False], [False, True]]), 4),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_single_elements_and_blocks_of_the_weight(mask: pk.Mask):
    torch.manual_seed(0)
    layer = LFCLinear(6, 8, rank=2).double()
    subnet = SubNetwork(layer, {"weight": mask}, name="sparse")
    x = noise(9, 6).double()
    inside = mask.dense((8, 6))
    with subnet.activate():
        y = layer(x)
    merged = layer.weight * inside + layer.v @ layer.u
    torch.testing.assert_close(y, x @ merged.T + layer.bias)
    torch.testing.assert_close(subnet.extract()(x), y)
    y.square().sum().backward()
    assert layer.weight.grad is not None and layer.v.grad is not None
    assert torch.equal(layer.weight.grad != 0, inside) and layer.v.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"weight": None, "u": pk.Prefix(1)},
            r"v must be \[O, K\] = \[8, 1\] as u says, got \[8, 2",
        ),
        ({"u": pk.Prefix(1)}, r"v must be \[O, K\] = \[8, 1\] as u says, got \[8, 2\]"),
        ({"v": pk.Prefix(3)}, r"weight must be \[O, I\] = \[3, 6\] as v and u say, got \[8, 6\]"),
        ({"weight": pk.Prefix(4), "bias": pk.Full()}, r"bias must be \[O\] = \[4\], got \[8\]"),
        ({"weight": None, "bias": pk.Prefix(1)}, r"bias must be \[O\] = \[8\], got \[1\]"),
    ],
    ids=str,
)
def test_masks_that_do_not_fit_together(masks: dict[str, pk.Mask | None], message: str):
    layer = LFCLinear(6, 8, rank=2)
    subnet = SubNetwork(layer, masks, name="x")
    with subnet.activate(), pytest.raises(ValueError, match=message):
        layer(noise(9, 6))
    with pytest.raises(ValueError, match=message):
        subnet.extract()


def test_a_union_can_be_updated():
    model = network()
    rows = SubNetwork(model, {"0.weight": pk.Prefix(8), "2.weight": pk.Prefix(None, 8)}, name="a")
    cols = SubNetwork(model, {"0.weight": pk.Prefix(None, 6)}, name="b")
    both = SubNetwork.union(rows, cols)
    assert rows.issubset(both) and cols.issubset(both)
    # Of 16 x 12, what is in the last 8 rows and the last 6 columns is in neither.
    mask = both.mask_of(model[0].weight)
    assert mask is not None and mask.numel((16, 12)) == 16 * 12 - 8 * 6


def test_what_it_becomes():
    model = network()
    layer = model[0]
    x = noise(50, 12)
    merged, core = layer.merge(), layer.core()
    assert type(merged) is nn.Linear
    assert [type(m) for m in core] == [nn.Linear, nn.Linear] and core[0].bias is None
    assert torch.equal(merged.weight, torch.addmm(layer.weight, layer.v, layer.u))
    assert torch.equal(merged(x), layer(x))
    with core_of(model).activate():
        assert torch.equal(core(x), layer(x))
    layer.weight.requires_grad_(False)
    assert layer.merge().weight.requires_grad
    layer.requires_grad_(False)
    assert not any(p.requires_grad for m in (layer.merge(), layer.core()) for p in m.parameters())
    merged.weight.data.zero_()
    core[0].weight.data.zero_()
    assert layer.u.abs().min() > 0 and layer.weight.abs().max() > 0


def test_extracted_networks():
    model = network().eval()
    full, core = SubNetwork.full(model), core_of(model)
    x = noise(50, 12)
    assert torch.equal(full.extract()(x), model(x))
    kinds = {type(m) for s in (full, core) for m in s.extract().modules()}
    assert kinds == {nn.Sequential, nn.Linear, nn.ReLU}
    with core.activate():
        expected = model(x)
    shared: Any = core.extract(share=True)
    assert torch.equal(shared(x), expected)
    with torch.no_grad():
        shared[0][0].weight.add_(1)
    assert torch.equal(shared[0][0].weight, model[0].u)
    with pytest.raises(ValueError, match=r"W \+ V U is no view"):
        full.extract(share=True)


class TestInitialisation:
    def test_variance_is_split(self):
        torch.manual_seed(0)
        layer = LFCLinear(600, 800, rank=20)
        plain = nn.Linear(600, 800)
        variance = plain.weight.var().item()
        for part in (layer.weight, layer.v @ layer.u):
            # 480,000 elements, the sums of 20 products among them dependent: a few per cent.
            assert part.var().item() == pytest.approx(variance / 2, rel=0.15)
        assert dense(layer).var().item() == pytest.approx(variance, rel=0.1)
        # In the core, inner values have the variance of x.
        assert (noise(500, 600) @ layer.u.T).var().item() == pytest.approx(1, rel=0.1)

    def test_reset_draws_anew(self):
        layer = LFCLinear(60, 80, rank=4)
        before = snapshot(layer)
        layer.reset_parameters()
        assert all(not torch.equal(before[name], p) for name, p in layer.named_parameters())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_svd_is_the_best_approximation(self, dtype: torch.dtype):
        linear = nn.Linear(20, 30, dtype=dtype)
        weight = linear.weight.detach().clone()
        layer = LFCLinear.from_linear(linear, 0.25, "svd")
        eps = torch.finfo(dtype).eps
        # Each of W, U and V is rounded, and V U sums 5 products.
        assert (dense(layer) - weight.double()).abs().max() < 4 * eps * weight.abs().max()
        sizes = torch.linalg.svdvals(weight.double())
        rest = torch.linalg.matrix_norm(layer.weight.double())
        assert rest.item() == pytest.approx(sizes[5:].norm().item(), rel=10 * eps)

    def test_zeros_change_nothing(self):
        linear = nn.Linear(20, 30)
        x = noise(50, 20)
        expected = linear(x)
        layer = LFCLinear.from_linear(linear, rank=3, init="zeros")
        assert torch.equal(layer(x), expected)
        assert layer.u.abs().sum() > 0

    def test_from_linear_keeps_what_the_layer_was(self):
        linear = nn.Linear(6, 8, bias=False, dtype=torch.float64).eval()
        linear.weight.requires_grad_(False)
        layer = LFCLinear.from_linear(linear, 0.5, "zeros", form="merged")
        assert layer.weight is linear.weight and layer.bias is None
        assert not layer.training and not layer.weight.requires_grad and layer.u.requires_grad
        assert layer.u.dtype == torch.float64 and layer.form == "merged"
        assert repr(layer) == (
            "LFCLinear(in_features=6, out_features=8, bias=False, rank=3, form='merged')"
        )
        with pytest.raises(ValueError, match="init must be one of variance_split, svd, zeros, got"):
            LFCLinear.from_linear(linear, 0.5, "random")
        before = snapshot(layer)
        with pytest.raises(TypeError, match="must have no factors yet, got an LFCLinear"):
            LFCLinear.from_linear(layer, 0.5)
        assert_equal(snapshot(layer), before)


def test_state_dicts_hold_the_parameters_alone():
    layer = LFCLinear(6, 8, rank=2)
    layer(noise(50, 6))
    assert list(layer.state_dict()) == ["weight", "bias", "u", "v"]
    other = LFCLinear(6, 8, rank=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(noise(50, 6)), layer(noise(50, 6)))


def train_step(layer: LFCLinear) -> None:
    optimizer = MaskedAdamW(layer.parameters(), lr=0.1)
    layer(noise(50, 6)).square().sum().backward()
    optimizer.step()


CHANGES: dict[str, Callable[[LFCLinear], Any]] = {
    "masked optimizer": train_step,
    "torch optimizer": lambda layer: [
        layer(noise(50, 6)).sum().backward(),
        torch.optim.SGD(layer.parameters(), lr=0.1).step(),
    ],
    "load": lambda layer: layer.load_state_dict(LFCLinear(6, 8, rank=2).state_dict()),
    "assign": lambda layer: layer.load_state_dict(
        LFCLinear(6, 8, rank=2).state_dict(), assign=True
    ),
    "to": lambda layer: layer.double(),
    "reset": lambda layer: layer.reset_parameters(),
    "replace": lambda layer: setattr(layer, "u", nn.Parameter(layer.u.detach() + 1)),
    "data": lambda layer: setattr(layer.v, "data", layer.v.data + 1),
    "data in place": lambda layer: (layer.v.data.add_(1), layer.cache.clear()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_kept_matrix_is_never_stale(change: Callable[[LFCLinear], Any]):
    layer = LFCLinear(6, 8, rank=2)
    x = noise(50, 6)
    with torch.no_grad():
        layer(x)
        before = dense(layer)
        change_with_grad(change, layer)
        assert change is CHANGES["to"] or not torch.allclose(dense(layer), before)
        for _ in range(2):
            y = layer(x.to(layer.weight.dtype))
            torch.testing.assert_close(y, layer.merge()(x.to(layer.weight.dtype)))


@torch.enable_grad()
def change_with_grad(change: Callable[[LFCLinear], Any], layer: LFCLinear) -> None:
    change(layer)


def test_sub_networks_do_not_mix_their_matrices_up():
    torch.manual_seed(0)
    layer = LFCLinear(6, 8, rank=2)
    subnets = [
        SubNetwork(layer, masks, name=name)
        for name, masks in {
            "full": {},
            "core": {"weight": None},
            "narrow": {"weight": pk.Prefix(5)},
            "smaller": {"u": pk.Prefix(1), "v": pk.Prefix(None, 1)},
            "plain": {"u": None},
        }.items()
    ]
    x = noise(50, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.merge()(x))
        held = layer.cache._held
        for subnet in (*subnets, *reversed(subnets)):
            with subnet.activate():
                torch.testing.assert_close(layer(x), subnet.extract()(x))
            torch.testing.assert_close(layer(x), layer.merge()(x))
        assert layer.cache._held is held


def test_a_layer_that_is_moved_leaves_no_matrix_behind():
    layer = LFCLinear(6, 8, rank=2)
    layer(noise(50, 6))
    assert layer.cache._held is not None
    layer.to("meta")
    assert layer.cache._held is None


def test_copies_have_their_own_matrix():
    layer = LFCLinear(6, 8, rank=2)
    x = noise(50, 6)
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.weight.add_(1)
        assert not torch.equal(twin(x), layer(x))
        torch.testing.assert_close(layer(x), layer.merge()(x))


def test_alternating_training_touches_the_core_alone():
    model = network()
    full, core = SubNetwork.full(model), core_of(model)
    method = ATS([full, core])
    optimizer = MaskedAdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    x, targets = noise(50, 12), torch.arange(50) % 5
    losses: dict[str, list[float]] = {"full": [], "core": []}
    for step in range(60):
        before = snapshot(model)
        plan = method.plan(step)
        found = plan.backward(lambda: nn.functional.cross_entropy(model(x), targets))
        optimizer.step(plan.update)
        optimizer.zero_grad()
        for name, loss in found.items():
            losses[name].append(loss.item())
        if step % 2:
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name]) == name.endswith(".weight"), name
    assert all(found[-1] < 0.7 * found[0] for found in losses.values())

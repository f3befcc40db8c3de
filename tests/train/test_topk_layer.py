"""``TopKLinear``: nn.Linear outside of training, meProp's backward in it, in any sub-network."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from maskedtrain import LFCLinear, MaskedLinear, SubNetwork, TopKLinear
from maskedtrain.layers.topk import kept_count
from partial_kernels._core.testing import assert_zero_outside
from tests.train.toolbox import (
    active_results,
    assert_equal,
    gradients,
    integers,
    noise,
    results,
    snapshot,
)

T, O, I = 7, 12, 5
both = pytest.mark.parametrize("per", ["row", "batch"])


def pair(**options: Any) -> tuple[TopKLinear, nn.Linear]:
    """A layer, and nn.Linear with the same values."""
    torch.manual_seed(0)
    plain = nn.Linear(I, O)
    return TopKLinear.from_linear(copy.deepcopy(plain), **{"k": 3, **options}), plain


def kept(dy_TO: Tensor, k: int, per: str) -> Tensor:
    """dy where meProp keeps it, by torch alone."""
    size = dy_TO.abs() if per == "row" else dy_TO.abs().sum(0).expand(dy_TO.shape)
    # At the same place in every row: the first of equal ones.
    index = size.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(dy_TO).scatter(1, index, dy_TO.gather(1, index))


@both
@pytest.mark.parametrize("k", [O, O + 7, 1.0])
def test_with_all_outputs_it_is_back_propagation_bit_for_bit(per: str, k: float) -> None:
    layer, plain = pair(k=k, per=per)
    x = noise(2, T, I)
    assert_equal(results(layer, x), results(plain, x))


@both
@pytest.mark.parametrize("k", [3, 0.25])
@pytest.mark.parametrize("bias_grad", ["full", "topk"])
def test_gradients_are_the_ops_and_the_papers(per: str, k: float, bias_grad: str) -> None:
    layer, _ = pair(k=k, per=per, bias_grad=bias_grad)
    layer.double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed))
    x = integers(T, I, seed=7)
    found = results(layer, x)
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias)]
    y = pk.topk_linear(*leaves, k=3, per=per, bias_grad=bias_grad)
    dy = integers(T, O, seed=99)
    grads = torch.autograd.grad(y, leaves, dy)
    assert_equal(found, dict(zip(("y", "x", "weight", "bias"), (y.detach(), *grads), strict=True)))
    some = kept(dy, 3, per)
    assert torch.equal(found["x"], some @ layer.weight)
    assert torch.equal(found["weight"], some.T @ x)
    assert torch.equal(found["bias"], (some if bias_grad == "topk" else dy).sum(0))
    assert some.any() and not torch.equal(some, dy)


@both
def test_outside_of_training_it_is_nn_linear_bit_for_bit(per: str) -> None:
    layer, plain = pair(per=per)
    x = noise(2, T, I)
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    # Gradients in evaluation mode are all there.
    assert_equal(results(layer.eval(), x), results(plain.eval(), x))
    assert not torch.equal(results(layer.train(), x)["x"], results(plain, x)["x"])


def test_checkpoints_fit_nn_linear_and_back() -> None:
    layer, plain = pair()
    assert list(layer.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        layer.weight.add_(1)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.weight, layer.weight)
    fresh = TopKLinear(I, O, k=3)
    fresh.load_state_dict(plain.state_dict())
    assert_equal(snapshot(fresh), snapshot(plain))
    torch.manual_seed(0)
    made = TopKLinear(I, O, k=3, dtype=torch.float64)
    torch.manual_seed(0)
    assert_equal(snapshot(made), snapshot(nn.Linear(I, O, dtype=torch.float64)))


@pytest.mark.parametrize("kind", [nn.Linear, MaskedLinear])
def test_from_linear_is_over_the_same_parameters(kind: type[nn.Linear]) -> None:
    linear = kind(I, O, bias=False).eval()
    linear.weight.requires_grad_(False)
    layer = TopKLinear.from_linear(linear, 0.5, per="batch", weight_grad="rows")
    assert layer.weight is linear.weight and layer.bias is None
    assert not layer.training and not layer.weight.requires_grad
    again = TopKLinear.from_linear(layer, 2)
    assert again.weight is linear.weight and (again.k, again.per) == (2, "row")
    assert repr(layer) == (
        "TopKLinear(in_features=5, out_features=12, bias=False, k=0.5, per='batch', "
        "weight_grad='rows')"
    )
    assert repr(again).endswith("bias=False, k=2, per='row')")


def test_from_linear_loses_nothing() -> None:
    with pytest.raises(TypeError, match="got a LFCLinear with a behaviour of its own"):
        TopKLinear.from_linear(LFCLinear(I, O, rank=2), 3)
    pruned = nn.Linear(I, O)
    prune.identity(pruned, "weight")
    with pytest.raises(TypeError, match="computes its weight or bias from bias, weight_orig"):
        TopKLinear.from_linear(pruned, 3)


@pytest.mark.parametrize(
    ("k", "total", "count"),
    [(3, 12, 3), (30, 12, 12), (0.25, 12, 3), (0.01, 12, 1), (1.0, 12, 12), (0.05, 500, 25)],
)
def test_counts_and_shares(k: float, total: int, count: int) -> None:
    assert kept_count(k, total) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"k": k}, r"k must be a count, an int >= 1, or a share, a float in \(0, 1\], got ")
            for k in (0, -1, 0.0, 1.5, float("nan"), True, "3", None)
        ),
        ({"per": "token"}, "per must be"),
        ({"weight_grad": "sparse"}, "weight_grad must be"),
        ({"bias_grad": "none"}, "bias_grad must be"),
        ({"weight_grad": "rows"}, 'weight_grad="rows" needs per="batch"'),
    ],
)
def test_options_are_checked_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKLinear(I, O, **{"k": 3, **options})
    with pytest.raises(ValueError, match=message):
        TopKLinear.from_linear(nn.Linear(I, O), **{"k": 3, **options})


# In sub-networks


@both
@pytest.mark.parametrize(
    "mask",
    [
        pk.Full(),
        pk.Prefix(6, 4),
        pk.Prefix(2),
        pk.Index([0, 3, 4, 7, 11], [1, 4]),
        pk.Block(torch.tensor([[True, False], [False, True], [True, True]]), 4),
        pk.Element(integers(O, I) > 0),
        pk.Packed([0, 1, 8, 13, 40]),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_a_sub_network_trains_by_the_outputs_it_has(per: str, mask: Any) -> None:
    layer, _ = pair(k=0.25, per=per)
    layer.double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed))
    subnet = SubNetwork(layer, {"weight": mask}, name="part")
    part = mask.restrict(layer.weight.detach())
    rows, cols = part.shape
    x, dy = integers(T, cols, seed=7), integers(T, rows, seed=99)
    found = active_results(subnet, x)
    some = kept(dy, max(1, round(0.25 * rows)), per)
    assert torch.equal(found["y"], F.linear(x, part, subnet.masks["bias"].restrict(layer.bias)))  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.equal(found["x"], some @ part)
    inside = mask.dense((O, I))
    dense = torch.zeros(O, I).double()
    # Row by row, as the part has them.
    dense[inside] = (some.T @ x)[mask.restrict(inside.double()).bool()]
    assert torch.equal(found["weight"], dense)
    assert_zero_outside(found["weight"], inside, what="weight")
    extracted = subnet.extract()
    assert type(extracted) is nn.Linear
    assert torch.equal(extracted(x), found["y"])


def test_a_weight_outside_leaves_the_bias() -> None:
    layer, _ = pair()
    subnet = SubNetwork(layer, {"weight": None, "bias": pk.Full()}, name="bias")
    found = active_results(subnet, noise(T, I))
    assert torch.equal(found["y"], layer.bias.expand(T, O))
    assert torch.equal(found["bias"], integers(T, O, seed=99).sum(0).float())
    assert "weight" not in found


def test_rows_of_a_part_of_the_weight() -> None:
    layer, _ = pair(per="batch", weight_grad="rows")
    core = SubNetwork(layer, {"weight": pk.Prefix(6)}, name="core")
    with (
        core.activate(),
        pytest.raises(ValueError, match=r"trains the whole weight, got the mask Prefix.* of 'core"),
    ):
        layer(noise(T, I))
    with core.activate(), torch.no_grad():
        assert layer(noise(T, I)).shape == (T, 6)
    full = active_results(SubNetwork.full(layer), noise(T, I))
    assert full["weight"].is_sparse


# What else a layer must do


def test_row_sparse_gradients_in_a_stock_optimizer() -> None:
    sparse, _ = pair(per="batch", weight_grad="rows")
    dense, _ = pair(per="batch")
    for layer in (sparse, dense):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for seed in range(3):
            layer(noise(T, I, seed=seed)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(snapshot(sparse), snapshot(dense))


@both
def test_flops_are_the_share_that_is_kept(per: str) -> None:
    layer, _ = pair(per=per)
    x = noise(T, I).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * T * O * I
    assert backward.get_total_flops() == 2 * (2 * T * 3 * I)
    full = SubNetwork.full(layer)
    # Of a first layer there is no dx.
    assert full.flops(x.detach(), training=True) == 2 * T * O * I + 2 * T * 3 * I
    layer.eval()
    assert full.flops(x.detach(), training=True) == 2 * (2 * T * O * I)


@both
def test_copies(per: str) -> None:
    layer, _ = pair(per=per, bias_grad="topk")
    x = noise(T, I)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert_equal(results(twin, x), results(layer, x))
        with torch.no_grad():
            twin.weight.add_(1)
        assert not torch.equal(twin(x), layer(x))


@both
@pytest.mark.parametrize("mask", [None, pk.Full(), pk.Prefix(8, 4)], ids=str)
# Dynamo makes instances of autograd.Function, against torch's advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_into_one_graph(per: str, mask: pk.Mask | None) -> None:
    torch._dynamo.reset()
    layer, _ = pair(k=0.25, per=per)
    x = noise(T, 4 if isinstance(mask, pk.Prefix) else I)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    subnet = SubNetwork(layer, {} if mask is None else {"weight": mask}, name="part")
    found, expected = [
        results(module, x) if mask is None else _active(subnet, module, x)
        for module in (compiled, layer)
    ]
    for name, value in expected.items():
        key = name if name in found else f"_orig_mod.{name}"
        torch.testing.assert_close(found[key], value)


def _active(subnet: SubNetwork, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with subnet.activate():
        return results(module, x)


@both
def test_autocast(per: str) -> None:
    layer, plain = pair(per=per)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(noise(T, I))
        assert torch.equal(y, plain(noise(T, I)))
    y.float().sum().backward()
    assert {grad.dtype for grad in gradients(layer).values()} == {torch.float32}

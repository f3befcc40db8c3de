"""``FishMask``: which elements, what is left alone, packed and unpacked, what a step costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskedtrain.methods.fish import FishMask
from maskedtrain.methods.fisher import fisher_scores
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from tests.train.fish_toolbox import (
    ALL,
    HEAD,
    I,
    batches,
    inside,
    mlp,
    plain_weights,
    prepared,
    run,
)
from tests.train.toolbox import assert_equal, noise, snapshot

# Which elements


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_the_mask_is_the_largest_scores_and_the_head(kind: Any, packed: bool) -> None:
    method = prepared(mlp(), kind=kind, packed=packed)
    scores = fisher_scores(mlp(), batches(), examples=20, kind=kind)
    budget = round(0.2 * ALL)
    others = {name: s for name, s in scores.items() if not name.startswith("output")}
    cut = torch.cat([s.flatten() for s in others.values()]).sort().values[-(budget - HEAD)]
    expected = {
        n: s >= cut if n in others else torch.ones_like(s).bool() for n, s in scores.items()
    }
    assert_equal(inside(method), expected)
    assert method.budget == budget == method.plan(0).update.numel()
    assert sum(int(mask.sum()) for mask in expected.values()) == budget


@pytest.mark.parametrize("packed", [True, False])
def test_of_equal_scores_the_first_are_taken(packed: bool) -> None:
    """Equal features give the columns of the first layer equal scores."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False))
    x = torch.ones(6, 1).expand(6, 4)
    scores = fisher_scores(model, [(x, torch.arange(6) % 2)], examples=6)["0.weight"]
    assert (scores == scores[:, :1]).all() and scores[0, 0] != scores[1, 0]
    # The head's 4 and 2 of the 4 that are equal and largest.
    method = FishMask(model, 6 / 12, examples=6, packed=packed)
    method.prepare([(x, torch.arange(6) % 2)])
    row = int(scores[:, 0].argmax())
    assert method.state_dict()["positions"]["0.weight"].tolist() == [4 * row, 4 * row + 1]


def test_the_head_is_the_output_layer_or_what_is_named() -> None:
    def in_full(method: FishMask) -> set[str]:
        return {n for n, m in inside(method).items() if m.all()}

    assert in_full(prepared(mlp())) == {"output.weight", "output.bias"}
    method = prepared(mlp(), 0.6, head=["hidden.1", "out*"])
    assert in_full(method) >= {"hidden.1.weight", "hidden.1.bias", "output.weight", "output.bias"}
    assert method.plan(0).update.numel() == round(0.6 * ALL)


def test_a_head_may_be_all_that_is_trained() -> None:
    method = prepared(mlp(), HEAD / ALL)
    assert method.plan(0).update.numel() == HEAD
    start = snapshot(mlp())
    run(method, MaskedSGD(method.model.parameters(), lr=0.1), range(2))
    moved = {n for n, w in plain_weights(method).items() if not torch.equal(w, start[n])}
    assert moved == {"output.weight", "output.bias"}


def test_a_head_beyond_the_budget_is_refused_with_the_numbers() -> None:
    message = r"the head has 44 parameters, and ratio 0.05 of 514 keeps 26: it must be >= 0.086"
    with pytest.raises(ValueError, match=message):
        FishMask(mlp(), 0.05)


def test_frozen_parameters_are_no_part_of_it() -> None:
    model = mlp()
    model.hidden[0].requires_grad_(False)
    method = prepared(model)
    assert method.budget == round(0.2 * (ALL - 12 * 20 - 20))
    assert not any(name.startswith("hidden.0") for name in method.state_dict()["positions"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"examples": 0}, "examples must be >= 1, got 0"),
        ({"kind": "both"}, 'kind must be "empirical" or "true", got \'both\''),
        ({"redraw_every": 0}, "redraw_every must be >= 1 or None, got 0"),
        ({"head": "output"}, "head must be a list of patterns, got 'output'"),
        ({"head": ["fc"]}, "head: 'fc' matches no module with a trained parameter"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    model = mlp()
    before = list(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        FishMask(model, **options)
    assert all(a[1] is b[1] for a, b in zip(before, model.named_parameters(), strict=True))


def test_a_model_without_linear_layers_needs_a_head() -> None:
    with pytest.raises(ValueError, match="no linear layer to be its head; name one"):
        FishMask(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_it_needs_data_first_and_enough_of_them() -> None:
    method = FishMask(mlp(), 0.2, examples=20)
    with pytest.raises(RuntimeError, match=r"call prepare\(batches\) first"):
        method.plan(0)
    assert method.state_dict() == {"draws": 0, "positions": {}}
    with pytest.raises(ValueError, match="examples must be <= 16"):
        method.prepare(itertools.islice(batches(), 2))


# What is trained, what stays

OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (MaskedSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (MaskedSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adamw": (MaskedAdamW, {"lr": 0.01, "weight_decay": 0.3}),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outside_the_mask_nothing_moves_by_a_bit(name: str, packed: bool) -> None:
    """Where the gradient alone is masked, decay moves the rest; here decay and momentum act on the
    mask alone, also on elements whose gradient is 0 at a step.
    """
    make, options = OPTIMIZERS[name]
    method, start = prepared(mlp(), packed=packed), snapshot(mlp())
    masks = inside(method)
    run(method, make(method.model.parameters(), **options), range(5))
    for key, weight in plain_weights(method).items():
        assert torch.equal(weight[~masks[key]], start[key][~masks[key]]), key
        assert (weight[masks[key]] != start[key][masks[key]]).all(), key


def test_masking_the_gradient_alone_would_move_the_rest() -> None:
    """What the test above would find: the order of the authors' code."""
    model, masks = mlp(), inside(prepared(mlp()))
    start, (x, y) = snapshot(model), next(batches(seed=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    F.cross_entropy(model(x), y).backward()
    for key, parameter in model.named_parameters():
        parameter.grad *= masks[key]
    optimizer.step()
    key = "hidden.0.weight"
    assert not torch.equal(model.hidden[0].weight[~masks[key]], start[key][~masks[key]])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inside_it_is_torchs_optimizer(name: str, packed: bool) -> None:
    """Which sees the whole gradient and whose other elements are put back after every step."""
    _, options = OPTIMIZERS[name]
    make = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    method, model = prepared(mlp().double(), packed=packed), mlp().double()
    masks, start = inside(method), snapshot(model)
    optimizer = make(model.parameters(), **options)
    for x, y in itertools.islice(batches(seed=1, dtype=torch.float64), 5):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(torch.where(masks[key], parameter, start[key]))
    run(method, OPTIMIZERS[name][0](method.model.parameters(), **options), range(5))
    for key, weight in plain_weights(method).items():
        # fp64, sums in another order.
        torch.testing.assert_close(weight, snapshot(model)[key], rtol=1e-9, atol=1e-12)


def test_packed_and_unpacked_agree_exactly_where_sums_are_exact() -> None:
    """Small integers in fp64, SGD without decay."""
    found: list[dict[str, Tensor]] = []
    for packed in (True, False):
        model = mlp().double()
        method = prepared(model, 0.3, packed=packed)
        for parameter in [*model.parameters(), *model.buffers()]:
            if parameter.is_floating_point():
                parameter.data = (parameter.data * 4).round()
        optimizer = MaskedSGD(model.parameters(), lr=0.125)
        for step in range(2):
            x = noise(5, I, seed=step).mul(2).round().double()
            plan = method.plan(step)
            plan.backward(lambda: model(x).square().sum())  # noqa: B023
            optimizer.step(plan.update)
            optimizer.zero_grad()
        found.append(plain_weights(method))
    assert_equal(*found)
    assert not torch.equal(
        found[0]["hidden.0.weight"], (mlp().hidden[0].weight * 4).round().double()
    )


def test_gradients_and_states_have_as_many_elements_as_are_trained() -> None:
    method = prepared(mlp())
    optimizer = MaskedAdamW(method.model.parameters(), lr=0.01)
    plan = method.plan(0)
    x, y = next(batches())
    plan.backward(lambda: F.cross_entropy(method.model(x), y))
    optimizer.step(plan.update)
    grads = [p.grad for p in method.model.parameters() if p.grad is not None]
    assert sum(grad.numel() for grad in grads) == method.budget
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    assert sum(t.numel() for t in state) == 2 * method.budget


# What it costs


def test_a_step_costs_forward_dx_and_the_sampled_gradient() -> None:
    method = prepared(mlp())
    x, y = next(batches(16))
    first, second, head = 2 * 16 * 12 * 20, 2 * 16 * 20 * 10, 2 * 16 * 10 * 4
    positions = method.state_dict()["positions"]
    sampled = 2 * 16 * sum(len(positions[f"hidden.{i}.weight"]) for i in (0, 1))
    plan = method.plan(0)
    with FlopCounterMode(display=False) as counter:
        plan.backward(lambda: F.cross_entropy(method.model(x), y))
    # The first layer has no gradient of its inputs.
    expected = (first + second + head) + (second + head) + head + sampled
    assert counter.get_total_flops() == expected == plan.flops(x)

"""Dropout's draws: what they depend on, their distribution, and the means that follow from it.

Networks are so small that every set that can be drawn is, and means over the draws are exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import SubNetwork
from maskedtrain.methods import ElementDropout, NeuronDropout
from maskedtrain.methods.base import Pass
from maskedtrain.models import MLP
from maskedtrain.theory.criteria import Criteria, Measured, measure
from tests.train.toolbox import noise

Dropout = NeuronDropout | ElementDropout


def mlp(*hidden: int, inputs: int = 3) -> Any:
    torch.manual_seed(0)
    return MLP(inputs, hidden, 2).double()


def neurons(model: nn.Module, **options: Any) -> NeuronDropout:
    return NeuronDropout(model, **{"keep": 0.5, "round_to": 1, **options})


def positions(drawn: SubNetwork) -> tuple[tuple[int, ...], ...]:
    """The neurons that stay, of each hidden layer of an MLP."""
    masks = (drawn.masks[name] for name in drawn.masks if name.startswith("hidden"))
    rows = [mask.rows for mask in masks if isinstance(mask, pk.Index) and mask.rows is not None]
    # Of weight and bias.
    return tuple(tuple(row.tolist()) for row in rows[::2])


def elements(drawn: SubNetwork) -> tuple[bool, ...]:
    """Which elements stay."""
    found = [m.mask.flatten() for m in drawn.masks.values() if isinstance(m, pk.Element)]
    return tuple(torch.cat(found).tolist())


def counted(
    method: Dropout, key: Callable[[SubNetwork], Hashable], draws: int
) -> tuple[Counter[Any], dict[Any, Pass]]:
    """How often each network is drawn, and a pass that runs it."""
    counts: Counter[Any] = Counter()
    passes: dict[Any, Pass] = {}
    for step in range(draws):
        (item,) = method.plan(step).passes
        drawn = key(item.subnet)
        counts[drawn] += 1
        passes.setdefault(drawn, item)
    return counts, passes


def assert_distributed(counts: Counter[Any], probabilities: dict[Any, float]) -> None:
    """Pearson's chi-square: a right draw fails at one seed in a million, and seeds are fixed."""
    assert counts.keys() <= probabilities.keys()
    assert sum(probabilities.values()) == pytest.approx(1, rel=1e-12)
    total, statistic = counts.total(), 0.0
    for drawn, probability in probabilities.items():
        expected = total * probability
        # Below, the statistic is not chi-square's.
        assert expected > 5
        statistic += (counts[drawn] - expected) ** 2 / expected
    freedom = torch.tensor((len(probabilities) - 1) / 2, dtype=torch.float64)
    tail = torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64))
    assert tail > 1e-6, statistic


def same(first: SubNetwork, second: SubNetwork) -> bool:
    return first.masks == second.masks


KINDS: dict[str, Callable[..., Dropout]] = {
    "exact": neurons,
    "bernoulli": lambda model, **options: neurons(model, count="bernoulli", **options),
    "elements": ElementDropout,
}


# What a draw depends on


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_depends_on_seed_and_step_alone(kind: str) -> None:
    make = KINDS[kind]
    method, again = make(mlp(20, 10), seed=7), make(mlp(20, 10), seed=7)
    drawn = [method.plan(step).update for step in range(6)]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for step in (5, 0, 3, 3):
        assert same(again.plan(step).update, drawn[step])
        assert same(method.plan(step).update, drawn[step])
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(same(drawn[i], drawn[j]) for i in range(6) for j in range(i))
    assert not same(make(mlp(20, 10), seed=8).plan(0).update, drawn[0])
    # Seed and step are no sum of each other.
    assert not same(make(mlp(20, 10), seed=8).plan(2).update, drawn[3])
    assert method.state_dict() == {}


# Distributions


def test_all_sets_of_so_many_neurons_are_equally_likely_in_every_width_by_itself() -> None:
    counts, _ = counted(neurons(mlp(4, 4)), positions, 1500)
    pairs = [(i, j) for j in range(4) for i in range(j)]
    assert_distributed(counts, dict.fromkeys(product(pairs, repeat=2), 1 / 36))


def test_bernoulli_draws_each_neuron_by_itself_and_one_where_none_is_left() -> None:
    keep = 0.4
    counts, _ = counted(neurons(mlp(4), keep=keep, count="bernoulli"), positions, 1500)
    expected: dict[Any, float] = {}
    for kept in product((False, True), repeat=4):
        probability = math.prod(keep if k else 1 - keep for k in kept)
        some = tuple(i for i in range(4) if kept[i])
        for stays in [some] if some else [(i,) for i in range(4)]:
            share = 1 if some else 1 / 4
            expected[(stays,)] = expected.get((stays,), 0.0) + probability * share
    assert_distributed(counts, expected)


def test_at_least_one_neuron_stays() -> None:
    counts, _ = counted(neurons(mlp(3), keep=0.01, count="bernoulli"), positions, 200)
    assert set(counts) == {((0,),), ((1,),), ((2,),)}


@pytest.mark.parametrize("kind", ["bernoulli", "elements"])
def test_kept_numbers_average_to_keep(kind: str) -> None:
    method = KINDS[kind](mlp(120, inputs=2), keep=0.3)
    draws, total = 200, 120 if kind == "bernoulli" else 120 * 2 + 120 * 2
    kept = [
        len(positions(drawn)[0]) if kind == "bernoulli" else sum(elements(drawn))
        for drawn in (method.draw(step) for step in range(draws))
    ]
    # Five standard errors of a binomial's mean: a right draw fails at one seed in two million.
    allowed = 5 * math.sqrt(total * 0.3 * 0.7 / draws)
    assert abs(sum(kept) / draws - 0.3 * total) < allowed
    variance = float(torch.tensor(kept).double().var())
    # The standard error of a variance of so many nearly normal draws is sqrt(2 / draws) of it.
    assert variance == pytest.approx(total * 0.3 * 0.7, rel=5 * math.sqrt(2 / draws))


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, [48, 16]),
        ({"round_to": 1}, [50, 20]),
        ({"keep": 0.25}, [32, 16]),
        ({"keep": 1.0}, [100, 40]),
        ({"keep": 0.001}, [1, 1]),
        ({"widths": ["hidden.1"], "round_to": 4}, [100, 20]),
    ],
)
def test_an_exact_number_is_the_same_at_every_step(
    options: dict[str, Any], counts: list[int]
) -> None:
    method = NeuronDropout(mlp(100, 40), **{"keep": 0.5, **options})
    for step in range(5):
        drawn = method.draw(step)
        shapes = [drawn.masks[f"hidden.{i}.bias"] for i in (0, 1)]
        kept = [mask.numel((n,)) for mask, n in zip(shapes, (100, 40), strict=True) if mask]
        assert kept == counts


# Means over all that can be drawn


def half_of(hidden: tuple[int, ...]) -> tuple[Any, dict[Any, Pass]]:
    """Every network of half the neurons of each layer, equally likely, without rescaling."""
    model = mlp(*hidden)
    _, passes = counted(neurons(model, rescale=False), positions, 600)
    assert len(passes) == math.prod(math.comb(n, n // 2) for n in hidden)
    return model, passes


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    x, y = noise(16, 3, seed=1).double(), torch.arange(16) % 2
    return lambda: F.cross_entropy(model(x), y)


def of_neurons(measured: Measured) -> Criteria:
    """Of the parameters that are rows or columns of neurons: all but the last bias."""
    found = [c for name, c in measured.by_parameter.items() if name != "output.bias"]
    return sum(found, start=Criteria(0.0, 0.0, 0.0, 0.0))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def test_of_one_width_the_mean_c_norm_squared_is_at_least_one_by_keep() -> None:
    model, passes = half_of((6,))
    found = [measure(model, item, loss_of(model)) for item in passes.values()]
    kept = [of_neurons(measured) for measured in found]
    assert mean([c.masked_sq for c in kept]) == pytest.approx(kept[0].sq / 2, rel=1e-12)
    assert mean([c.c_norm**2 for c in kept]) > 2.01
    # What belongs to no neuron is always there.
    assert all(measured.by_parameter["output.bias"].c_norm == 1 for measured in found)


def test_of_equal_neurons_c_norm_squared_is_one_by_keep() -> None:
    """The paper's equality: groups of one norm."""
    model, passes = half_of((6,))
    with torch.no_grad():
        model.hidden[0].weight[:] = model.hidden[0].weight[0].clone()
        model.hidden[0].bias[:] = 1.0
        model.output.weight[:] = model.output.weight[:, :1].clone()
    for item in passes.values():
        criteria = of_neurons(measure(model, item, loss_of(model)))
        assert criteria.c_norm**2 == pytest.approx(2, rel=1e-12)


def test_between_two_widths_an_element_stays_with_the_square_of_keep() -> None:
    model, passes = half_of((4, 4))
    found = [measure(model, item, loss_of(model)) for item in passes.values()]
    shares = {"hidden.0.weight": 2, "hidden.0.bias": 2, "hidden.1.weight": 4, "output.weight": 2}
    for name, factor in shares.items():
        criteria = [measured.by_parameter[name] for measured in found]
        expected = criteria[0].sq / factor
        assert expected > 0
        assert mean([c.masked_sq for c in criteria]) == pytest.approx(expected, rel=1e-12)
    assert mean([of_neurons(measured).c_norm ** 2 for measured in found]) > 2.01


def one_layer() -> Any:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def every_element_mask(**options: Any) -> tuple[Any, dict[Any, Pass]]:
    """All 64 masks of 2 x 3 elements, equally likely."""
    model = one_layer()
    counts, passes = counted(ElementDropout(model, 0.5, **options), elements, 1000)
    assert_distributed(counts, dict.fromkeys(product((False, True), repeat=6), 1 / 64))
    return model, passes


def test_of_elements_too() -> None:
    model, passes = every_element_mask(rescale=False)
    kept = [measure(model, item, loss_of(model)).by_parameter["weight"] for item in passes.values()]
    assert mean([c.masked_sq for c in kept]) == pytest.approx(kept[0].sq / 2, rel=1e-12)
    # Jensen's inequality, where there is something left to divide by.
    some = [c for c in kept if c.masked_sq > 0]
    assert len(some) == 63
    assert mean([c.masked_sq for c in some]) == pytest.approx(kept[0].sq / 2 * 64 / 63, rel=1e-12)
    assert mean([c.c_norm**2 for c in some]) > 2 * 63 / 64 * 1.01


def mean_output(passes: dict[Any, Pass], model: nn.Module, x: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    for item in passes.values():
        with item.perturbed(), item.subnet.activate(), torch.no_grad():
            outputs.append(model(x))
    return torch.stack(outputs).mean(0)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_rescaled_linear_network_is_right_on_average(rescale: bool) -> None:
    """Positive weights of positive inputs: what ReLU does not change."""
    model = mlp(4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    x = noise(5, 3).double().abs()
    _, passes = counted(neurons(model, rescale=rescale), positions, 600)
    assert len(passes) == 36
    found, expected = mean_output(passes, model, x), model(x).detach()
    if rescale:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    else:
        assert (found < 0.8 * expected).all()


@pytest.mark.parametrize("rescale", [True, False])
def test_so_is_a_layer_of_rescaled_weights(rescale: bool) -> None:
    model, passes = every_element_mask(rescale=rescale)
    x = noise(5, 3).double()
    found = mean_output(passes, model, x)
    whole = F.linear(x, model.weight * (1.0 if rescale else 0.5), model.bias)
    # Values near 1, each the mean of 64.
    torch.testing.assert_close(found, whole.detach(), rtol=0, atol=1e-14)

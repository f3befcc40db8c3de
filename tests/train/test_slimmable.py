"""Slimmable training by the sandwich rule."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskedtrain import SubNetwork
from maskedtrain.methods import Slimmable
from maskedtrain.methods.slimmable import Config
from maskedtrain.models import MLP

RATIOS = {"full": 1.0, "a": 0.75, "b": 0.5, "c": 0.25, "d": 0.125}


def networks() -> list[SubNetwork]:
    model = MLP(8, (64,), 4)
    return [
        SubNetwork.full(model) if ratio == 1 else SubNetwork.width(model, ratio, name=name)
        for name, ratio in RATIOS.items()
    ]


def names(method: Slimmable, step: int) -> list[str]:
    return [item.subnet.name for item in method.plan(step).passes]


def test_all_networks_are_trained_where_nothing_is_said() -> None:
    assert names(Slimmable(networks()), 7) == list(RATIOS)


def test_the_ends_and_some_between() -> None:
    method = Slimmable(networks(), sandwich=2)
    counts: Counter[str] = Counter()
    for step in range(300):
        largest, smallest, *others = names(method, step)
        assert (largest, smallest) == ("full", "d")
        assert len(set(others)) == 2
        counts.update(others)
    # 200 each of 600; a standard deviation is 8.
    assert all(160 < counts[name] < 240 for name in "abc")


def test_draws_depend_on_the_seed_and_the_step_alone() -> None:
    subnets = networks()
    first, again = (Slimmable(subnets, sandwich=1) for _ in range(2))
    drawn = [names(first, step) for step in range(50)]
    assert [names(again, step) for step in reversed(range(50))] == drawn[::-1]
    other = Slimmable(subnets, sandwich=1, seed=1)
    assert [names(other, step) for step in range(50)] != drawn


def test_the_gradient_is_the_sum_and_so_is_the_cost() -> None:
    subnets = networks()
    model = subnets[0].model
    x = torch.randn(6, 8)
    plan = Slimmable(subnets, sandwich=1).plan(0)
    with FlopCounterMode(display=False) as counter:
        plan.backward(lambda: model(x).square().mean())
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with FlopCounterMode(display=False) as expected:
        for item in plan.passes:
            with item.subnet.activate():
                model(x).square().mean().backward()
    assert counter.get_total_flops() == expected.get_total_flops()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    assert plan.update.numel() == subnets[0].numel()


def test_two_networks_have_none_between() -> None:
    full, core, *_ = networks()
    assert names(Slimmable([core, full], sandwich=0), 3) == ["full", "a"]
    with pytest.raises(ValueError, match="from 0 to the 0 networks between"):
        Slimmable([full, core], sandwich=1)
    with pytest.raises(ValueError, match=r"from 0 to the 3 networks between .*, got -1"):
        Slimmable(networks(), sandwich=-1)


def test_the_command_line_builds_it() -> None:
    method = Config(ratios=(0.75, 0.5, 0.25), sandwich=1).build(MLP(8, (64,), 4))
    assert len(method.plan(0).passes) == 3

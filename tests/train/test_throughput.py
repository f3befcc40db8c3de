"""What steps cost, by network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from maskedtrain import SubNetwork
from maskedtrain.methods import Pass, Plan
from maskedtrain.training.throughput import Meter, Stretch, matmul_flops_per_s

MODEL = nn.Linear(3, 2)
FULL = SubNetwork.full(MODEL)
CORE = SubNetwork(MODEL, {"bias": None}, name="core")
FLOPS = {"full": 100, "core": 10}


def plan(*passes: Pass) -> Plan:
    return Plan(passes, update=passes[0].subnet)


def batch_flops(plan: Plan) -> Callable[[list[int]], int]:
    (one,) = plan.passes
    return lambda inputs: FLOPS[one.subnet.name] * len(inputs)


def took(seconds: float) -> Callable[[], float]:
    return lambda: seconds


def batches(count: int) -> Iterator[Any]:
    return iter([([0] * 3, torch.tensor([1, 2, -100]))] * count)


def test_a_network_is_charged_for_its_own_steps() -> None:
    meter = Meter(batch_flops, peak_flops_per_s=1000.0)
    stream = meter.seen(batches(5))
    next(stream)
    next(stream)
    assert meter.step(plan(Pass(FULL)), took(2.0)) == 600
    next(stream)
    assert meter.step(plan(Pass(CORE)), took(0.5)) == 30
    # Two batches of 2 targets each in 2 seconds, 600 FLOPs of the 2,000 that were possible.
    assert meter.rates("full") == {"targets_per_s": 2.0, "flop_utilization": 0.3}
    assert meter.rates("core") == {"targets_per_s": 4.0, "flop_utilization": 0.06}
    # From then on it counts anew; a step of both costs both and is both's.
    next(stream)
    assert meter.step(plan(Pass(FULL), Pass(CORE)), took(1.0)) == 330
    assert meter.rates("full") == meter.rates("core")
    next(stream)
    assert meter.step(plan(Pass(FULL)), took(3.0)) == 300
    assert meter.rates("full") == {"targets_per_s": 2 / 3, "flop_utilization": 0.1}


def test_every_pass_is_charged_for_the_batches_it_runs_on() -> None:
    meter = Meter(batch_flops, peak_flops_per_s=1000.0)
    stream = meter.seen(batches(6))
    next(stream)
    # Twice on the same batch, as an extragradient step does.
    assert meter.step(plan(Pass(FULL), Pass(FULL)), took(1.0)) == 600
    # Two mini-batches, accumulated over two batches each: one for either pass.
    for _ in range(4):
        next(stream)
    assert meter.step(plan(Pass(FULL), Pass(CORE, batch=1)), took(1.0)) == 660


def test_passes_that_no_criteria_are_measured_of_are_charged_too() -> None:
    class Corrected(Plan):
        @property
        def every_pass(self) -> tuple[Pass, ...]:
            return (*self.passes, Pass(CORE), Pass(CORE))

    meter = Meter(batch_flops, peak_flops_per_s=1000.0)
    next(meter.seen(batches(1)))
    assert meter.step(Corrected((Pass(FULL),), update=FULL), took(1.0)) == 300 + 2 * 30
    assert meter.rates("core")["flop_utilization"] == 0.36


def test_one_network_stands_for_those_that_are_drawn() -> None:
    counted: list[SubNetwork] = []

    def noted(plan: Plan) -> Callable[[Any], int]:
        counted.append(plan.passes[0].subnet)
        return batch_flops(plan)

    meter = Meter(noted, 1000.0, {"core": CORE})
    stream = meter.seen(batches(2))
    for _ in range(2):
        next(stream)
        drawn = SubNetwork(MODEL, {"weight": None}, name="core")
        assert meter.step(plan(Pass(drawn)), took(1.0)) == 30
    assert counted == [CORE]


def test_a_model_that_shrinks_is_counted_again() -> None:
    model = nn.Linear(3, 2)
    full = SubNetwork.full(model)

    def counted(_: Plan) -> Callable[[Any], int]:
        size = model.weight.numel()
        return lambda _: size

    meter = Meter(counted, peak_flops_per_s=1000.0)
    stream = meter.seen(batches(2))
    next(stream)
    assert meter.step(plan(Pass(full)), took(1.0)) == 6
    model.weight = nn.Parameter(torch.zeros(1, 3))
    next(stream)
    assert meter.step(plan(Pass(full)), took(1.0)) == 3


def test_on_the_host_a_stretch_is_what_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", iter([3.0, 3.5, 7.0]).__next__)
    stretch = Stretch(torch.device("cpu"))
    stretch.end()
    assert stretch.seconds() == stretch.seconds() == 0.5


class Event:
    """An event of a device on which stretches of work take so many milliseconds."""

    stretches: Iterator[int] = iter([])

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.over = False

    def synchronize(self) -> None:
        self.over = True
        self.at = next(self.stretches)

    def elapsed_time(self, end: Event) -> int:
        # The device reached the earlier event on its way to the one that is waited for.
        assert end.over and not self.over
        return end.at


class Stream:
    def record_event(self, event: Event) -> Event:
        return event


def test_on_cuda_steps_are_timed_there_and_waited_for_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    # A full step takes 100 ms, a core step 25; the host waits for none of them.
    monkeypatch.setattr(Event, "stretches", iter([100, 25, 100, 25]))
    meter = Meter(batch_flops, peak_flops_per_s=1000.0)
    stream = meter.seen(batches(4))
    for network in (FULL, CORE, FULL, CORE):
        stretch = Stretch(torch.device("cuda"))
        next(stream)
        stretch.end()
        meter.step(plan(Pass(network)), stretch.seconds)
    assert meter.rates("full") == {"targets_per_s": 20.0, "flop_utilization": 3.0}
    assert meter.rates("core") == {"targets_per_s": 80.0, "flop_utilization": 1.2}
    assert meter.seconds() == 0.25


def test_measuring_the_machine_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    rate = matmul_flops_per_s(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15
    assert torch.equal(torch.get_rng_state(), before)

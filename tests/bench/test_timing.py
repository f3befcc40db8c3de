"""Paired timing, with steps of known length."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from maskedtrain.benchmark import machine
from maskedtrain.benchmark import timing as module
from maskedtrain.benchmark.timing import Disturbed, paired


class Clock:
    """Time that passes only where a step says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def step(self, *lengths: float) -> Callable[[], object]:
        """Takes each of these times in turn."""
        calls = iter(range(10**9))

        def run() -> None:
            self.now += lengths[next(calls) % len(lengths)]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_the_ratio_of_steady_steps(clock: Clock, scale: float):
    found = paired(clock.step(2 * scale), clock.step(scale), rounds=5)
    assert (found.ratio, found.control, found.rejected) == pytest.approx((0.5, 1.0, 0))
    assert (found.a_ms, found.b_ms) == pytest.approx((2e3 * scale, 1e3 * scale))


def test_short_steps_are_repeated(clock: Clock):
    calls: list[None] = []
    step = clock.step(module.SHORTEST / 4)
    paired(lambda: (calls.append(None), step()), step, rounds=1, warmup=0)
    # To find out how long it takes, and before and after the other one.
    assert len(calls) == 1 + 2 * 4


def test_rounds_whose_control_is_off_do_not_count(clock: Clock):
    # One call finds out how long a step takes; then each third round is disturbed.
    a = clock.step(1.0, *(1.0, 1.0, 1.0, 1.0, 1.0, 2.0) * 50)
    found = paired(a, clock.step(0.5), rounds=4, warmup=0)
    assert found.ratio == pytest.approx(0.5)
    assert found.rejected >= 1


def test_a_busy_machine_gives_no_ratio(clock: Clock):
    with pytest.raises(Disturbed, match="off by more than 5%"):
        paired(clock.step(1.0, 2.0), clock.step(1.0), rounds=3)


def test_after_its_budget_fewer_rounds_do(clock: Clock):
    found = paired(clock.step(1.0), clock.step(1.0), rounds=50, warmup=0, budget_s=20.0)
    # Two seconds to know how long steps take, then rounds of three.
    assert found.rounds == 7
    assert paired(clock.step(1.0), clock.step(1.0), rounds=50, budget_s=0.0).rounds == 3


def test_what_was_disturbed_is_kept(clock: Clock):
    with pytest.raises(Disturbed) as disturbed:
        paired(clock.step(1.0, 2.0), clock.step(3.0), rounds=50, warmup=0, budget_s=0.0)
    found = disturbed.value.found
    assert found.rounds == found.rejected == 3
    assert found.ratio == pytest.approx(2.0)
    assert found.noise == pytest.approx(0.5)


def test_waiting_for_processors_is_counted(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_waited_s", lambda: clock.now / 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = paired(clock.step(1.0), clock.step(1.0), rounds=3)
    assert found.waited == pytest.approx(0.25)


def test_rates_are_of_the_fastest_calls(clock: Clock):
    calls = iter([4.0, 2.0, 8.0, 1.0])

    def timed(step: Callable[[], object]) -> float:
        step()
        return next(calls)

    found = machine.measure("cpu", torch.float32, timed, size=8, copied=64, calls=2)
    assert (found.flops_per_s, found.bytes_per_s) == (2 * 8**3 / 2.0, 2 * 64 / 1.0)

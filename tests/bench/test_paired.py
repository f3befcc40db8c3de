"""Paired timing, with steps of known length."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from bench import paired as module
from bench.paired import Disturbed, paired


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

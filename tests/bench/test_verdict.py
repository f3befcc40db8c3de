"""What a ratio with its quartiles means."""

from __future__ import annotations

import pytest

from maskedtrain.benchmark.verdict import BUSY, factor, verdict


@pytest.mark.parametrize(
    ("speedup", "low", "high", "noise", "expected"),
    [
        (3.1, 2.9, 3.3, 0.02, "masked wins 3.1x"),
        (1.04, 1.03, 1.05, 0.02, "masked wins 1.0x"),
        # Within the noise there is no win; nor a gain that is worth a change.
        (1.04, 1.01, 1.06, 0.02, "no gain: use dense"),
        (1.5, 0.9, 2.0, 0.02, "undecided: too noisy"),
        (0.99, 0.8, 1.2, 0.02, "undecided: too noisy"),
        (1.0, 0.98, 1.02, 0.02, "no gain: use dense"),
        (0.5, 0.4, 0.6, 0.02, "no gain: use dense"),
        (2.0, 1.2, 3.0, 0.3, "undecided: too noisy"),
    ],
)
def test_quartiles_decide(speedup: float, low: float, high: float, noise: float, expected: str):
    assert verdict(speedup, low, high, noise=noise) == expected


def test_where_auto_takes_the_dense_computation_it_says_so():
    found = verdict(0.9, 0.85, 0.95, noise=0.01, dense_ran=True)
    assert found == "no gain: use dense (auto does)"
    assert verdict(2.0, 1.9, 2.1, noise=0.01, dense_ran=True) == "masked wins 2.0x"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.8, 2.2, "masked wins 2.0x"),
        (1.3, 1.4, "undecided: too noisy"),
        (0.7, 0.8, "undecided: too noisy"),
    ],
)
def test_on_a_busy_machine_only_a_large_gain_shows(low: float, high: float, expected: str):
    speedup = (low + high) / 2
    assert verdict(speedup, low, high, noise=0.01, waited=BUSY + 0.01) == expected


@pytest.mark.parametrize(
    ("value", "text"), [(3.14, "3.1x"), (0.4567, "0.46x"), (31.4, "31x"), (0.05, "0.050x")]
)
def test_two_digits(value: float, text: str):
    assert factor(value) == text

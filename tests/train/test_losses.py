"""The smoothed cross-entropy on numbers worked by hand and against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from maskedtrain.training.losses import cross_entropy
from tests.train.toolbox import noise


def test_smoothing_on_worked_numbers():
    # p = (1/2, 1/4, 1/4): -log p is (1, 2, 2) in units of log 2.
    logits = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]], dtype=torch.float64) * math.log(2)
    targets = torch.tensor([0, 0])
    # First: 0.9 * 1 + 0.05 * (2 + 2) = 1.1. Second: 0.9 * 2 + 0.05 * (1 + 2) = 1.95.
    expected = (1.1 + 1.95) / 2 * math.log(2)
    assert cross_entropy(logits, targets, 0.1).item() == pytest.approx(expected, rel=1e-14)
    # torch spreads a tenth over all three classes: another number, (1.1333 + 1.9) / 2 log 2.
    other = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1).item()
    assert other != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_is_its_formula_over_the_targets_that_count(smoothing: float):
    logits = noise(2, 5, 7).double()
    targets = torch.tensor([[1, 6, 0, -100, -100], [3, 3, -100, 2, 5]])
    losses = []
    for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target == -100:
            continue
        nll = -(row - row.logsumexp(0))
        wrong = nll.sum() - nll[target]
        losses.append((1 - smoothing) * nll[target] + smoothing / 6 * wrong)
    assert len(losses) == 7
    found = cross_entropy(logits, targets, smoothing).item()
    assert found == pytest.approx(torch.stack(losses).mean().item(), rel=1e-13)

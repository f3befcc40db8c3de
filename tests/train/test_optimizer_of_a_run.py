"""Learning rates of the inverse_sqrt schedule, and what reaches the optimizer."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from maskedtrain.config import OptimConfig
from maskedtrain.training.optimizer import make_optimizer


def rates(options: OptimConfig, steps: int) -> list[float]:
    """Learning rates of the first steps."""
    optimizer, scheduler = make_optimizer(options, nn.Linear(2, 2), total=100)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_inverse_sqrt_on_worked_numbers():
    options = OptimConfig("adamw", lr=0.8, schedule="inverse_sqrt", warmup_steps=4)
    # From 0 by a quarter of the peak each step; then 0.8 * sqrt(4 / t), t the steps before.
    expected = {0: 0.0, 1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 9: 0.8 * 2 / 3, 16: 0.4, 64: 0.2}
    found = rates(options, 65)
    assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-12)


def test_inverse_sqrt_from_a_first_rate():
    options = OptimConfig(
        "adamw", lr=0.7, schedule="inverse_sqrt", warmup_steps=3, warmup_init_lr=0.1
    )
    assert rates(options, 4) == pytest.approx([0.1, 0.3, 0.5, 0.7], rel=1e-12)


def test_the_schedule_goes_on_from_its_state():
    options = OptimConfig("adamw", lr=0.8, schedule="inverse_sqrt", warmup_steps=4)
    optimizer, scheduler = make_optimizer(options, nn.Linear(2, 2), total=100)
    for _ in range(15):
        optimizer.step()
        scheduler.step()
    saved = io.BytesIO()
    torch.save(scheduler.state_dict(), saved)
    saved.seek(0)
    optimizer, scheduler = make_optimizer(options, nn.Linear(2, 2), total=100)
    scheduler.load_state_dict(torch.load(saved, weights_only=True))
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4, rel=1e-12)


def test_adamw_gets_its_options():
    options = OptimConfig("adamw", lr=1e-3, betas=(0.9, 0.98), eps=1e-9, weight_decay=1e-4)
    optimizer, _ = make_optimizer(options, nn.Linear(2, 2), total=10)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-9, 1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "inverse_sqrt"}, "inverse_sqrt needs warmup_steps >= 1, got 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"eps": -1e-8}, "eps must be >= 0, got -1e-08"),
        ({"warmup_init_lr": -1.0}, "warmup_init_lr must be >= 0, got -1.0"),
    ],
)
def test_options_out_of_range(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)

"""What a training method costs: FLOPs, time and memory of its steps, beside those of others."""

from maskedtrain.benchmark.training.comparison import Share, TrainingRow, compare
from maskedtrain.benchmark.training.experiments import (
    EXPERIMENTS,
    Experiment,
    Flops,
    epoch_flops,
    step_flops,
)
from maskedtrain.benchmark.training.steps import Memory, Steps

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Flops",
    "Memory",
    "Share",
    "Steps",
    "TrainingRow",
    "compare",
    "epoch_flops",
    "step_flops",
]

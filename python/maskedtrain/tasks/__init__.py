"""What is done with a kind of data: how a run feeds, scores and counts it.

One file is one task: a class ``Task`` in the module that data sets and models name as theirs.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from maskedtrain.config import TrainConfig
from maskedtrain.tasks.base import Batches, Task

__all__ = ["Batches", "Task", "make_task"]


def make_task(config: TrainConfig, device: torch.device, *, saved: Path | None = None) -> Task:
    """The task of a configuration.

    Args:
        config: of the run.
        device: where batches are wanted.
        saved: folder of a run that has begun: what it knows of its data is read there, and the data
            themselves when they are asked for.

    Raises:
        ValueError: the model is not for such data.
    """
    data, model = config.data, config.model
    if model.task != data.task:
        raise ValueError(
            f"data set {data.name} is for {data.task}, model {model.name} for {model.task}: "
            "choose another --model or --dataset"
        )
    module = importlib.import_module(f"{__name__}.{data.task}")
    return module.Task(config, device, saved)

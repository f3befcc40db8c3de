"""What the command line knows of a model: its options and how to build it for a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

__all__ = ["ModelConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """Options of a model; a subclass in each model's file, named ``Config``."""

    name: ClassVar[str]
    task: ClassVar[str]
    """What the model is for: the name of a module of ``maskedtrain.tasks``."""

    def build(self, **sizes: Any) -> nn.Module:
        """A freshly initialised model for the data's sizes, those of the task's
        ``model_arguments``.
        """
        raise NotImplementedError

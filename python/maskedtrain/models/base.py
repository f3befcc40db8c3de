"""What the command line knows of a model: its options and how to build it for a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

__all__ = ["ModelConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """Options of a model; a subclass in each model's file, named ``Config``."""

    name: ClassVar[str]

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        """A freshly initialised model for images of so many channels and classes."""
        raise NotImplementedError

"""What the command line knows of a data set: its options, and how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["DataConfig"]


@dataclass(frozen=True)
class DataConfig:
    """Options of a data set; a subclass in each data set's file, named ``Config``."""

    name: ClassVar[str]
    task: ClassVar[str]
    """What is done with the data: the name of a module of ``maskedtrain.tasks``."""

    def load(self) -> Any:
        """The data set; ValueError, FileNotFoundError or ImportError where it cannot be had."""
        raise NotImplementedError

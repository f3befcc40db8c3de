"""Data sets.

A file of this folder that defines ``Config`` (a ``DataConfig`` with a ``name``) is a data set that
``maskedtrain train --dataset NAME`` knows; there is no list to edit.
"""

from __future__ import annotations

from maskedtrain.data.base import DataConfig
from maskedtrain.discovery import find_configs

__all__ = ["DataConfig", "configs"]


def configs() -> dict[str, type[DataConfig]]:
    """Every data set's options, by the data set's name."""
    return find_configs(__name__, __path__, DataConfig)

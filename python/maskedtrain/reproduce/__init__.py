"""The papers' figures, measured: each one file of this folder.

A file that defines ``Config`` (a ``FigureConfig`` with a ``name``) is a figure that
``maskedtrain reproduce NAME`` knows; there is no list to edit.
"""

from __future__ import annotations

from maskedtrain.discovery import find_configs
from maskedtrain.reproduce.base import Claim, FigureConfig, Rows, read_rows, reproduce

__all__ = ["Claim", "FigureConfig", "Rows", "configs", "read_rows", "reproduce"]


def configs() -> dict[str, type[FigureConfig]]:
    """Every figure's options, by the figure's name."""
    return find_configs(__name__, __path__, FigureConfig)

"""The papers' figures and tables, measured: each one file of this folder.

A file that defines ``Config`` with a ``name`` is a figure (``FigureConfig``) or a table
(``TableConfig``) that ``maskedtrain reproduce NAME`` knows; there is no list to edit.
"""

from __future__ import annotations

from maskedtrain.discovery import find_configs
from maskedtrain.reproduce.base import Claim, FigureConfig, Rows, read_rows, reproduce
from maskedtrain.reproduce.tables import TableConfig

__all__ = ["Claim", "FigureConfig", "Rows", "configs", "read_rows", "reproduce", "tables"]


def configs() -> dict[str, type[FigureConfig]]:
    """Every figure's options, by the figure's name."""
    return find_configs(__name__, __path__, FigureConfig)


def tables() -> dict[str, type[TableConfig]]:
    """Every table, by its name."""
    return find_configs(__name__, __path__, TableConfig)

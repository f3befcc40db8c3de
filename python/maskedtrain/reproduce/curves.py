"""Validation scores along the trainings of a table, a panel for each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from maskedtrain.reproduce.plan import Result
from maskedtrain.reproduce.tables import Table
from maskedtrain.training.metrics import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(figure: Figure, table: Table, results: Mapping[str, Sequence[Result]]) -> None:
    """Scores against training FLOPs: means over the seeds, bands from the lowest to the highest.

    ``results`` are the trainings of each entry, one for each seed.
    """
    from matplotlib.ticker import EngFormatter

    # A training has one colour, whichever of its networks is shown.
    colours = dict(zip(dict.fromkeys(e.method for e in table.entries), cycle(COLOURS)))
    networks = list(dict.fromkeys(entry.network for entry in table.entries))
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    scale = 100 if table.score == "accuracy" else 1
    for axes, network in zip(panels, networks, strict=True):
        for entry in (entry for entry in table.entries if entry.network == network):
            colour = colours[entry.method]
            lines = [_line(result, network, table.score) for result in results[entry.key]]
            if not lines:
                continue
            # Trainings that evaluated equally often, as those of one entry do.
            flops, scores = (np.array(values) for values in zip(*lines, strict=True))
            x, y = flops.mean(0), scale * scores
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, y.mean(0), color=colour, marker="o", markersize=3, label=entry.method)
        axes.set_title(f"{network} network")
        axes.set_xlabel("training FLOPs")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
    panels[0].set_ylabel(f"validation {table.unit}")


def _line(result: Result, network: str, score: str) -> tuple[list[float], list[float]]:
    """Training FLOPs and scores of a network's evaluations."""
    records = [record for record in result["evaluations"] if record["subnet"] == network]
    return [r["train_flops"] for r in records], [r[score] for r in records]

"""Drawings of the rows: speed-up against density, the roofline, and meProp beside its paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskedtrain.benchmark.cases import PAPER_SPEEDUPS, PAPER_WIDTH
from maskedtrain.benchmark.machine import Rates
from maskedtrain.benchmark.rows import Row
from maskedtrain.training.metrics import COLOURS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "draw_all"]

FIGURES = ("density.png", "roofline.png", "meprop.png")
_STAGES = {"backward": "backward", "step": "whole step: forward, backward, AdamW"}
_MARKERS = {"forward": "o", "backward": "s", "step": "D", "optimizer": "^", "kernel": "v"}
# Sizes that have panels of their own.
_MOST_SIZES = 3


def draw_all(folder: Path, rows: Sequence[Row], rates: Rates, machine: str) -> list[Path] | None:
    """Draw what there are rows for; the files, or None without matplotlib."""
    layers = [row for row in rows if row.kind != "meProp" and row.density is not None]
    sweep = [row for row in rows if row.kind == "meProp"]
    sizes = list(dict.fromkeys(row.size for row in layers))[:_MOST_SIZES]
    drawings: list[tuple[str, bool, tuple[float, float], Callable[[Figure], None]]] = [
        (
            FIGURES[0],
            any(row.kind not in _WITHOUT_DENSITY and row.stage in _STAGES for row in layers),
            (10.5, 0.4 + 4.2 * len(sizes)),
            lambda figure: _density(figure, layers, sizes, machine),
        ),
        (
            FIGURES[1],
            bool(rows),
            (8.5, 5.2),
            lambda figure: _roofline(figure, rows, rates, machine),
        ),
        (FIGURES[2], bool(sweep), (7.0, 4.6), lambda figure: _meprop(figure, sweep, machine)),
    ]
    written: list[Path] = []
    for name, wanted, (width, height), draw in drawings:
        if not wanted:
            continue
        if (figure := new_figure(width_in=width, height_in=height)) is None:
            return None
        draw(figure)
        save_figure(figure, folder / name)
        written.append(folder / name)
    return written


# The low-rank super layer is all of the weight and more.
_WITHOUT_DENSITY = {"LFC super"}


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Colour and dashes of each kind: as many as there are."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    return {
        kind: {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": "-" if number < len(COLOURS) else "--",
        }
        for number, kind in enumerate(kinds)
    }


def _density(figure: Figure, rows: Sequence[Row], sizes: Sequence[str], machine: str) -> None:
    rows = [row for row in rows if row.kind not in _WITHOUT_DENSITY]
    styles = _styles(rows)
    stages = {stage: _STAGES[stage] for stage in _STAGES if any(r.stage == stage for r in rows)}
    panels = figure.subplots(len(sizes), len(stages), squeeze=False, sharex=True, sharey=True)
    for row_of_panels, size in zip(panels, sizes, strict=True):
        for axes, (stage, title) in zip(row_of_panels, stages.items(), strict=True):
            chosen = [row for row in rows if row.size == size and row.stage == stage]
            for kind, style in styles.items():
                line = sorted((r for r in chosen if r.kind == kind), key=lambda r: r.density or 0)
                if line:
                    _line(axes, [r.density or 0 for r in line], line, kind, style)
            least = min((row.density or 1 for row in rows), default=0.01)
            axes.plot([least, 1], [1 / least, 1], color="0.5", linestyle=":", label="ideal")
            axes.axhline(1, color="0.5", linewidth=0.8)
            _finish(axes, f"{title}\n{_in_words(chosen)}", "density: share that takes part")
            highest = max((row.high for row in rows), default=1)
            axes.set_ylim(bottom=0.2, top=max(60, 1.2 * highest))
        row_of_panels[0].set_ylabel("dense time / time")
    known: dict[str, Any] = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        known.update(zip(labels, handles, strict=True))
    figure.legend(
        known.values(), known.keys(), loc="outside right center", frameon=False, fontsize="small"
    )
    figure.suptitle(f"Speed-up over the dense layer, {machine}", fontsize="medium")


def _in_words(rows: Sequence[Row]) -> str:
    """What size the rows are of."""
    if not rows:
        return ""
    outputs, inputs = rows[0].shape
    return f"weight {outputs} x {inputs}, {rows[0].tokens} tokens, {rows[0].dtype}"


def _line(axes: Axes, x: list[float], rows: Sequence[Row], label: str, style: dict) -> None:
    speedups = [row.speedup for row in rows]
    spread = [
        [row.speedup - row.low for row in rows],
        [row.high - row.speedup for row in rows],
    ]
    dashed = style.get("linestyle") == "--"
    axes.errorbar(
        x,
        speedups,
        spread,
        marker="o",
        markersize=4,
        markerfacecolor="none" if dashed else style["color"],
        capsize=2,
        label=label,
        **style,
    )


def _finish(axes: Axes, title: str, x_name: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, fontsize="small")
    axes.set_xlabel(x_name, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _roofline(figure: Figure, rows: Sequence[Row], rates: Rates, machine: str) -> None:
    axes = figure.subplots()
    shown = [row for row in rows if row.flops and row.bytes]
    styles = _styles(shown)
    for row in shown:
        axes.plot(
            row.flops / row.bytes,
            row.flops / row.ms / 1e6,
            linestyle="none",
            marker=_MARKERS[row.stage],
            color=styles[row.kind]["color"],
            markerfacecolor=styles[row.kind]["color"]
            if styles[row.kind]["linestyle"] == "-"
            else "none",
            markersize=5,
            alpha=0.8,
        )
    intensities = [row.flops / row.bytes for row in shown]
    least, most = min(intensities) / 2, max(intensities) * 2
    ridge = rates.flops_per_s / rates.bytes_per_s
    corners = sorted({least, min(max(ridge, least), most), most})
    roof = [min(rates.flops_per_s, corner * rates.bytes_per_s) / 1e9 for corner in corners]
    axes.plot(corners, roof, color="black", label="measured roof")
    _finish(axes, f"Roofline, {machine}", "FLOPs / byte")
    axes.set_ylabel("GFLOP/s")
    for kind, style in styles.items():
        filled = style["color"] if style["linestyle"] == "-" else "none"
        axes.plot(
            [], [], "o", color=style["color"], markerfacecolor=filled, markersize=5, label=kind
        )
    for stage in dict.fromkeys(row.stage for row in shown):
        axes.plot([], [], _MARKERS[stage], color="0.4", markersize=5, label=stage)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")


def _meprop(figure: Figure, rows: Sequence[Row], machine: str) -> None:
    axes = figure.subplots()
    rows = sorted(rows, key=lambda row: row.density or 0)
    width = rows[0].shape[0]
    shares = [row.density or 0 for row in rows]
    _line(axes, shares, rows, f"here, h = {width}", {"color": COLOURS[0]})
    paper = {k / PAPER_WIDTH: speedup for k, speedup in PAPER_SPEEDUPS.items()}
    axes.plot(
        list(paper),
        list(paper.values()),
        color=COLOURS[1],
        marker="s",
        markersize=4,
        linestyle="--",
        label=f"Sun et al. 2017, a GPU, h = {PAPER_WIDTH}",
    )
    ends = [min(*shares, *paper), max(*shares, *paper)]
    ideal = [1 / share for share in ends]
    axes.plot(ends, ideal, color="0.5", linestyle=":", label="ideal, h / k")
    axes.axhline(1, color="0.5", linewidth=0.8)
    own = "" if width == PAPER_WIDTH else f"\nh = {width} here, {PAPER_WIDTH} in the paper"
    _finish(axes, f"meProp's backward by batch: {_in_words(rows)}{own}\n{machine}", "k / h")
    axes.set_ylabel("dense backward's time / time")
    axes.legend(frameon=False, fontsize="small")

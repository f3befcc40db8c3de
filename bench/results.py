"""Figures of benchmarks: as a table, as a file, and one file against an older one.

``python -m bench.results OLD NEW`` lists what has become slower against its baseline, and exits
with 1 if anything has; ``python -m bench.results FILE`` prints its ratios as Markdown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskedtrain.benchmark import machine

Rows = Mapping[str, Mapping[str, Any]]

# What differs from run to run on one machine.
_MEASURED = {"load", "gemm_gflops_per_s", "copy_gb_per_s"}
# What a ratio may lose: more than paired timing is off by.
TOLERANCE = 0.1


def table(rows: Rows) -> Iterator[str]:
    """Lines of a table with a column for every figure."""
    columns = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    cells = [["case", *columns]]
    cells += [[case, *(_show(figures.get(c)) for c in columns)] for case, figures in rows.items()]
    # A sentence instead of a figure may stick out.
    widths = [max(len(c) for c in column if len(c) < 60) for column in zip(*cells, strict=True)]
    for case, *figures in cells:
        shown = (cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True))
        yield "  ".join([case.ljust(widths[0]), *shown])


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(rows: Rows) -> Iterator[str]:
    """Lines of a Markdown table: our time, whose it is compared with, and the share it takes."""
    yield "| case | ms | baseline | time / baseline's | bar |"
    yield "|---|---|---|---|---|"
    for case, figures in rows.items():
        name = case.partition("[")[2].removesuffix("]") or case
        ratio, bar = figures.get("ratio"), figures.get("bar")
        # A sentence says why there is none.
        shares = (_show(value) if isinstance(value, float) else "-" for value in (ratio, bar))
        cells = (name, _show(figures.get("ms")), figures.get("baseline", "-"), *shares)
        yield f"| {' | '.join(cells)} |"


def write(path: Path, rows: Rows) -> None:
    """Write the figures of one run and what they depend on.

    Cases that are there and were not run again stay, if they were timed with the same software.
    """
    described, kept = machine.description(), {}
    if path.exists():
        old = json.loads(path.read_text())
        if all(old["machine"].get(key) == described[key] for key in described.keys() - _MEASURED):
            kept = old["cases"]
    save(path, {"machine": described, "cases": {**kept, **rows}})


def save(path: Path, contents: Mapping[str, Any]) -> None:
    """Put the file in the place of an older one, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def slower(old: Rows, new: Rows) -> dict[str, tuple[float, float]]:
    """Cases whose ratio has grown by more than the tolerance: the old one and the new one."""
    ratios = {
        case: (old[case].get("ratio"), figures.get("ratio"))
        for case, figures in new.items()
        if case in old
    }
    return {
        case: (before, after)
        for case, (before, after) in ratios.items()
        if isinstance(before, float)
        and isinstance(after, float)
        and after > before * (1 + TOLERANCE)
    }


def main(arguments: list[str]) -> int:
    if len(arguments) == 1:
        print(*markdown(json.loads(Path(arguments[0]).read_text())["cases"]), sep="\n")
        return 0
    if len(arguments) != 2:
        print("usage: python -m bench.results OLD.json [NEW.json]", file=sys.stderr)
        return 2
    old, new = (json.loads(Path(path).read_text())["cases"] for path in arguments)
    lost = slower(old, new)
    for case, (before, after) in lost.items():
        print(f"{case}: {before:.3f} -> {after:.3f} of its baseline's time")
    print(f"{len(lost)} of {len(old.keys() & new.keys())} cases are slower by over {TOLERANCE:.0%}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

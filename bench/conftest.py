"""Prints what pytest-benchmark's table has no columns for: FLOPs and paired ratios."""

from __future__ import annotations

from typing import Any

import pytest

_ROWS: list[tuple[str, dict[str, Any]]] = []


@pytest.fixture
def note(benchmark, request):
    """Call it with figures: they go to ``extra_info`` and to the table at the end."""

    row: dict[str, Any] = {}
    _ROWS.append((request.node.name, row))

    def add(**figures: Any) -> None:
        benchmark.extra_info |= figures
        row.update(figures)

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _ROWS:
        return
    columns = list(dict.fromkeys(name for _, figures in _ROWS for name in figures))
    table = [["case", *columns]]
    table += [[case, *(_show(figures.get(name)) for name in columns)] for case, figures in _ROWS]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns) + 1)]
    terminalreporter.section("figures")
    for case, *cells in table:
        shown = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        terminalreporter.line("  ".join([case.ljust(widths[0]), *shown]))


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

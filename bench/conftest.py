"""Prints what pytest-benchmark's table has no columns for: FLOPs and paired ratios."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import pytest

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def pytest_configure() -> None:
    """Have malloc keep freed memory: whose turn it is to fault pages in decides no ratio then."""
    # Linux with glibc; elsewhere the allocator is as it is.
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


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

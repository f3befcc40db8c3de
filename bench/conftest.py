"""Prints and keeps what pytest-benchmark's table has no columns for: FLOPs, paired ratios, bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import results
from maskedtrain.benchmark import machine
from maskedtrain.training.memory import keep_freed_memory


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="write the figures to FOLDER/<processor and threads>/<file of the benchmark>.json",
    )


def pytest_configure() -> None:
    keep_freed_memory()


# Of each file its cases' figures.
_ROWS: dict[str, dict[str, dict[str, Any]]] = {}


@pytest.fixture
def note(benchmark, request):
    """Call it with figures: they go to ``extra_info``, to the table at the end and the results."""

    row: dict[str, Any] = {}
    _ROWS.setdefault(request.node.path.stem, {})[request.node.name] = row

    def add(**figures: Any) -> None:
        benchmark.extra_info |= figures
        row.update(figures)

    return add


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    for file, rows in _ROWS.items():
        terminalreporter.section(file)
        for line in results.table(rows):
            terminalreporter.line(line)
    if _ROWS:
        terminalreporter.line(
            f"{machine.processor()}, {machine.description()['threads']} threads: products at "
            f"{machine.rates().flops_per_s / 1e9:.0f} GFLOP/s, copies at "
            f"{machine.rates().bytes_per_s / 1e9:.0f} GB/s"
        )
    if (folder := config.getoption("--results")) is not None:
        for file, rows in _ROWS.items():
            results.write(folder / machine.device() / f"{file}.json", rows)

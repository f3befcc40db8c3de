"""Live on a terminal, plain everywhere else, and the same numbers in both."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from maskedtrain.training.console import (
    Console,
    ResultRow,
    format_bytes,
    format_count,
    format_duration,
    format_seconds,
    results_markdown,
)

ROWS = [
    ResultRow("core", "ATS", 600, 0.9655, 2_797_000, 0.2786e9, 31.3e12, 100.24, 812 * 2**20),
    ResultRow("full", "slimmable", 1200, 1.0, 11_173_962, 1.1108e9, 62.5e12, 214.6, None),
]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [
        (0, "0", "0 B"),
        (7, "7", "7 B"),
        (999, "999", "999 B"),
        (1000, "1.00 k", "1000 B"),
        (1024, "1.02 k", "1.00 KiB"),
        (99_950, "100 k", "97.6 KiB"),
        (999_499, "999 k", "976 KiB"),
        (999_500, "1.00 M", "976 KiB"),
        (11_173_962, "11.2 M", "10.7 MiB"),
        (812 * 2**20, "851 M", "812 MiB"),
        (2**30 - 1, "1.07 G", "1.00 GiB"),
        (31.3e12, "31.3 T", "28.5 TiB"),
    ],
)
def test_units(value: float, count: str, size: str) -> None:
    assert format_count(value) == count
    assert format_bytes(value) == size


def test_times() -> None:
    assert [format_seconds(s) for s in (0, 0.1234, 7.256, 61.26, 214.6, 1234.4)] == [
        "0.00", "0.12", "7.26", "61.3", "215", "1234",
    ]  # fmt: skip
    assert [format_duration(s) for s in (0, 59.6, 87, 3700, 90_000)] == [
        "0:00", "1:00", "1:27", "1:01:40", "25:00:00",
    ]  # fmt: skip


def table(rows: list[ResultRow]) -> list[str]:
    file = io.StringIO()
    Console(file).results_table(rows)
    return file.getvalue().splitlines()


def test_plain_table() -> None:
    assert table(ROWS) == [
        "                                                  forward",
        "                                accuracy           FLOPs/  training              peak",
        "network  method     iterations         %  params    image     FLOPs  seconds   memory",
        "───────  ─────────  ──────────  ────────  ──────  ───────  ────────  ───────  ───────",
        "core     ATS               600     96.55  2.80 M    279 M    31.3 T      100  812 MiB",
        "full     slimmable       1,200    100.00  11.2 M   1.11 G    62.5 T      215        –",
    ]


def test_markdown_has_the_same_cells_as_the_table() -> None:
    lines = results_markdown(ROWS).splitlines()
    assert lines[0] == (
        "| network | method | iterations | accuracy % | params | forward FLOPs/image "
        "| training FLOPs | seconds | peak memory |"
    )
    assert lines[1] == "| --- | --- |" + " ---: |" * 7
    for markdown, plain in zip(lines[2:], table(ROWS)[4:], strict=True):
        assert [cell.strip() for cell in markdown.strip("|").split("|")] == re.split(
            r"\s{2,}", plain
        )
    assert "a\\|b" in results_markdown([ResultRow("a|b")])


def test_a_column_without_values_is_left_out() -> None:
    rows = [ResultRow("core", iterations=10), ResultRow("full", accuracy=0.5)]
    assert results_markdown(rows).splitlines() == [
        "| network | iterations | accuracy % |",
        "| --- | ---: | ---: |",
        "| core | 10 | – |",
        "| full | – | 50.00 |",
    ]


def test_accuracy_is_a_fraction() -> None:
    with pytest.raises(ValueError, match=r"accuracy must be in \[0, 1\], got 97.1"):
        ResultRow("core", accuracy=97.1)


def test_plain_progress_is_a_line_at_an_interval_and_at_the_end() -> None:
    file, clock = io.StringIO(), Clock()
    console = Console(file, interval_s=10, clock=clock)
    with console.progress(100, start=20, label="ATS") as progress:
        for step in range(21, 101):
            clock.now_s += 0.5
            progress.update(step, loss=1 / step, score=0.9 if step == 30 else None)
        console.print("saved [bold]x[/bold] :smile:")
        console.warn("careful")
    assert file.getvalue().splitlines() == [
        "ATS: step 40/100  loss 0.0250  accuracy 90.0 %  2.00 steps/s  0:30 left",
        "ATS: step 60/100  loss 0.0167  accuracy 90.0 %  2.00 steps/s  0:20 left",
        "ATS: step 80/100  loss 0.0125  accuracy 90.0 %  2.00 steps/s  0:10 left",
        "ATS: step 100/100  loss 0.0100  accuracy 90.0 %  2.00 steps/s  0:00 left",
        "saved [bold]x[/bold] :smile:",
        "warning: careful",
    ]


def test_the_last_step_is_shown_once_even_after_an_error() -> None:
    file = io.StringIO()
    with pytest.raises(ZeroDivisionError), Console(file).progress(10) as progress:  # noqa: PT012
        progress.update(3, loss=float("nan"))
        raise ZeroDivisionError
    assert re.fullmatch(r"step 3/10  loss nan(  \S+ steps/s  \S+ left)?\n", file.getvalue())


def test_speed_follows_a_change() -> None:
    clock = Clock()
    with Console(io.StringIO(), clock=clock).progress(1000) as progress:
        assert progress.steps_per_s == 0
        for step in range(1, 101):
            clock.now_s += 10 if step <= 50 else 1
            progress.update(step)
        assert progress.steps_per_s == 1


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"])
def test_no_control_codes_without_a_terminal(monkeypatch, variable) -> None:
    monkeypatch.setenv(variable, "1")
    file = io.StringIO()
    console = Console(file, interval_s=0)
    with console.progress(2) as progress:
        progress.update(1, loss=1.0)
        console.print("torch says \x1b[1mbold\x1b[0m, " + "long " * 50)
        progress.update(2)
    console.warn("careful")
    console.results_table(ROWS)
    assert "torch says bold, " + "long " * 50 in file.getvalue()
    assert "\x1b" not in file.getvalue()
    assert "\r" not in file.getvalue()


def test_a_locale_without_dashes_does_not_stop_the_table() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Console(file).results_table([ResultRow("full", iterations=1), ResultRow("core")])
    file.flush()
    assert raw.getvalue().splitlines()[-1].split() == [b"core", b"?"]


SHOW = """
from maskedtrain.training.console import Console, ResultRow
console = Console(interval_s=0)
with console.progress(600, label="ATS") as progress:
    progress.update(120, loss=0.5, score=0.25)
    console.print("a message")
    progress.update(600, loss=0.25)
console.results_table([
    ResultRow("core", "standard", 12000, 0.9655, 2797000, 0.2786e9, 31.3e12, 100.24, 17 * 2**26)])
"""


def on_terminal(columns: int, **environment: str) -> str:
    """What the programme SHOW writes to a terminal of that width."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW], stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)

    def chunks() -> Iterator[bytes]:
        while True:
            try:
                chunk = os.read(master, 65536)
            # Linux says so when the other end is closed.
            except OSError:
                return
            if not chunk:
                return
            yield chunk

    output = b"".join(chunks()).decode()
    os.close(master)
    assert process.wait() == 0, output
    return output


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal(columns: int) -> None:
    output = on_terminal(columns)
    assert "\x1b[?25l" in output
    assert output.rstrip().count("\x1b[?25h") == 1
    assert re.search(r"\x1b\[[\d;]+m━", output)
    visible = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", output)
    lines = [line for line in re.split(r"[\r\n]+", visible) if line]
    assert max(map(len, lines)) <= columns
    assert "a message" in lines
    final = [line for line in lines if "600/600" in line][-1]
    assert re.fullmatch(r"ATS ━+ 600/600  loss 0.2500  acc 25.0 %  \S+ steps/s  0:00 left *", final)
    assert lines[-1].split(maxsplit=3)[:3] == ["core", "standard", "12,000"]
    assert lines[-1].endswith("1.06 GiB")


def test_no_color_and_dumb_terminals() -> None:
    colours = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3\d|4\d|9\d|10\d)(?:;[\d;]*)?m")
    assert colours.search(on_terminal(80))
    assert not colours.search(on_terminal(80, NO_COLOR="1"))
    assert "\x1b" not in on_terminal(80, TERM="dumb")

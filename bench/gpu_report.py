"""What a run on a GPU has found so far: a JSON file and a Markdown page, written anew with every
figure.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench import results
from bench.gpu_cases import Row
from maskedtrain.benchmark.machine import Rates

__all__ = ["Report", "Tests", "crossing", "read_tests"]

# Rows that differ in one number: at which one ours and the baseline take the same time?
CURVES = {
    r"blocksparse-block(?P<series>\d+)-(?P<x>[\d.]+)": "density, blocks of",
    r"topk-(?P<series>row)-k(?P<x>\d+)": "k, by",
    r"rows-(?P<series>\w+)-(?P<x>\d+)": "tokens, half of the rows gathered in",
}
COLUMNS = (
    *("ms", "floor_ms", "of_floor", "baseline", "baseline_ms"),
    *("ratio", "low", "high", "bar", "met", "ran"),
)
# A terminal has less room.
SHORT = ("ms", "of_floor", "baseline", "ratio", "bar", "met", "ran")


@dataclass
class Tests:
    """Counts by "family backend" and outcome, and what failed, with the first line of why."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def red(self) -> set[str]:
        """Families whose results are wrong."""
        found = (re.search(r"test_cases\.\w+\[(\w+)-", name) for name in self.failures)
        return {match[1] for match in found if match}


def read_tests(junit: Path) -> Tests:
    """Of the file that pytest writes at its end, however that came."""
    tests = Tests()
    counts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for case in ElementTree.parse(junit).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        name = f"{file}.{case.get('name')}"
        of_family = re.search(r"\[(\w+)-(triton|cuda|reference)-", name)
        outcomes = {child.tag: child for child in case}
        bad = outcomes.get("failure", outcomes.get("error"))
        if bad is not None:
            tests.failures[name] = bad.get("message", "").partition("\n")[0][:300]
        outcome = "failed" if bad is not None else "skipped" if "skipped" in outcomes else "passed"
        counts[" ".join(of_family.groups()) if of_family else file][outcome] += 1
    tests.counts = {name: dict(found) for name, found in sorted(counts.items())}
    return tests


@dataclass
class Report:
    """All of one run, or with ``resume`` of more; ``save`` writes it."""

    folder: Path
    facts: Row = field(default_factory=dict)
    stages: dict[str, Row] = field(default_factory=dict)
    tests: Tests = field(default_factory=Tests)
    rows: dict[str, Row] = field(default_factory=dict)

    def resume(self) -> None:
        """Take over what an earlier run has written."""
        if (path := self.folder / "gpu.json").exists():
            found = json.loads(path.read_text())
            self.stages, self.rows = found["stages"], found["cases"]
            self.tests = Tests(**found["tests"])

    def add(self, rows: Mapping[str, Row]) -> None:
        """Add rows, hold them against floors and bars, and write everything."""
        for name, row in rows.items():
            self.rows[name] = {**row, **self._judged(name, row)}
        self.save()

    def _judged(self, name: str, row: Row) -> Row:
        if "ratio" not in row:
            return {}
        judged: Row = {}
        kept = [row["ratio"] <= row["bar"]] if row.get("bar") else []
        if row.get("bytes") and (rates := self.rates()):
            floor = 1e3 * rates.floor_s(row["flops"], row["bytes"])
            judged |= {"floor_ms": floor, "of_floor": floor / row["ms"]}
            if row.get("floor_bar"):
                kept.append(row["ms"] <= row["floor_bar"] * floor)
        wrong = any(name.startswith(f"{family}-") for family in self.tests.red)
        judged["met"] = "tests fail" if wrong else ("yes" if all(kept) else "no") if kept else None
        return judged

    def rates(self) -> Rates | None:
        """What the device has been measured to do."""
        if "gemm_gflops_per_s" not in self.facts:
            return None
        return Rates(1e9 * self.facts["gemm_gflops_per_s"], 1e9 * self.facts["copy_gb_per_s"])

    def save(self) -> None:
        contents = {
            "machine": self.facts,
            "stages": self.stages,
            "tests": {"counts": self.tests.counts, "failures": self.tests.failures},
            "cases": self.rows,
        }
        results.save(self.folder / "gpu.json", contents)
        page = self.folder / "gpu.md"
        page.with_suffix(".partial").write_text("\n".join(self.markdown()) + "\n")
        page.with_suffix(".partial").replace(page)

    def table(self) -> Iterator[str]:
        """Lines for a terminal."""
        timed = {name: row for name, row in self.rows.items() if "ratio" in row}
        yield from results.table({name: _columns(row, SHORT) for name, row in timed.items()})
        yield from self.sentences()
        yield from self.crossings()

    def sentences(self) -> Iterator[str]:
        """What was not timed, and why."""
        for name, row in self.rows.items():
            if "error" in row or "note" in row:
                yield f"{name}: {row.get('error') or row['note']}"

    def crossings(self) -> Iterator[str]:
        """Where ours and the baselines take the same time."""
        for pattern, what in CURVES.items():
            curves: defaultdict[str, dict[float, float]] = defaultdict(dict)
            for name, row in self.rows.items():
                match = re.match(pattern, name)
                # What fell back to plain PyTorch says nothing of our kernel.
                if match and "ratio" in row and "reference" not in row["ran"]:
                    curves[match["series"]][float(match["x"])] = row["ratio"]
            for series, points in curves.items():
                yield f"break-even {what} {series}: {crossing(sorted(points.items()))}"

    def markdown(self) -> Iterator[str]:
        facts = self.facts
        yield f"# {facts.get('device', self.folder.name)}"
        yield ""
        yield ", ".join(
            f"{key} {facts[key]}" for key in ("torch", "triton", "cuda") if key in facts
        )
        if rates := self.rates():
            yield (
                f"Measured: {rates.flops_per_s / 1e12:.0f} TFLOP/s (bf16, 8192³, random numbers), "
                f"{rates.bytes_per_s / 1e12:.2f} TB/s (copy)."
            )
        for title, header, lines in (
            ("Stages", ("stage", "seconds", "result"), self._stage_lines()),
            ("Tests", ("of", "passed", "skipped", "failed"), self._test_lines()),
            ("Times", ("case", *COLUMNS), self._time_lines()),
        ):
            yield from ("", f"## {title}", "")
            yield f"| {' | '.join(header)} |"
            yield "|---" * len(header) + "|"
            for cells in lines:
                yield f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
        failed = [f"`{name}` {why}" for name, why in self.tests.failures.items()]
        lists = {
            "Failed tests": failed,
            "Not timed": self.sentences(),
            "Break-even": self.crossings(),
        }
        for title, lines in lists.items():
            if found := [f"- {line}" for line in lines]:
                yield from ("", f"## {title}", "", *found)

    def _stage_lines(self) -> Iterator[Sequence[Any]]:
        for name, stage in self.stages.items():
            yield name, f"{stage['seconds']:.0f}", stage["result"]

    def _test_lines(self) -> Iterator[Sequence[Any]]:
        for name, found in self.tests.counts.items():
            yield name, *(found.get(outcome, 0) for outcome in ("passed", "skipped", "failed"))

    def _time_lines(self) -> Iterator[Sequence[Any]]:
        for name, row in self.rows.items():
            if "ratio" in row:
                yield name, *(_show(value) for value in _columns(row).values())


def _columns(row: Row, names: Sequence[str] = COLUMNS) -> Row:
    return {name: row.get(name) for name in names}


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def crossing(points: Sequence[tuple[float, float]]) -> str:
    """Where ratios along x pass 1, between the neighbours in a straight line."""
    for (x, low), (next_x, high) in pairwise(points):
        if (low - 1) * (high - 1) <= 0 and low != high:
            return f"{x + (1 - low) / (high - low) * (next_x - x):.3g}"
    faster = all(ratio < 1 for _, ratio in points)
    return (
        f"none, {'faster' if faster else 'not faster'} from {points[0][0]:g} to {points[-1][0]:g}"
    )

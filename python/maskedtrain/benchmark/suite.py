"""A run of ``maskedtrain bench``: what is measured, in which order, within how much time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from maskedtrain.benchmark import machine
from maskedtrain.benchmark.cases import Size, default_sizes, layer_cases, meprop_sweep
from maskedtrain.benchmark.layers import LayerCase
from maskedtrain.benchmark.models import Layers
from maskedtrain.benchmark.report import Report
from maskedtrain.benchmark.rows import Budget, Row, contest_row, layer_rows, total
from maskedtrain.benchmark.training import EXPERIMENTS, compare
from maskedtrain.training.console import Console
from partial_kernels._core import discovery
from partial_kernels._core.contest import Contest

__all__ = ["Plan", "contests", "run"]

# Seconds of layers and kernels, and of each comparison of trainings; rounds of a measurement.
_QUICK = (75.0, 15.0, 7)
_THOROUGH = (480.0, 75.0, 21)


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    device: torch.device
    dtype: torch.dtype
    quick: bool
    families: Sequence[str]
    """Kernel families whose rows are wanted."""
    sizes: Sequence[Size] = ()
    """Layers; the device's default ones where not given."""
    layers: Layers | None = None
    """Those of a model, with ``tokens``, in the place of ``sizes``."""
    tokens: int = 1024
    everything: bool = True
    """Kernels without a layer and meProp's sweep, too."""
    training: Sequence[str] = ()
    """Experiments of trainings to compare."""


def run(plan: Plan, console: Console, options: Mapping[str, Any], model_name: str | None) -> Report:
    """Measure all of it; nothing is written.

    Raises:
        ValueError: there is nothing to measure.
    """
    started = time.perf_counter()
    seconds, training_seconds, rounds = _QUICK if plan.quick else _THOROUGH
    cases = _cases(plan)
    kernels = (
        list(contests(plan.families, plan.device, quick=plan.quick)) if plan.everything else []
    )
    if not cases and not kernels and not plan.training:
        raise ValueError(f"nothing to time: {', '.join(plan.families)} have no such layers")
    described = machine.description(plan.device, plan.dtype)
    report = Report(described, options, model_name=model_name)
    count = sum(len(case.stages) for case, _ in cases) + len(kernels)
    budget = Budget(seconds, count)
    with console.progress(count, label="bench") as progress:

        def done() -> None:
            progress.update(progress.step + 1)

        for family, case in kernels:
            if (share := budget.share(f"{family} {case.name}")) is not None:
                row = _contest_row(family, case, plan.device, share, rounds)
                report.rows.append(row)
                done()
        for case, number in cases:
            found = layer_rows(case, plan.device, budget, rounds=rounds, count=number, report=done)
            report.rows.extend(found)
    report.rows = _in_order(report.rows)
    report.skipped = budget.skipped
    if plan.layers is not None:
        report.model = _totals(report.rows, len(plan.layers.counts))
    for name in plan.training:
        console.print(f"training: {EXPERIMENTS[name].title}")
        report.training[EXPERIMENTS[name].title] = compare(
            EXPERIMENTS[name],
            budget_s=training_seconds,
            device=plan.device,
            autocast=None if plan.dtype == torch.float32 else plan.dtype,
        )
    report.seconds = time.perf_counter() - started
    return report


def _cases(plan: Plan) -> list[tuple[LayerCase, int]]:
    """Layers, and how many of each there are. What a figure needs whole comes first; then sizes
    take turns, so that of a run that is cut short some masks are known on all of them.
    """
    if plan.layers is not None:
        counts = {Size(*shape, plan.tokens): n for shape, n in plan.layers.counts.items()}
    else:
        sizes = plan.sizes or default_sizes(plan.device, quick=plan.quick)
        counts = dict.fromkeys(sizes, 1)
    quick = plan.quick or plan.layers is not None
    by_size = [
        [(case, count) for case in layer_cases(size, plan.dtype, plan.families, quick=quick)]
        for size, count in counts.items()
    ]
    cases = [item for turn in zip_longest(*by_size) for item in turn if item is not None]
    if plan.layers is not None:
        return [(case.only("step"), count) for case, count in cases if "step" in case.stages]
    sweep = plan.everything and "topk" in plan.families
    first = meprop_sweep(plan.device, plan.dtype, quick=plan.quick) if sweep else []
    return [*((case, 1) for case in first), *cases]


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """As they are read, not as they were taken in turn: layers, meProp's sweep, other kernels."""
    sizes, kinds = (list(dict.fromkeys(getattr(row, n) for row in rows)) for n in ("size", "kind"))
    return sorted(
        rows,
        key=lambda row: (
            row.stage == "kernel",
            row.kind == "meProp",
            sizes.index(row.size),
            kinds.index(row.kind),
            row.density or 0,
            row.label,
        ),
    )


def contests(
    families: Sequence[str], device: torch.device, *, quick: bool
) -> Iterator[tuple[str, Any]]:
    """Cases of the families that are no layer: selections and statistics."""
    wanted = {"select": "row-narrow", "stats": "prefix-half"}
    for family, module in discovery.cases():
        if family not in wanted or family not in families:
            continue
        if device.type == "cuda":
            cases = [case for case, _ in module.gpu_cases()]
        else:
            cases = list(module.BENCH_CASES)
        for case in cases:
            if not quick or case.name == wanted[family] or device.type == "cuda":
                yield family, case


def _contest_row(family: str, case: Any, device: torch.device, share: float, rounds: int) -> Row:
    module = dict(discovery.cases())[family]
    contest: Contest = module.contest(case, device=device.type)
    return contest_row(
        family, case.name, contest, device, seconds=share, rounds=rounds, dtype=case.dtype
    )


def _totals(rows: Sequence[Row], sizes: int) -> list[dict[str, Any]]:
    """Of the masks that were timed on every one of a model's layers."""
    labels = dict.fromkeys(row.label for row in rows if row.stage == "step")
    by_label = {
        label: [row for row in rows if row.label == label and row.stage == "step"]
        for label in labels
    }
    return [
        total(some, label=label, kind=some[0].kind)
        for label, some in by_label.items()
        if len(some) == sizes
    ]

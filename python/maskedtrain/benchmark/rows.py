"""Rows of figures: what was measured of a layer in a stage, its roofline and its verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from maskedtrain.benchmark.layers import Cost, LayerCase, Pair, Stage
from maskedtrain.benchmark.machine import Rates, rates
from maskedtrain.benchmark.timing import Disturbed, Paired, paired, timed_on
from maskedtrain.benchmark.verdict import verdict
from partial_kernels._core.contest import Contest, Step

__all__ = ["Budget", "Row", "contest_row", "layer_rows", "measured", "stage_row", "total"]


@dataclass(frozen=True)
class Row:
    """One layer in one stage, beside the full layer. Times are medians, in ms; ``speedup`` is the
    median of paired ratios, dense time / ours, between the quartiles ``low`` and ``high``.
    """

    family: str
    kind: str
    label: str
    stage: str
    shape: tuple[int, ...]
    """Of the weight, or of what a family without a layer works on."""
    tokens: int | None
    density: float | None
    dtype: str
    baseline: str
    dense_ms: float
    ms: float
    speedup: float
    low: float
    high: float
    noise: float
    """Median distance from 1 of two runs of the dense layer, one right after the other."""
    waited: float
    """Share of the time that this process's threads waited for a processor meanwhile."""
    rounds: int
    dense_flops: int | None
    flops: int
    dense_bytes: int | None
    bytes: int
    """That must be moved at least."""
    dense_floor_share: float | None
    floor_share: float
    """Seconds that the machine's measured rates allow for FLOPs and bytes, by those it took."""
    backend: str | None
    verdict: str
    dense_mem_bytes: int | None = None
    mem_bytes: int | None = None
    """Of a whole step, beside the parameters: tensors saved for the backward, gradients and the
    optimizer's state."""
    count: int = 1
    """How many such layers a model has."""

    @property
    def size(self) -> str:
        """Shape and tokens, as ``--shapes`` takes them."""
        shape = "x".join(map(str, self.shape))
        return shape if self.tokens is None else f"{shape}:{self.tokens}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class Budget:
    """Seconds that so many measurements share: what one leaves goes to the next."""

    total_s: float
    count: int
    clock: Callable[[], float] = time.perf_counter
    skipped: list[str] = field(default_factory=list)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def left_s(self) -> float:
        return self.total_s - (self.clock() - self._started)

    def share(self, what: str) -> float | None:
        """Seconds for the next measurement; None, and a note, where none are left."""
        remaining, self.count = max(self.count, 1), self.count - 1
        if (left := self.left_s()) <= 0:
            self.skipped.append(what)
            return None
        return left / remaining


def measured(
    dense: Step, ours: Step, device: torch.device, *, budget_s: float, rounds: int
) -> Paired:
    """Our time as a share of the dense one, of all rounds where too few were undisturbed."""
    timed = timed_on(device)
    try:
        return paired(dense, ours, rounds=rounds, warmup=1, timed=timed, budget_s=budget_s)
    except Disturbed as disturbed:
        return disturbed.found


def layer_rows(
    case: LayerCase,
    device: torch.device,
    budget: Budget,
    *,
    rounds: int,
    count: int = 1,
    report: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """The rows of a case, one for each stage there is time for; ``report`` is called after each."""
    pair: Pair | None = None
    for stage in case.stages:
        if (seconds := budget.share(f"{case.label} {stage}")) is None:
            continue
        # Nothing is built that there is no time for.
        pair = pair or Pair(case, device)
        yield stage_row(pair, stage, device, budget_s=seconds, rounds=rounds, count=count)
        report()


def stage_row(
    pair: Pair,
    stage: Stage,
    device: torch.device,
    *,
    budget_s: float,
    rounds: int,
    count: int = 1,
) -> Row:
    """One stage of both layers, timed."""
    case, backend = pair.case, pair.backend(stage)
    found = measured(
        pair.dense.stage(stage), pair.ours.stage(stage), device, budget_s=budget_s, rounds=rounds
    )
    memory = (pair.dense.memory(), pair.ours.memory()) if stage == "step" else (None, None)
    return _row(
        found,
        rates(device, case.case.dtype),
        case.costs()[stage],
        case.dense_costs()[stage],
        dense_ran=case.dense_ran(stage, backend),
        backend=backend,
        family=case.family,
        kind=case.kind,
        label=case.label,
        stage=stage,
        shape=case.shape,
        tokens=case.tokens,
        density=case.density,
        dtype=str(case.case.dtype)[6:],
        baseline=_BASELINES[stage],
        dense_mem_bytes=memory[0],
        mem_bytes=memory[1],
        count=count,
    )


_BASELINES: dict[Stage, str] = {
    "forward": "F.linear",
    "backward": "F.linear",
    "optimizer": "fused AdamW",
    "step": "F.linear, fused AdamW",
}


def contest_row(
    family: str,
    name: str,
    contest: Contest,
    device: torch.device,
    *,
    seconds: float,
    rounds: int,
    dtype: torch.dtype = torch.float32,
) -> Row:
    """A family without a layer, against the fastest of what a user would write."""
    timed = timed_on(device)
    times = {label: min(timed(step) for _ in range(2)) for label, step in contest.baselines.items()}
    best = min(times, key=times.__getitem__)
    found = measured(contest.baselines[best], contest.ours, device, budget_s=seconds, rounds=rounds)
    return _row(
        found,
        rates(device, dtype),
        Cost(contest.flops, contest.bytes),
        None,
        family=family,
        kind=family,
        label=f"{family} {name}",
        stage="kernel",
        shape=(),
        tokens=None,
        density=None,
        dtype=str(dtype)[6:],
        baseline=best,
        backend=None,
    )


def _row(
    found: Paired,
    speed: Rates,
    cost: Cost,
    dense: Cost | None,
    *,
    dense_ran: bool = False,
    **known: Any,
) -> Row:
    # The ratio was taken of our time by the dense one; quartiles change places.
    speedup, low, high = 1 / found.ratio, 1 / found.high, 1 / found.low
    return Row(
        dense_ms=found.a_ms,
        ms=found.b_ms,
        speedup=speedup,
        low=low,
        high=high,
        noise=found.noise,
        waited=found.waited,
        rounds=found.rounds,
        flops=cost.flops,
        bytes=cost.bytes,
        floor_share=1e3 * speed.floor_s(cost.flops, cost.bytes) / found.b_ms,
        dense_flops=None if dense is None else dense.flops,
        dense_bytes=None if dense is None else dense.bytes,
        dense_floor_share=None
        if dense is None
        else 1e3 * speed.floor_s(dense.flops, dense.bytes) / found.a_ms,
        verdict=verdict(
            speedup,
            low,
            high,
            noise=found.noise,
            waited=found.waited,
            dense_ran=dense_ran,
        ),
        **known,
    )


def total(rows: Sequence[Row], **names: Any) -> dict[str, Any]:
    """What the rows, each as often as its layer occurs, take together."""
    dense = math.fsum(row.count * row.dense_ms for row in rows)
    ours = math.fsum(row.count * row.ms for row in rows)
    # By the paired ratios; at the ends as if all were at their worst, or at their best, together.
    low, speedup, high = (
        dense / math.fsum(row.count * row.dense_ms / getattr(row, name) for row in rows)
        for name in ("low", "speedup", "high")
    )
    noise, waited = (max(getattr(row, name) for row in rows) for name in ("noise", "waited"))
    ran = all(row.verdict.endswith("(auto does)") for row in rows)
    return {
        **names,
        "layers": sum(row.count for row in rows),
        "dense_ms": dense,
        "ms": ours,
        "speedup": speedup,
        "low": low,
        "high": high,
        "verdict": verdict(speedup, low, high, noise=noise, waited=waited, dense_ran=ran),
    }

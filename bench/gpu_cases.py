"""What is timed on a GPU: the families' own cases, which backend is faster where, training steps.

A job is a name and a function from a clock to rows of figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

import torch

from bench import bench_overhead
from bench.gpu_timing import Clock
from maskedtrain.benchmark.timing import Paired, paired
from partial_kernels._core import discovery
from partial_kernels._core.contest import FLOOR, Bars, Contest
from partial_kernels._core.ops import Op
from partial_kernels.masks import Index
from partial_kernels.submatrix.cases import Case
from partial_kernels.submatrix.reference import OPS

__all__ = ["Job", "Row", "Stage", "jobs"]

Row = dict[str, Any]
Job = Callable[[Clock], dict[str, Row]]
Stage = Literal["kernels", "training"]

# By what sizes are divided where nothing is timed.
DRY_SCALE = 64
OVERHEAD_BAR = 1.3
TRAINING_BAR = 0.52


def jobs(dry: bool) -> dict[Stage, dict[str, Job]]:
    """Jobs by stage and name, those with a promise first."""
    scale = DRY_SCALE if dry else 1
    by_family = [list(_family_jobs(*family, dry, scale)) for family in discovery.cases()]
    # One of each family at a time: a run that is cut short has some of each.
    in_turn = [job for several in zip_longest(*by_family) for job in several if job is not None]
    named = [(name, job) for name, job, explicit in in_turn if not explicit]
    forced = [(name, job) for name, job, explicit in in_turn if explicit]
    return {
        "kernels": dict([*named, *_overhead_jobs(), *_dispatch_jobs(dry, scale), *forced]),
        "training": dict(_training_jobs(dry)),
    }


def _family_jobs(
    family: str, module: Any, dry: bool, scale: int
) -> Iterator[tuple[str, Job, bool]]:
    """Each case as "auto" takes it, and on the GPU backend where that is another."""
    if not hasattr(module, "gpu_cases"):
        return
    own = discovery.gpu_backend(family)
    # Nothing but the reference is sure to run on the CPU.
    explicit = "reference" if dry else str(own)
    for case, bars in module.gpu_cases(scale):
        name = f"{family}-{case.name}"
        make = partial(module.contest, case)
        yield name, partial(_compare, name, make, bars=bars, impl="auto"), False
        if own is not None:
            forced = f"{name} [{own}]"
            yield forced, partial(_compare, forced, make, bars=bars, impl=explicit), True


def _compare(
    name: str, make: Callable[..., Contest], clock: Clock, *, bars: Bars, impl: str
) -> dict[str, Row]:
    """Ours against each baseline that has a bar, or against the fastest where none has."""
    before = clock.allocated()
    with ran() as backends:
        first = make(device=clock.device, impl=impl)
        first.ours()
    footprint = clock.allocated() - before
    if impl != "auto":
        with ran() as chosen:
            make(device=clock.device).ours()
        if chosen == backends and clock.device == "cuda":
            # "auto" runs just that.
            return {}
    others = (
        make(device=clock.device, impl=impl, seed=2 * seed)
        for seed in range(1, clock.sets(first.bytes, footprint))
    )
    contests = [first, *others]
    ours = clock.program([contest.ours for contest in contests])
    promised = [label for label in bars if label != FLOOR]
    theirs = {
        label: clock.program([contest.baselines[label] for contest in contests])
        for label in promised or first.baselines
    }
    if not promised:
        promised = [min(theirs, key=lambda label: clock.seconds(theirs[label].run))]
    rows: dict[str, Row] = {}
    for label in promised:
        found = paired(theirs[label].run, ours.run, rounds=clock.rounds, timed=clock.seconds)
        rows[name if len(promised) == 1 else f"{name} / {label}"] = {
            **_figures(found, ours.calls, theirs[label].calls),
            "baseline": label,
            "bar": bars.get(label),
            "floor_bar": bars.get(FLOOR),
            "flops": first.flops,
            "bytes": first.bytes,
            "ran": " ".join(sorted(set(backends.values()))) or "torch",
            "sets": len(contests),
        }
    return rows


def _figures(found: Paired, calls: int = 1, baseline_calls: int = 1) -> Row:
    """Times of one call, and ratios of such."""
    share = baseline_calls / calls
    return {
        "ms": found.b_ms / calls,
        "baseline_ms": found.a_ms / baseline_calls,
        "ratio": found.ratio * share,
        "low": found.low * share,
        "high": found.high * share,
        "control": found.control,
    }


@contextmanager
def ran() -> Iterator[dict[str, str]]:
    """Gives the backend of each op that runs within it, by the op's name."""
    chosen: dict[str, str] = {}
    first = Op._first

    def record(self: Op, inputs: list[Any], wanted: str) -> Any:
        if (backend := first(self, inputs, wanted)) is not None:
            chosen[self.name] = backend.name
        return backend

    Op._first = record
    try:
        yield chosen
    finally:
        Op._first = first


def _overhead_jobs() -> Iterator[tuple[str, Job]]:
    """Calls so small that they are all overhead, by the wall clock."""

    def overhead(case: str, clock: Clock) -> dict[str, Row]:
        ours, baseline = bench_overhead.steps(case, clock.device)
        with torch.set_grad_enabled(case != "op"):
            found = paired(
                baseline, ours, rounds=clock.rounds, warmup=100, timed=clock.wall_seconds
            )
        row = {"baseline": "F.linear", "bar": OVERHEAD_BAR if case == "op" else None}
        return {f"overhead-{case}": {**_figures(found), **row}}

    for case in bench_overhead.BARS:
        yield f"overhead-{case}", partial(overhead, case)


def _dispatch_jobs(dry: bool, scale: int) -> Iterator[tuple[str, Job]]:
    """Gathered rows by our kernel and by cuBLAS, by the number of tokens; how rows are gathered."""
    width = 4096 // scale
    impls = ("reference", "reference") if dry else ("triton", "reference")
    for tokens in (256, 1024, 2048, 8192):
        for op in ("forward", "dx", "dweight"):
            name = f"rows-{op}-{tokens}"
            make = partial(_rows_contest, op, max(tokens // scale, 1), width, impls)
            yield name, partial(_compare, name, make, bars={}, impl="auto")
    name = "index_select"
    yield name, partial(_compare, name, partial(_gather_contest, width), bars={}, impl="auto")


def _half(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(width, generator=generator)[: width // 2].sort().values


def _rows_contest(
    op: str,
    tokens: int,
    width: int,
    impls: tuple[str, str],
    *,
    device: str,
    impl: str = "auto",
    seed: int = 0,
) -> Contest:
    """One op of a layer that keeps half of its weight's rows."""
    mask = Index(_half(width))
    case = Case("", (tokens,), width, width, mask, torch.bfloat16, bias=False)
    made, dy = case.make(seed, device), case.dy(seed + 1, device)
    x, weight, rows = made["x"], made["weight"], mask.on(dy.device, "rows")
    operands: dict[str, tuple[Any, ...]] = {
        "forward": (x, weight, None),
        "dx": (dy, weight, width),
        "dweight": (dy, x, weight),
    }

    def step(backend: str) -> Callable[[], object]:
        args = *operands[op], 0, rows, None, backend

        def run() -> object:
            with torch.no_grad():
                return getattr(OPS, op)(*args)

        return run

    flops = 2 * tokens * mask.numel(case.shape)
    size = 2 * (x.numel() + dy.numel() + mask.numel(case.shape))
    ours, gathered = impls
    return Contest(step(ours), {"gather + cuBLAS": step(gathered)}, flops, size)


def _gather_contest(width: int, *, device: str, impl: str = "auto", seed: int = 0) -> Contest:
    """Half of a weight's rows, by torch's three ways."""
    weight = torch.randn(width, width, device=device).to(torch.bfloat16)
    rows = _half(width).to(device)
    wide = rows[:, None].expand(-1, width)
    others = {"weight[rows]": lambda: weight[rows], "gather": lambda: weight.gather(0, wide)}
    size = 2 * weight.nbytes // 2 + rows.nbytes
    return Contest(lambda: weight.index_select(0, rows), others, 0, size)


def _training_jobs(dry: bool) -> Iterator[tuple[str, Job]]:
    """Steps of ATS against slimmable training's of the same networks."""

    def job(name: str, experiment: str, clock: Clock) -> dict[str, Row]:
        # Not at the top: what times kernels needs none of this.
        from maskedtrain.benchmark.training import EXPERIMENTS, Steps

        ats, slimmable = (
            Steps(
                EXPERIMENTS[experiment],
                method,
                device=clock.device,
                batch_size=2 if dry else None,
                autocast=torch.bfloat16,
            )
            for method in ("ats", "slimmable")
        )
        found = paired(slimmable, ats, rounds=clock.rounds, timed=clock.wall_seconds)
        row = {"baseline": "slimmable", "bar": TRAINING_BAR}
        return {name: {**_figures(found, ats.count, slimmable.count), **row}}

    images, text = "cifar10-resnet18", "iwslt14-lowrank4"
    if dry:
        images, text = "digits-resnet8", "multi30k-lowrank4"
    for name, experiment in {"train-resnet18": images, "train-transformer": text}.items():
        yield name, partial(job, name, experiment)

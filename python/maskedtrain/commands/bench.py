"""time the kernels on this machine, and choose their tiles"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from maskedtrain.commands._options import parse
from maskedtrain.config import unknown_name
from maskedtrain.training.console import Console
from partial_kernels._core import discovery, tiles
from partial_kernels._core.contest import Contest, Step
from partial_kernels._core.tiles import Tile
from partial_kernels._core.tuning import tune

# Seconds that a case may take.
_CASE_SECONDS = 2.0


@dataclass(frozen=True)
class Options:
    """Time the kernels against the best plain PyTorch, on a GPU where there is one."""

    families: tuple[str, ...] = ()
    """Only these families of kernels; all where not given."""
    tune: bool = False
    """Instead, try the Triton kernels' tiles on this machine's GPU and keep the fastest, for this
    user: in $XDG_CONFIG_HOME/maskedtrain/tiles, whence they are read from then on."""


def main(arguments: Sequence[str], console: Console) -> None:
    options = parse(Options, arguments, command="bench")
    for family in options.families:
        if family not in discovery.families():
            raise unknown_name("family", family, discovery.families())
    cuda = torch.cuda.is_available()
    if options.tune and not cuda:
        raise RuntimeError("--tune chooses tiles of GPU kernels, and there is no CUDA device here")
    chosen = [
        (name, module)
        for name, module in discovery.cases()
        if name in (options.families or discovery.families()) and hasattr(module, "contest")
    ]
    if options.tune:
        _tune(chosen, console)
        return
    console.print("time of a step, and its share of that of the fastest other way")
    for name, module in chosen:
        for case, _ in _cases(module, cuda):
            contest = module.contest(case, device="cuda" if cuda else "cpu")
            baseline, ms, ratio = _compared(contest, cuda)
            label = f"{name} {case.name}"
            console.print(f"{label:<36} {ms:9.3f} ms {ratio:7.2f} x {baseline}")


def _cases(module: Any, cuda: bool) -> Iterator[tuple[Any, Any]]:
    if cuda:
        yield from module.gpu_cases()
    else:
        yield from ((case, None) for case in module.BENCH_CASES)


def _seconds(step: Step, cuda: bool) -> float:
    started = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _compared(contest: Contest, cuda: bool) -> tuple[str, float, float]:
    """The fastest baseline, our time in ms, and the median of our time by its, taken in turns."""
    steps = {"": contest.ours, **contest.baselines}
    for step in steps.values():
        _seconds(step, cuda)
    times = {
        name: min(_seconds(step, cuda) for _ in range(2)) for name, step in steps.items() if name
    }
    best = min(times, key=times.__getitem__)
    ours: list[float] = []
    ratios: list[float] = []
    deadline = time.perf_counter() + _CASE_SECONDS
    while len(ratios) < 3 or (time.perf_counter() < deadline and len(ratios) < 50):
        before = _seconds(contest.baselines[best], cuda)
        ours.append(_seconds(contest.ours, cuda))
        ratios.append(ours[-1] / before)
    return best, 1e3 * statistics.median(ours), statistics.median(ratios)


def _tune(chosen: Sequence[tuple[str, Any]], console: Console) -> None:
    from triton.testing import do_bench  # only where there are tiles to choose

    def seconds(step: Callable[[], object]) -> float:
        return cast("float", do_bench(step, warmup=5, rep=30, return_mode="median")) / 1e3

    file = tiles.user_folder() / tiles.device_file(torch.cuda.get_device_name())
    found: dict[str, Tile] = {}
    for name, module in chosen:
        if "triton" not in discovery.backends(name):
            continue
        kernels = importlib.import_module(f"{discovery.PACKAGE}.{name}.kernels")
        for case, _ in module.gpu_cases():
            step = module.contest(case, device="cuda", impl="triton").ours
            for key, default, best in tune(step, kernels.CANDIDATES, seconds, found):
                gain = f"{default / best:.2f} times as fast" if key in found else "the default"
                console.print(f"{key:<56} {1e3 * best:8.3f} ms   {gain}")
                # After each: what a run had when it was stopped is kept.
                tiles.write(file, found)
    console.print(f"{len(found)} tiles in {file}")

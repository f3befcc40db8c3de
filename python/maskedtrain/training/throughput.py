"""How fast a training runs, and what that is of the machine's rate in a large matrix product."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from maskedtrain.methods.base import Pass, Plan
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.training.loop import Batch, target_count

__all__ = ["Meter", "Stretch", "matmul_flops_per_s"]


class Stretch:
    """A stretch of work on a device, from where this is made to ``end()``.

    On CUDA it is measured there, by events: steps that nobody waits for cost what they cost and not
    the little time in which they are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._started = self._ended = self._now()

    def end(self) -> None:
        """The work has been asked for."""
        self._ended = self._now()

    def seconds(self) -> float:
        """How long it took; waits for it."""
        if self._stream is None:
            return self._ended - self._started
        self._ended.synchronize()
        return self._started.elapsed_time(self._ended) / 1000

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        return self._stream.record_event(torch.cuda.Event(enable_timing=True))


@dataclass
class _Spent:
    targets: Any = 0
    flops: int = 0
    seconds: float = 0.0


class Meter:
    """Counts what steps cost, for every network by itself.

    What a pass costs is counted when its kind is first met: one of its network's name, in a plan
    whose update has this name, in a model of so many parameters.

    Args:
        batch_flops: FLOPs of a plan of a single pass, forward and backward, by a batch's inputs.
        peak_flops_per_s: the rate that utilisation is measured by.
        networks: what is counted in the place of a pass's network of such a name: one that stands
            for all that are drawn under it.
    """

    def __init__(
        self,
        batch_flops: Callable[[Plan], Callable[[Any], int]],
        peak_flops_per_s: float,
        networks: Mapping[str, SubNetwork] | None = None,
    ) -> None:
        self._batch_flops = batch_flops
        self._peak = peak_flops_per_s
        self._networks = networks or {}
        self._known: dict[tuple[str, str, int], Callable[[Any], int]] = {}
        self._taken: list[Batch] = []
        # Of steps that need not be over: their networks, and how long they take.
        self._going: list[tuple[set[str], Callable[[], float]]] = []
        self._seconds = 0.0
        self._spent: dict[str, _Spent] = defaultdict(_Spent)

    def seen(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, noting each."""
        for batch in batches:
            self._taken.append(batch)
            yield batch

    def step(self, plan: Plan, seconds: Callable[[], float]) -> int:
        """The batches noted since the last call were a step by this plan; returns its FLOPs.

        ``seconds`` says how long it took, for which it may have to wait; it is asked later.
        """
        each = len(self._taken) // plan.batches
        flops = sum(
            self._pass_flops(plan, item)(inputs)
            for item in plan.every_pass
            for inputs, _ in self._taken[item.batch * each : (item.batch + 1) * each]
        )
        targets = sum(target_count(targets) for _, targets in self._taken)
        names = {item.subnet.name for item in plan.every_pass}
        for name in names:
            spent = self._spent[name]
            spent.flops += flops
            spent.targets += targets
        self._going.append((names, seconds))
        self._taken.clear()
        return flops

    def _pass_flops(self, plan: Plan, item: Pass) -> Callable[[Any], int]:
        name, size = item.subnet.name, sum(p.numel() for p in plan.update.model.parameters())
        key = (name, plan.update.name, size)
        if key not in self._known:
            counted = replace(item, subnet=self._networks.get(name, item.subnet))
            self._known[key] = self._batch_flops(Plan((counted,), plan.update))
        return self._known[key]

    def seconds(self) -> float:
        """What all steps took."""
        self._settle()
        return self._seconds

    def _settle(self) -> None:
        """Wait for the steps that are not over."""
        for names, seconds in self._going:
            took = seconds()
            self._seconds += took
            for name in names:
                self._spent[name].seconds += took
        self._going.clear()

    def rates(self, network: str) -> dict[str, float]:
        """Speed of the steps of a network since the last call for it."""
        self._settle()
        spent = self._spent.pop(network)
        return {
            "targets_per_s": float(spent.targets) / spent.seconds,
            "flop_utilization": spent.flops / spent.seconds / self._peak,
        }


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second (2 per multiply-add) of a square matrix product, the best of a few; takes
    about a tenth of a second.
    """
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 5)
    # A generator of its own: a run's random numbers must not depend on being measured.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    return 2 * size**3 / min(_seconds(a) for _ in range(repeats))


def _seconds(a: torch.Tensor) -> float:
    started = time.perf_counter()
    (a @ a).sum().item()
    return time.perf_counter() - started

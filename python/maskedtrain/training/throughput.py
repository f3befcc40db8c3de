"""How fast a training runs, and what that is of the machine's rate in a large matrix product."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from maskedtrain.training.loop import Batch, target_count

__all__ = ["Meter", "matmul_flops_per_s"]


@dataclass
class _Spent:
    targets: Any = 0
    flops: int = 0
    seconds: float = 0.0


class Meter:
    """Counts what steps cost, for every network by itself.

    Args:
        batch_flops: FLOPs of a forward and backward pass of each network, by a batch's inputs.
        peak_flops_per_s: the rate that utilisation is measured by.
    """

    def __init__(
        self, batch_flops: Mapping[str, Callable[[Any], int]], peak_flops_per_s: float
    ) -> None:
        self._batch_flops = batch_flops
        self._peak = peak_flops_per_s
        self._taken: list[Batch] = []
        self._spent: dict[str, _Spent] = defaultdict(_Spent)

    def seen(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, noting each."""
        for batch in batches:
            self._taken.append(batch)
            yield batch

    def step(self, networks: Collection[str], seconds: float) -> int:
        """The batches noted since the last call were a step of these networks; returns its
        FLOPs.
        """
        flops = sum(self._batch_flops[name](x) for name in networks for x, _ in self._taken)
        targets = sum(target_count(targets) for _, targets in self._taken)
        for name in networks:
            spent = self._spent[name]
            spent.flops += flops
            spent.targets += targets
            spent.seconds += seconds
        self._taken.clear()
        return flops

    def rates(self, network: str) -> dict[str, float]:
        """Speed of the steps of a network since the last call for it."""
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

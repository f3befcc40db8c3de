"""The cases of every family on a GPU, by backend, and what tests do with a call there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from partial_kernels._core import discovery
from partial_kernels._core.ops import Explained, explaining
from partial_kernels._core.testing import Call

DRY_RUN = os.environ.get("PARTIAL_KERNELS_DRY_RUN") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"

FAMILIES: dict[str, ModuleType] = dict(discovery.cases())
# Families that have a backend of their own on a GPU.
OWN = {family: own for family in FAMILIES if (own := discovery.gpu_backend(family)) is not None}


def name_of(family: str, backend: str, case: Any) -> str:
    """A test's name; results are counted by its first two parts."""
    return f"{family}-{backend}-{case.name}"


def spread(cases: tuple[Any, ...], count: int) -> list[Any]:
    """So many of the cases, from all along the list; a tenth of them in a dry run."""
    count = max(count // 10, 2) if DRY_RUN else count
    return list(cases[:: max(len(cases) // count, 1)])


def own_cases(count: int) -> dict[str, tuple[str, Any]]:
    """Family and case by name, for each family's own backend; expanded tensors cannot be written
    to.
    """
    return {
        name_of(family, own, case): (family, case)
        for family, own in OWN.items()
        for case in spread(
            tuple(
                case
                for case in FAMILIES[family].CASES
                if "expanded" not in (getattr(case, "layout", ""), getattr(case, "x_layout", ""))
            ),
            count,
        )
    }


def impl_of(backend: str) -> str:
    """What ``impl=`` gets: in a dry run the one backend that is everywhere."""
    return "reference" if DRY_RUN else backend


def refusal(family: str, case: Any, backend: str) -> str | None:
    """Why the backend cannot take the case; None if it can."""
    impl = impl_of(backend)
    try:
        with explaining():
            FAMILIES[family].check(case, impl=impl, device=DEVICE)
    except Explained as explained:
        choice = explained.choice
        return None if choice.backend == impl else choice.reasons.get(impl, str(choice))
    except RuntimeError as error:
        # Plain PyTorch has no backends.
        return str(error)
    # No op is reached where there is nothing to do: any backend can do that.
    return None


def call_of(family: str, case: Any, backend: str, seed: int = 0) -> Call:
    return FAMILIES[family].call(case, impl=impl_of(backend), device=DEVICE, seed=seed)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Of the values; sparse ones become dense."""
    return [tensor.to_dense().clone() for tensor in tensors]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Every bit is the same; NaN equals NaN."""
    assert len(actual) == len(expected)
    for position, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        # Not torch.equal: special numbers are among the inputs.
        same = (mine == theirs) | ((mine != mine) & (theirs != theirs))
        assert mine.dtype == theirs.dtype and bool(same.all()), f"result {position}"


def set_to(call: Call, values: list[Tensor]) -> None:
    """Change the call's inputs in place."""
    for tensor, value in zip(call.inputs, values, strict=True):
        tensor.copy_(value)


@contextmanager
def side_stream() -> Iterator[Any]:
    """Within it everything runs on a stream that can be captured."""
    if DRY_RUN:
        yield None
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def captured(run: Callable[[], list[Tensor]], stream: Any) -> Callable[[], list[Tensor]]:
    """The run as a CUDA graph, after one that loads what it needs; a call replays it."""
    run()
    if DRY_RUN:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        held = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return held

    return replay


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, whatever waits for the device raises."""
    if DRY_RUN:
        with nullcontext():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

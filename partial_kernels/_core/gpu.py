"""What Triton backends share: where they run, one way to launch, and a record of what would be."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partial_kernels._core.discovery import INTERPRETED
from partial_kernels._core.tiles import Tile
from partial_kernels._native import EMULATED

__all__ = [
    "Launch",
    "capability",
    "ceil_div",
    "elsewhere",
    "launch",
    "precision",
    "recorded",
    "refuses",
    "refuses_region",
    "roomy",
]

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    tile: Tile


_record: ContextVar[tuple[list[Launch], int] | None] = ContextVar("record", default=None)


@contextmanager
def recorded(capability: int) -> Generator[list[Launch]]:
    """Within it nothing is launched; the list that it gives has what would have been, on a device
    of this compute capability (90 for 9.0).
    """
    launches: list[Launch] = []
    token = _record.set((launches, capability))
    try:
        yield launches
    finally:
        _record.reset(token)


def capability(tensor: Tensor) -> int:
    """The compute capability of the tensor's device, 90 for 9.0."""
    if (record := _record.get()) is not None:
        return record[1]
    major, minor = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def roomy(tensor: Tensor) -> bool:
    """Whether a block of threads may have 227 KB of shared memory, from where tensor cores read: on
    Hopper and on data-center Blackwell.
    """
    return capability(tensor) in (90, 100, 103)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile, **constants: Any) -> None:
    """Run the kernel on the device of the first of its arguments that is a tensor."""
    if (record := _record.get()) is not None:
        record[0].append(Launch(kernel, grid, args, constants, tile))
        return
    with _on(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[grid](
            *args,
            **constants,
            **tile.sizes,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    if INTERPRETED or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def elsewhere(tensor: Tensor) -> str | None:
    """Why the compiled CUDA kernels cannot take this: it is not on CUDA."""
    return None if tensor.is_cuda or EMULATED else f"it runs on CUDA, got {tensor.device}"


_REGION_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
# Of a region's description, which is an argument of the launch.
_REGION_DIMENSIONS = 5


def refuses_region(tensor: Tensor, dtypes: str) -> str | None:
    """Why the compiled CUDA kernels cannot take regions of this; ``dtypes`` says what they take."""
    if (why := elsewhere(tensor)) is not None:
        return why
    if tensor.dtype not in _REGION_DTYPES:
        return f"it {dtypes}, got {tensor.dtype}"
    if tensor.ndim > _REGION_DIMENSIONS:
        return f"it takes up to {_REGION_DIMENSIONS} dimensions, got {tensor.ndim}"
    return None


def refuses(*tensors: Tensor | None) -> str | None:
    """Why Triton kernels cannot take these."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not (tensor.is_cuda or INTERPRETED):
            return f"it runs on CUDA, got {tensor.device}"
        if tensor.dtype not in _DTYPES:
            return f"it computes in fp32, bf16 and fp16, got {tensor.dtype}"
        if tensor.dtype == torch.bfloat16 and INTERPRETED:
            return "Triton's interpreter computes wrongly in bf16"
        if tensor.is_neg():
            return "it reads memory as it is, got a negated view"
    return None


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def precision() -> str:
    """How products of fp32 numbers are taken: as torch's own are on CUDA."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

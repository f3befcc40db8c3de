"""The compiled libraries: ``_C`` for the CPU, ``_C_cuda`` for CUDA; or why they are not here."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from sysconfig import get_config_var
from typing import Any

__all__ = [
    "EMULATED",
    "NativeStatus",
    "OutdatedLibrary",
    "contiguous_rows",
    "cuda_status",
    "native_op",
    "native_status",
]

# The library leaves libtorch's symbols to be found in the process, so torch is loaded first.
import torch

# Without complete types.
_ops: Any = torch.ops

EMULATED = os.environ.get("PARTIAL_KERNELS_EMULATED")
"""A library of the CUDA kernels that runs them on the CPU, for tests; None otherwise."""


@dataclass(frozen=True)
class NativeStatus:
    """`reason` says why the library is not available; `info` is how it was built."""

    available: bool
    reason: str | None = None
    info: dict[str, Any] | None = None


@functools.cache
def native_status() -> NativeStatus:
    """Load the compiled library, which registers its ops with torch, and say what came of it."""
    try:
        library = importlib.import_module("partial_kernels._C")
    except ModuleNotFoundError:
        return NativeStatus(available=False, reason=_not_built("_C"))
    except ImportError as error:
        reason = f"it does not load with torch {torch.__version__}: {error}"
        return NativeStatus(available=False, reason=reason)
    return NativeStatus(available=True, info=library.build_info())


@functools.cache
def cuda_status() -> NativeStatus:
    """As ``native_status``, of the CUDA kernels' library."""
    if torch.version.cuda is None and EMULATED is None:
        reason = f"torch {torch.__version__} is built without CUDA"
        return NativeStatus(available=False, reason=reason)
    path = Path(EMULATED or _path("_C_cuda"))
    if not path.exists():
        return NativeStatus(available=False, reason=_not_built("_C_cuda"))
    try:
        _ops.load_library(path)
        describe = ctypes.CDLL(str(path)).partial_kernels_cuda_info
    except (OSError, AttributeError) as error:
        reason = f"it does not load with torch {torch.__version__}: {error}"
        return NativeStatus(available=False, reason=reason)
    describe.restype = ctypes.c_char_p
    return NativeStatus(available=True, info={"built": describe().decode()})


class OutdatedLibrary(ImportError):
    """The library was compiled before this package had one of its kernels."""


def native_op(name: str) -> Callable[..., Any]:
    """An op of the compiled library, which must be available.

    Raises:
        OutdatedLibrary: it has no such op.
    """
    packet = getattr(torch.ops.partial_kernels, name, None)
    if packet is None:
        raise OutdatedLibrary(
            f"the compiled library is older than the package and has no {name}; "
            "run `pip install -e .`"
        )
    return packet.default


def contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix, or a copy if the elements of a row do not adjoin: kernels read rows."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _path(library: str) -> Path:
    return Path(__file__).with_name(library + get_config_var("EXT_SUFFIX"))


def _not_built(library: str) -> str:
    failure = Path(__file__).with_name(f"{library}_failure.txt")
    if failure.exists():
        return failure.read_text(encoding="utf-8").strip()
    return f"{_path(library)} does not exist; run `pip install -e .`"

"""The compiled library partial_kernels._C: how it was built, or why it is not here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from sysconfig import get_config_var
from typing import Any

__all__ = ["NativeStatus", "OutdatedLibrary", "contiguous_rows", "native_op", "native_status"]

# The library leaves libtorch's symbols to be found in the process, so torch is loaded first.
import torch


@dataclass(frozen=True)
class NativeStatus:
    """`reason` says why the library is not available; `info` is its build_info()."""

    available: bool
    reason: str | None = None
    info: dict[str, Any] | None = None


@functools.cache
def native_status() -> NativeStatus:
    """Load the compiled library, which registers its ops with torch, and say what came of it."""
    try:
        library = importlib.import_module("partial_kernels._C")
    except ModuleNotFoundError:
        return NativeStatus(available=False, reason=_not_built())
    except ImportError as error:
        reason = f"it does not load with torch {torch.__version__}: {error}"
        return NativeStatus(available=False, reason=reason)
    return NativeStatus(available=True, info=library.build_info())


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


def _not_built() -> str:
    folder = Path(__file__).parent
    failure = folder / "_build_failure.txt"
    if failure.exists():
        return failure.read_text(encoding="utf-8").strip()
    return f"{folder / '_C'}{get_config_var('EXT_SUFFIX')} does not exist; run `pip install -e .`"

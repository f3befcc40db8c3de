"""Kernel families are found, not listed: every folder of the package that holds a
``function.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from partial_kernels._native import OutdatedLibrary, cuda_status, native_status

__all__ = [
    "INTERPRETED",
    "backends",
    "cases",
    "families",
    "gpu_backend",
    "load",
    "unavailable",
]

PACKAGE = __name__.split(".", 1)[0]
# Triton reads it, too, once: kernels run in its interpreter, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ROOT = Path(__file__).resolve().parents[1]
_outdated: dict[str, str] = {}
_FILES = {"native": "native", "triton": "kernels", "cuda": "cuda"}


def families() -> list[str]:
    """Names of the kernel families, in alphabetical order."""
    return sorted(path.parent.name for path in _ROOT.glob("*/function.py"))


def unavailable() -> dict[str, str]:
    """Backends that are not loaded in this process, for some family at least, with the reason."""
    reasons = _missing()
    return {**reasons, **_outdated}


def _missing() -> dict[str, str]:
    reasons: dict[str, str] = {}
    native = native_status()
    if native.reason is not None:
        reasons["native"] = f"the compiled library is not available: {native.reason}"
    if (reason := cuda_status().reason) is not None:
        reasons["cuda"] = f"the compiled CUDA library is not available: {reason}"
    if torch.version.cuda is None and not INTERPRETED:
        reasons["triton"] = f"torch {torch.__version__} is built without CUDA"
    elif importlib.util.find_spec("triton") is None:
        reasons["triton"] = "triton is not installed"
    return reasons


def backends(family: str) -> list[str]:
    """Backends that the family has beside the reference, whether they can be loaded here or not."""
    return [name for name, file in _FILES.items() if (_ROOT / family / f"{file}.py").exists()]


def gpu_backend(family: str) -> str | None:
    """The one that the family has for a GPU."""
    return next((name for name in ("triton", "cuda") if name in backends(family)), None)


def load(family: str) -> ModuleType:
    """Import a family and the backends it has that can be loaded here."""
    missing = _missing()
    module = importlib.import_module(f"{PACKAGE}.{family}")
    for backend in backends(family):
        if backend in missing:
            continue
        try:
            importlib.import_module(f"{PACKAGE}.{family}.{_FILES[backend]}")
        except OutdatedLibrary as outdated:
            _outdated[backend] = str(outdated)
            warnings.warn(f"{PACKAGE}.{family}: {outdated}", stacklevel=2)
    return module


def cases() -> Iterator[tuple[str, ModuleType]]:
    """(family, its ``cases`` module) of every family: what tests, benchmarks and fuzzing run on."""
    for family in families():
        yield family, importlib.import_module(f"{PACKAGE}.{family}.cases")

"""``explain``: which backend a call would use, and why not the others."""

from __future__ import annotations

import importlib
from typing import Any

from partial_kernels._core.discovery import PACKAGE, unavailable
from partial_kernels._core.ops import Choice, Explained, explaining

__all__ = ["explain"]


def explain(name: str, *args: Any, **kwargs: Any) -> Choice:
    """Say which backend ``pk.<name>(*args, **kwargs)`` would run, and why not the others.

    Arguments are checked as in the call itself; nothing is computed and nothing is changed.

    Returns:
        A ``Choice(op, backend, reasons)``; ``backend`` is None where nothing can run the call.

    Raises:
        ValueError: no function of that name.
        Whatever the function raises for these arguments.
    """
    function = getattr(importlib.import_module(PACKAGE), name, None)
    if not callable(function):
        raise ValueError(f"partial_kernels has no function {name!r}")
    try:
        with explaining():
            function(*args, **kwargs)
    except Explained as explained:
        choice = explained.choice
        return Choice(choice.op, choice.backend, {**unavailable(), **choice.reasons})
    return Choice(name, None, {"partial_kernels": "there is nothing to do"})

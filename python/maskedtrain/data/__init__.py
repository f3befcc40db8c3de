"""Data sets. One file is one data set: a public module of this folder with a ``load`` function."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from types import ModuleType
from typing import Any

__all__ = ["available", "load"]


def available() -> tuple[str, ...]:
    """Names that :func:`load` accepts, sorted."""
    return tuple(name for name in _public_modules() if hasattr(_module(name), "load"))


def load(name: str, root: str | os.PathLike[str] | None = None, **options: Any) -> Any:
    """Load the data set `name`: ``maskedtrain.data.<name>.load(root, **options)``.

    Image data sets return :class:`maskedtrain.data.images.ImageDataset`; `root` is where the files
    lie (None: ``$MASKEDTRAIN_DATA`` for data sets that read files).

    Raises ValueError for an unknown name or option; FileNotFoundError, ValueError or ImportError
    where the files are missing, damaged, or need a package that is not installed.
    """
    if name not in _public_modules() or not hasattr(_module(name), "load"):
        raise ValueError(f"data set must be one of {', '.join(available())}, got {name!r}")
    loader = _module(name).load
    accepted = inspect.signature(loader).parameters.keys() - {"root"}
    if unknown := options.keys() - accepted:
        raise ValueError(
            f"options of data set {name} must be among {', '.join(sorted(accepted))}, "
            f"got {', '.join(sorted(unknown))}"
        )
    return loader(root, **options)


def _public_modules() -> list[str]:
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.startswith("_"))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")

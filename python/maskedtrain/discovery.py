"""Finding what a folder offers, so that there is no list to edit."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import ClassVar, Protocol, TypeVar

__all__ = ["find_configs"]


class _Named(Protocol):
    name: ClassVar[str]


_Config = TypeVar("_Config", bound=_Named)


def find_configs(
    package: str, path: Iterable[str], base: type[_Config]
) -> dict[str, type[_Config]]:
    """Every class ``Config`` derived from ``base`` in a package's modules, by its ``name``."""
    modules = (importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(path))
    found = [config for m in modules if (config := getattr(m, "Config", None)) is not None]
    return {config.name: config for config in found if issubclass(config, base)}

"""Tables of what was measured on devices: JSON files that map a key to a value, one for each
device.

Those of ``partial_kernels/<kind>`` are shipped; those of ``$XDG_CONFIG_HOME/maskedtrain/<kind>``
are the user's own, written by ``maskedtrain bench --tune``, and come first.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

__all__ = ["Tables", "device_name", "processor", "slug"]

Value = TypeVar("Value")


class Tables(Generic[Value]):
    """The tables of one kind.

    Args:
        kind: what their values are, also as the folders' name.
        encode: makes a value one of JSON.
        decode: the inverse; raises ValueError or TypeError for what is no value.
    """

    def __init__(
        self, kind: str, encode: Callable[[Value], Any], decode: Callable[[Any], Value]
    ) -> None:
        self.kind = kind
        self.shipped = Path(__file__).resolve().parents[1] / kind
        self._encode, self._decode = encode, decode
        self._known: dict[str, dict[str, Value]] = {}

    def user_file(self, device: str) -> Path:
        """Where the user's own table of the device of this name is."""
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        return Path(config) / "maskedtrain" / self.kind / f"{slug(device)}.json"

    def files(self, device: str) -> list[Path]:
        """The tables that are in force on the device; the later come first."""
        own = self.user_file(device)
        return [file for file in (self.shipped / own.name, own) if file.exists()]

    def of(self, device: str) -> dict[str, Value]:
        """What they say of it; read once, for kernels ask at every call."""
        known = self._known.get(device)
        if known is None:
            known = {key: v for file in self.files(device) for key, v in self.read(file).items()}
            self._known[device] = known
        return known

    def forget(self) -> None:
        """Read the tables anew when next they are asked for."""
        self._known.clear()

    def read(self, file: Path) -> dict[str, Value]:
        """The values of a table; none where there is no such file.

        Raises:
            ValueError: it is no table of this kind.
        """
        if not file.exists():
            return {}
        try:
            entries: Any = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(entries, dict):
                raise ValueError("it is no JSON object")
            found = cast("dict[str, Any]", entries)
            return {key: self._value(key, entry) for key, entry in found.items()}
        except ValueError as error:
            raise ValueError(f"{file} is no table of {self.kind}: {error}") from error

    def _value(self, key: str, entry: Any) -> Value:
        try:
            return self._decode(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key!r}: {error}") from None

    def write(self, file: Path, values: Mapping[str, Value]) -> None:
        """Add these to the table, all at once."""
        entries = {key: self._encode(v) for key, v in {**self.read(file), **values}.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(file)
        self.forget()


def device_name(device: torch.device) -> str:
    """The GPU's name; for a CPU, its name and the number of torch's threads, as its tables are of
    this number.
    """
    if device.type == "cuda":
        return _gpu_name(device)
    return f"{processor()} {torch.get_num_threads()}"


@cache
def processor() -> str:
    """The CPU's name, as it says itself."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def slug(name: str) -> str:
    """The name as one of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

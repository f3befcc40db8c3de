"""Writing files: a reader sees the old file or the new one; a failure is one clear line."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


class OutputError(OSError):
    """Something could not be written. `str()` is one line: what, and why; `errno` as in OSError."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


@contextmanager
def output_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError of the body (disk full, no permission …) into an OutputError about `path`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise OutputError(error.errno, reason, os.fspath(path)) from error


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents where they are missing. Raises OutputError."""
    with output_errors(path):
        os.makedirs(path, exist_ok=True)
    return Path(path)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder (new files, renames) survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def durable_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for binary writing; after the body its bytes are on the disk, not in a cache."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for binary writing so that it changes only if the body ends without an exception.

    The bytes go to a hidden file in the same folder, which takes the name `path` once it is on the
    disk. After any exception the hidden file is gone and `path` is as before. An OSError of the
    body counts as a failure to write `path`, so the body should do nothing but write.

    Raises OutputError.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with output_errors(path):
        try:
            with durable_write(temp) as file:
                yield file
            os.replace(temp, path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def jsonable(value: Any) -> Any:
    """`value` in terms of what strict JSON can hold.

    NaN and infinities become None, one-element tensors and arrays numbers, tuples lists, paths
    strings. Raises TypeError for what has no JSON form.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return jsonable(value.item())
    raise TypeError(f"a {type(value).__name__} has no JSON form: {value!r}")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `jsonable(value)` as indented JSON, atomically. Raises OutputError, TypeError."""
    text = json.dumps(jsonable(value), indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Files of data sets: where they are looked for, and a cache for what is slow to decode."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedtrain.files import atomic_write, make_folder, sha256

ROOT_VARIABLE = "MASKEDTRAIN_DATA"

Bytes = NDArray[np.uint8]


def find_root(root: str | os.PathLike[str] | None, name: str) -> Path:
    """`root`, or ``$MASKEDTRAIN_DATA`` where it is None.

    Raises ValueError where neither is given, FileNotFoundError where nothing is there.
    """
    place = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not place:
        raise ValueError(f"{name} is read from files: pass their folder or set {ROOT_VARIABLE}")
    path = Path(place).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file or folder: {path}")
    return path


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/maskedtrain``, or ``~/.cache/maskedtrain``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore relative paths.
    return (base if base.is_absolute() else Path.home() / ".cache") / "maskedtrain"


def decoded(
    source: Path,
    names: Sequence[str],
    decode: Callable[[Path], Sequence[Bytes]],
    *,
    size_bytes: int,
    cache: str | os.PathLike[str] | None,
) -> list[Bytes]:
    """What ``decode(source)`` returns, one array of `size_bytes` per name, through a file cache.

    Cache entries are memory-mapped. Their file names carry the SHA-256 of `source`, so a changed
    source never meets an old entry; an entry of the wrong size is replaced. Where the folder
    `cache` (None: :func:`default_cache`) cannot be written, there is a warning and no entry.
    """
    folder = Path(cache).expanduser() if cache is not None else default_cache()
    key = sha256(source)
    entries = [folder / f"{name}-{key}" for name in names]
    if all(_size(entry) == size_bytes for entry in entries):
        return [np.memmap(entry, np.uint8, mode="r") for entry in entries]
    arrays = list(decode(source))
    _store(folder, {entry.name: array.data for entry, array in zip(entries, arrays, strict=True)})
    return arrays


def cached(
    name: str,
    make: Callable[[], Mapping[str, NDArray[Any]]],
    *,
    cache: str | os.PathLike[str] | None,
) -> dict[str, NDArray[Any]]:
    """What ``make()`` returns, through the file `name` in the folder `cache` (None:
    :func:`default_cache`).

    The name must say all that the arrays depend on. A damaged file is made anew; where the folder
    cannot be written, there is a warning and no file.
    """
    folder = Path(cache).expanduser() if cache is not None else default_cache()
    # A file is the SHA-256 of the rest, and an npz archive.
    with suppress(OSError), (folder / name).open("rb") as file:
        digest, content = file.read(32), file.read()
        if hashlib.sha256(content).digest() == digest:
            return dict(np.load(io.BytesIO(content), allow_pickle=False))
    made = dict(make())
    archive = io.BytesIO()
    np.savez(archive, allow_pickle=False, **made)
    content = archive.getvalue()
    _store(folder, {name: memoryview(hashlib.sha256(content).digest() + content)})
    return made


def _store(folder: Path, entries: Mapping[str, memoryview]) -> None:
    """Write cache entries, or warn."""
    try:
        make_folder(folder)
        for name, content in entries.items():
            with atomic_write(folder / name) as file:
                file.write(content)
    except OSError as error:
        warnings.warn(
            f"cannot write the cache folder {folder} ({error.strerror}): "
            "the data will be decoded again next time",
            stacklevel=3,
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None

"""CIFAR-10 from the official binary records: 60,000 colour images of 32 x 32 pixels, 10 classes.

A record is a label byte and 3,072 pixel bytes, [3, 32, 32]; a file is 10,000 records.
"""

from __future__ import annotations

import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch

from maskedtrain.data._files import Bytes, decoded, find_root
from maskedtrain.data.images import (
    Augment,
    ImageConfig,
    ImageDataset,
    ImageSplit,
    Interpolation,
    held_out,
    upsample,
)

FOLDER = "cifar-10-batches-bin"
ARCHIVE = "cifar-10-binary.tar.gz"
FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
NUM_CLASSES = 10
RECORD_BYTES = 1 + 3 * 32 * 32
FILE_BYTES = 10_000 * RECORD_BYTES

# Of the 50,000 images outside the test set.
MEAN = (0.49139968, 0.48215841, 0.44653091)
STD = (0.24703223, 0.24348513, 0.26158784)


def load(
    root: str | os.PathLike[str] | None = None,
    *,
    image_size: int = 32,
    interpolation: Interpolation = "bilinear",
    val_fraction: float = 0.1,
    split_seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> ImageDataset:
    """CIFAR-10 as uint8 [N, 3, image_size, image_size].

    `root` (None: ``$MASKEDTRAIN_DATA``) is the official ``cifar-10-binary.tar.gz``, a folder that
    holds it, or a folder that holds (or whose ``cifar-10-batches-bin`` holds) the files
    ``data_batch_{1..5}.bin`` and ``test_batch.bin``, each plain or as ``.bin.xz``. Plain files are
    memory-mapped and come before compressed ones. Those are decoded once and kept, 184 MB, in the
    folder `cache` (None: ``$XDG_CACHE_HOME/maskedtrain`` or ``~/.cache/maskedtrain``), which may
    be deleted at any time; if it cannot be written there is a warning, and no cache.

    The 10,000 test images are the official ones. `split_seed` draws `val_fraction` of each class
    of the others for validation: 5,000 at 0.1, leaving 45,000. mean and std are the customary
    ones, of all 50,000.

    Raises FileNotFoundError for a missing folder or file, and ValueError, naming the file, for a
    wrong size, damaged compression, or a label above 9.
    """
    *train_files, test_file = _read(find_root(root, "cifar10"), cache)
    train = _split(train_files, image_size, interpolation)
    in_val = held_out(train.labels, val_fraction, split_seed)
    return ImageDataset(
        name="cifar10",
        train=ImageSplit(train.images[~in_val], train.labels[~in_val]),
        val=ImageSplit(train.images[in_val], train.labels[in_val]),
        test=_split([test_file], image_size, interpolation),
        num_classes=NUM_CLASSES,
        mean=MEAN,
        std=STD,
        augment=Augment(padding=image_size // 8, flip=True),
    )


def _split(files: Sequence[Bytes], image_size: int, interpolation: Interpolation) -> ImageSplit:
    images = torch.from_numpy(np.concatenate([records[:, 1:] for records in files]))
    labels = torch.from_numpy(np.concatenate([records[:, 0] for records in files]))
    return ImageSplit(
        upsample(images.view(-1, 3, 32, 32), size=image_size, mode=interpolation),
        labels.to(torch.int64),
    )


def _read(root: Path, cache: str | os.PathLike[str] | None) -> list[Bytes]:
    """The records of each of FILES, uint8 [10000, 3073]."""
    if root.is_file():
        return _read_archive(root, cache)
    for folder in (root, root / FOLDER):
        if any((folder / f"{name}{suffix}").exists() for name in FILES for suffix in ("", ".xz")):
            # Decoding leaves the interpreter lock, so threads share out the files.
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                return list(pool.map(partial(_read_file, folder, cache=cache), FILES))
    if (root / ARCHIVE).exists():
        return _read_archive(root / ARCHIVE, cache)
    raise FileNotFoundError(f"{root} holds neither {FILES[0]}, nor {FOLDER}, nor {ARCHIVE}")


def _read_file(folder: Path, name: str, cache: str | os.PathLike[str] | None) -> Bytes:
    plain, packed = folder / name, folder / f"{name}.xz"
    if plain.exists():
        _check_size(plain.stat().st_size, plain)
        return _records(np.memmap(plain, np.uint8, mode="r"), plain)
    if packed.exists():
        (data,) = decoded(packed, [name], _unpack_xz, size_bytes=FILE_BYTES, cache=cache)
        return _records(data, packed)
    raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.xz")


def _read_archive(path: Path, cache: str | os.PathLike[str] | None) -> list[Bytes]:
    files = decoded(path, FILES, _unpack_archive, size_bytes=FILE_BYTES, cache=cache)
    return [_records(data, f"{path}: {name}") for data, name in zip(files, FILES, strict=True)]


def _records(data: Bytes, source: Path | str) -> Bytes:
    records = np.asarray(data).reshape(-1, RECORD_BYTES)
    labels = records[:, 0]
    if labels.max() >= NUM_CLASSES:
        first = int((labels >= NUM_CLASSES).argmax())
        raise ValueError(
            f"{source}: labels must be < {NUM_CLASSES}, got {labels[first]} in record {first}"
        )
    return records


def _unpack_xz(path: Path) -> list[Bytes]:
    try:
        with lzma.open(path) as file:
            return [_read_bounded(file, path)]
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} must be a complete xz file, got: {error}") from error


def _unpack_archive(path: Path) -> list[Bytes]:
    found: dict[str, Bytes] = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in FILES and member.isfile() and (file := archive.extractfile(member)):
                    found[name] = _read_bounded(file, f"{path}: {name}")
            # To the very end, where gzip verifies its checksum.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} must be a complete tar.gz archive, got: {error}") from error
    if missing := [name for name in FILES if name not in found]:
        raise FileNotFoundError(f"{path} lacks {', '.join(missing)}")
    return [found[name] for name in FILES]


def _read_bounded(file: IO[bytes], source: Path | str) -> Bytes:
    # One byte too many shows an overlong file, and takes a decoder to its final checksum.
    data = file.read(FILE_BYTES + 1)
    _check_size(len(data), source)
    return np.frombuffer(data, np.uint8)


def _check_size(size: int, source: Path | str) -> None:
    if size != FILE_BYTES:
        got = "more" if size > FILE_BYTES else f"{size}"
        raise ValueError(
            f"{source} must hold {FILE_BYTES} bytes "
            f"({FILE_BYTES // RECORD_BYTES} records of {RECORD_BYTES}), got {got}"
        )


@dataclass(frozen=True)
class Config(ImageConfig):
    """CIFAR-10, from its official binary records."""

    name = "cifar10"

    data: Path | None = None
    """Folder or archive of the official binary records, as they are or as .bin.xz; the variable
    MASKEDTRAIN_DATA where not given."""

    def load(self) -> ImageDataset:
        return load(self.data, image_size=self.image_size or 32)

"""Feature vectors in the LibSVM (SVMlight) format: ``label index:value index:value ...`` a row."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskedtrain.data._files import find_root
from maskedtrain.data.images import ImageConfig, ImageDataset, ImageSplit, held_out

__all__ = ["Config"]

_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Config(ImageConfig):
    """Rows of a LibSVM file, plain, .gz, .bz2 or .xz, as images [1, 1, features] for models such as
    mlp. Rows are held dense, in 4 bytes a feature; labels are whole numbers."""

    name = "libsvm"

    data: Path | None = None
    """File of the rows; the variable MASKEDTRAIN_DATA where not given."""
    test_data: Path | None = None
    """File of the rows to test on; a part of the others where not given."""
    scale: bool = True
    """Give every feature mean 0 and variance 1 over the rows to train on."""
    val_share: float = 0.1
    """Share of each class to validate on, of the rows that are not for the test."""
    test_share: float = 0.2
    """Share of each class to test on, where there is no file of such."""
    split_seed: int = 0
    """Seed that draws the rows to validate and to test on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            raise ValueError(
                f"rows are not resized: image_size must be None, got {self.image_size}"
            )
        for name in ("val_share", "test_share"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value}")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed must be >= 0 and < 2**32, got {self.split_seed}")

    def load(self) -> ImageDataset:
        """Read, split and scale the rows: float32 ``[N, 1, 1, features]``, labels in the order of
        their numbers.

        Indices begin at 0 if any row of any file has an index 0, else at 1.

        Raises:
            ImportError: there is no scikit-learn.
            ValueError: a file that is not of this format, naming its first bad line; too few rows
                or classes; labels of the test file that the other one has not.
        """
        paths = [find_root(self.data, self.name)]
        if self.test_data is not None:
            paths.append(find_root(self.test_data, self.name))
        (rows, numbers), *tested = _read(paths)
        classes, labels = numbers.unique(return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"{paths[0]} must have 2 classes at least, got {len(classes)}")
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        if tested:
            test_rows, test_numbers = tested[0]
            if strange := set(test_numbers.tolist()) - set(classes.tolist()):
                names = ", ".join(f"{label:g}" for label in sorted(strange))
                raise ValueError(f"{paths[1]} has labels that {paths[0]} has not: {names}")
            parts["test"] = test_rows, torch.searchsorted(classes, test_numbers)
        else:
            chosen = held_out(labels, self.test_share, self.split_seed)
            parts["test"] = rows[chosen], labels[chosen]
            rows, labels = rows[~chosen], labels[~chosen]
        chosen = held_out(labels, self.val_share, self.split_seed)
        parts["val"] = rows[chosen], labels[chosen]
        parts["train"] = rows[~chosen], labels[~chosen]
        for name, (part, _) in parts.items():
            if not len(part):
                raise ValueError(f"{paths[0]}: {len(numbers)} rows are too few: {name} got none")
        scaled = _scaler(parts["train"][0]) if self.scale else lambda rows: rows
        train, val, test = (
            ImageSplit(scaled(parts[name][0])[:, None, None], parts[name][1])
            for name in ("train", "val", "test")
        )
        return ImageDataset(self.name, train, val, test, len(classes), mean=(0.0,), std=(1.0,))


def _scaler(train: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives every feature of these rows mean 0 and variance 1, or 0 to a constant one."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.numpy())
    return lambda rows: torch.from_numpy(scaler.transform(rows.numpy()))


def _read(paths: list[Path]) -> list[tuple[Tensor, Tensor]]:
    """Rows, float32 ``[N, features]``, and labels, whole float64 ``[N]``, of each file; of as many
    features.
    """
    try:
        from sklearn.datasets import load_svmlight_files
    except ImportError as error:
        raise ImportError(
            'LibSVM files need scikit-learn: pip install "maskedtrain[data]"', name=error.name
        ) from error
    contents = [_content(path) for path in paths]
    try:
        # Together: whether indices begin at 0 or at 1, and how many there are, is of all files.
        files = [io.BytesIO(content) for content in contents]
        found: list[Any] = load_svmlight_files(files, dtype=np.float32)  # pyright: ignore[reportArgumentType]
    except (ValueError, OverflowError):
        for path, content in zip(paths, contents, strict=True):
            _check_lines(path, content)
        raise
    parts = []
    for path, content, sparse, labels in zip(paths, contents, found[::2], found[1::2], strict=True):
        rows = sparse.toarray()
        if not len(rows):
            raise ValueError(f"{path} holds no row")
        whole = np.isfinite(labels) & (labels == np.floor(labels))
        for condition, values, holds in (
            ("values must be finite", rows, np.isfinite(rows)),
            ("labels must be whole numbers", labels[:, None], whole[:, None]),
        ):
            if not holds.all():
                row, column = np.argwhere(~holds)[0]
                raise ValueError(
                    f"{path}, line {_line(content, row)}: {condition}, got {values[row, column]:g}"
                )
        parts.append((torch.from_numpy(rows), torch.from_numpy(labels)))
    return parts


def _content(path: Path) -> bytes:
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            return file.read()
    except IsADirectoryError:
        raise ValueError(f"{path} must be a file, got a folder") from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _line(content: bytes, row: int) -> int:
    """The number of the line of a row, counted from 0: other lines are blank, or comments."""
    lines = enumerate(io.BytesIO(content), start=1)
    held = (number for number, line in lines if line.partition(b"#")[0].strip())
    return next(itertools.islice(held, row, None))


def _check_lines(path: Path, content: bytes) -> None:
    """Raise ValueError for the first line that is no row."""
    from sklearn.datasets import load_svmlight_file

    def fault(lines: list[bytes]) -> str | None:
        try:
            load_svmlight_file(io.BytesIO(b"".join(lines)))  # pyright: ignore[reportArgumentType]
        except (ValueError, OverflowError) as error:
            return str(error)
        return None

    lines = io.BytesIO(content).readlines()
    if fault(lines) is None:
        return
    # It is in lines[low:high], and what is before that is right.
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fault(lines[low:middle]) else (middle, high)
    raise ValueError(f"{path}, line {high}: {fault(lines[low:high])}")

"""Parallel text in files: two of as many lines, or one with a column for each language."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from maskedtrain.data.translation import Pairs

__all__ = ["find_pair", "read_columns", "read_lines", "read_pair", "split_apart", "undo_bpe"]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, plain or ``.gz``; only a line feed ends one, a carriage return
    before it belongs to it, and so does a byte order mark at the beginning of the file.

    Raises ValueError, naming file and line, for other bytes or damaged compression.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return _decoded(content, path)


def _decoded(content: bytes, path: Path | str) -> list[str]:
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def find_pair(folder: Path, splits: Sequence[str], source: str, target: str) -> list[Path]:
    """``<split>.<language>`` or ``<split>.<language>.gz`` of both languages, for the first of the
    splits' names of which there is one at all.
    """
    for split in splits:
        names = [(f"{split}.{language}", f"{split}.{language}.gz") for language in (source, target)]
        sides = [[folder / name for name in pair if (folder / name).is_file()] for pair in names]
        if all(sides):
            return [paths[0] for paths in sides]
        for paths, pair in zip(sides, names, strict=True):
            if not paths and any(sides):
                raise FileNotFoundError(f"{folder} lacks {' or '.join(pair)}")
    texts = ", ".join(f"{split}.{source} and .{target}" for split in splits)
    raise FileNotFoundError(f"{folder} lacks {texts} (or .gz)")


def read_pair(folder: Path, splits: Sequence[str], source: str, target: str) -> Pairs:
    """The lines of both languages of a split, which must be as many."""
    paths = find_pair(folder, splits, source, target)
    sides = [read_lines(path) for path in paths]
    first, second = map(len, sides)
    if first != second:
        raise ValueError(
            f"{paths[0]} and {paths[1]} must have as many lines, got {first:,} and {second:,}"
        )
    return sides[0], sides[1]


def undo_bpe(pairs: Pairs) -> Pairs:
    """Lines whose words were split by subword-nmt ("hou@@ se") with their words whole."""
    source, target = ([re.sub(r"@@( |$)", "", line) for line in side] for side in pairs)
    return source, target


def read_columns(path: Path, source: int, target: int) -> Pairs:
    """Two columns, counted from 0, of a tab-separated file: plain, ``.gz``, or the only text file
    of a ``.zip``.
    """
    lines = _zipped_lines(path) if path.suffix == ".zip" else read_lines(path)
    sides: Pairs = [], []
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t")
        if len(cells) <= max(source, target):
            raise ValueError(
                f"{path}, line {number}: must have at least {max(source, target) + 1} columns, "
                f"got {len(cells)}"
            )
        sides[0].append(cells[source])
        sides[1].append(cells[target])
    return sides


def _zipped_lines(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith((".tsv", ".txt"))]
            names = [name for name in names if not Path(name).name.startswith("_")]
            if len(names) != 1:
                found = ", ".join(names) or "none"
                raise ValueError(f"{path} must hold one .tsv or .txt file, got {found}")
            return _decoded(archive.read(names[0]), f"{path}: {names[0]}")
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def split_apart(pairs: Pairs, shares: Mapping[str, float]) -> dict[str, Pairs]:
    """Split pairs such that no sentence, of either side, is in two splits.

    Sentences that differ by case and white space alone count as one. Pairs that share one are kept
    together, with all that they are connected to; each such group goes to a split by a hash of its
    smallest pair, whatever the order of the lines. The largest group is for training.

    Args:
        pairs: both sides.
        shares: of the splits by name; "train" takes what they leave.
    """
    keys = [[" ".join(line.lower().split()) for line in side] for side in pairs]
    number: dict[tuple[int, str], int] = {}
    ends = [
        [number.setdefault((side, key), len(number)) for key in keys[side]] for side in range(2)
    ]
    parent = list(range(len(number)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in zip(*ends, strict=True):
        parent[root(a)] = root(b)
    smallest: dict[int, str] = {}
    roots = [root(a) for a in ends[0]]
    for group, a, b in zip(roots, *keys, strict=True):
        key = f"{a}\t{b}"
        smallest[group] = min(key, smallest.get(group, key))
    limits = np.cumsum(list(shares.values()))
    names = [*shares, "train"]
    place = {
        group: names[int(np.searchsorted(limits, _fraction(key), side="right"))]
        for group, key in smallest.items()
    }
    # Its size would make any other share of it a matter of luck.
    sizes = Counter(roots)
    place[max(sizes, key=lambda group: (sizes[group], smallest[group]))] = "train"
    found: dict[str, Pairs] = {name: ([], []) for name in names}
    for group, a, b in zip(roots, *pairs, strict=True):
        found[place[group]][0].append(a)
        found[place[group]][1].append(b)
    return found


def _fraction(text: str) -> float:
    """A number in [0, 1) that the text settles."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

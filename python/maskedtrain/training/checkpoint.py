"""Checkpoints: folders that are either complete and verified, or not there.

    <folder>/step-00001234/weights.safetensors   the weights, readable without this package
                           state.pt              everything else, for torch.load(weights_only=True)
                           manifest.json         format, step, size and SHA-256 of both, versions

A checkpoint is written to a hidden sibling folder, synced to the disk and renamed into place; only
then are old ones removed. Whatever interrupts that (full disk, SIGKILL, power failure), every
checkpoint that was there before is still there.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from maskedtrain.files import durable_write, output_errors, sha256, sync_folder

FORMAT = 1
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"

# Hidden names sort before visible ones. `.old` is a checkpoint on its way to being replaced.
_PRESENT = re.compile(r"(?:step-(\d{8,})|\.step-(\d{8,})\.old)")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(?:tmp|old)")
_SCALARS = (type(None), bool, int, float, str, bytes)
_TENSORS = (Tensor, torch.nn.Parameter)


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message says what was found."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint with every tensor on the CPU. `weights` keeps the names it was saved
    with; `step` counts finished optimizer steps."""

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints of one run: one folder, one process writing, one timeline.

    The `keep_last` newest stay, and those saved with `keep=True`. `report` is called with one line
    for every damaged checkpoint that is passed over, and when old ones cannot be removed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 3,
        report: Callable[[str], object] = warnings.warn,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be >= 1, got {keep_last}")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self._report = report

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        keep: bool = False,
    ) -> Path:
        """Save a checkpoint and return its folder; it is on the disk when this returns.

        `state` may hold tensors, numbers, strings, bytes, None, and lists, tuples and dicts of
        them. A step saved twice is replaced. Checkpoints of later steps are removed: they belong to
        a course the run has left by resuming from an earlier one.

        Tied weights are written once under every name, so the file loads with `strict=True`.
        Takes, for the moment of writing, memory for one more copy of the larger file.

        Raises OutputError (the earlier checkpoints are intact), TypeError, ValueError (nothing was
        written).
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        for name, value in weights.items():
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                got = getattr(value, "layout", _type_name(value))
                raise TypeError(f"weights[{name!r}] must be a dense tensor, got {got}")
        _check_state(state, "state")

        final = self._path(step)
        temp, old = _hidden(final, "tmp"), _hidden(final, "old")
        with output_errors(final):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
            try:
                temp.mkdir()
                files = {
                    WEIGHTS: _write(temp / WEIGHTS, weights_bytes(weights)),
                    STATE: _write(temp / STATE, _state_bytes(state)),
                }
                manifest = {"format": FORMAT, "step": step, "keep": keep, "files": files}
                manifest["versions"] = _versions()
                _write(temp / MANIFEST, json.dumps(manifest, indent=2).encode())
                sync_folder(temp)
                if final.exists():
                    final.rename(old)
                temp.rename(final)
                sync_folder(self.folder)
            except BaseException:
                # What failed is worth more to the caller than a second failure to clean up.
                with suppress(OSError):
                    self._tidy()
                raise
        self._prune(step)
        return final

    def load(self, step: int | None = None) -> Checkpoint:
        """The checkpoint of `step`, or the newest undamaged one; each damaged one is reported.

        Raises CheckpointError when `step` is missing or damaged, or no usable one is left.
        """
        present = self._present()
        if step is not None:
            if step not in present:
                found = ", ".join(map(str, present)) or "none"
                raise CheckpointError(f"no checkpoint of step {step} in {self.folder}: has {found}")
            return _read(present[step], step)
        damaged: list[str] = []
        for number, path in reversed(present.items()):
            try:
                return _read(path, number)
            except CheckpointError as error:  # noqa: PERF203
                damaged.append(str(error))
                self._report(f"damaged checkpoint passed over: {error}")
        found = "; ".join(damaged) or "it has none"
        raise CheckpointError(f"no usable checkpoint in {self.folder}: {found}")

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; `load` tells whether it is undamaged."""
        return list(self._present())

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _present(self) -> dict[int, Path]:
        """Step -> folder, ascending in step."""
        if not self.folder.is_dir():
            return {}
        found: dict[int, Path] = {}
        # A retired checkpoint counts only until its successor, sorted after it, is in place.
        for path in sorted(self.folder.iterdir()):
            if match := _PRESENT.fullmatch(path.name):
                found[int(match[1] or match[2])] = path
        return dict(sorted(found.items()))

    def _tidy(self) -> None:
        """Undo or finish what an interrupted save left behind."""
        for path in sorted(self.folder.iterdir()):
            if not _LEFTOVER.fullmatch(path.name):
                continue
            final = path.with_name(path.stem[1:])
            if path.suffix == ".old" and not final.exists():
                path.rename(final)
            else:
                shutil.rmtree(path)

    def _prune(self, step: int) -> None:
        present = self._present()
        newest = [number for number in present if number <= step][-self.keep_last :]
        try:
            for number, path in present.items():
                # What comes after `step` goes even if kept: the run has left that course.
                if number > step or not (number in newest or _is_kept(path)):
                    # Renamed first: a removal that is cut short leaves no damaged checkpoint.
                    path.rename(_hidden(path, "tmp"))
            self._tidy()
        except OSError as error:
            self._report(f"cannot remove old checkpoints in {self.folder}: {error.strerror}")


def weights_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """The safetensors file of `weights`: dense, contiguous, every name with its own copy."""
    copies: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in weights.items():
        copy = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, as tied weights and views do.
        if copy.untyped_storage().data_ptr() in storages:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        copies[name] = copy
    return safetensors.torch.save(copies)


def _state_bytes(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> dict[str, int | str]:
    with durable_write(path) as file:
        file.write(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read(path: Path, step: int) -> Checkpoint:
    """Raises CheckpointError with the path and what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            newer = "; a newer version of maskedtrain wrote it" * (manifest["format"] > FORMAT)
            raise CheckpointError(f"{path}: format {manifest['format']}, not {FORMAT}{newer}")
        if manifest["step"] != step:
            raise CheckpointError(f"{path}: its manifest is of step {manifest['step']}")
        expected = [(name, manifest["files"][name]) for name in (WEIGHTS, STATE)]
        expected = [(name, entry["bytes"], entry["sha256"]) for name, entry in expected]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable {MANIFEST} ({_reason(error)})") from error
    for name, size, digest in expected:
        try:
            actual_size, actual_digest = (path / name).stat().st_size, sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path}: unreadable {name} ({_reason(error)})") from error
        if actual_size != size:
            raise CheckpointError(f"{path}: {name} has {actual_size} bytes, should have {size}")
        if actual_digest != digest:
            raise CheckpointError(f"{path}: {name} does not match its checksum")
    try:
        weights = safetensors.torch.load_file(path / WEIGHTS)
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    # The bytes are those that were written, so this is another version of torch or safetensors.
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read here ({_reason(error)})") from error
    return Checkpoint(step, weights, state, path)


def _check_state(value: Any, where: str) -> None:
    """Exact types: a subclass (numpy.float64, an enum, a defaultdict) would not load."""
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            if type(key) not in _SCALARS:
                raise TypeError(f"{where} must have plain keys, got a {_type_name(key)}: {key!r}")
            _check_state(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, torch.Size):
        for i, item in enumerate(value):
            _check_state(item, f"{where}[{i}]")
    elif type(value) not in _SCALARS and type(value) not in _TENSORS:
        raise TypeError(
            f"{where} must be a tensor, number, string, list, tuple or dict, "
            f"got {_type_name(value)}"
        )


def _is_kept(path: Path) -> bool:
    try:
        return json.loads((path / MANIFEST).read_bytes())["keep"] is True
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in ("maskedtrain", "torch", "safetensors", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]

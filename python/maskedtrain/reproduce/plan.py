"""A plan: pieces of work, done one after the other, by any number of processes, over any time.

A folder holds what is done and what is in hand:

    results/<id>.json     the result of a piece: all that a report needs, some kilobytes
    work/<id>/            what a piece in hand has written, such as checkpoints; goes in the end
    work/<id>.lock        held by the process that is at it, and by no other
    work/<id>.failed      why the piece failed, the last time

An id has a hash of the piece's options. Copying ``results`` to another machine is enough to go on
there with what is not done; with ``work``, in the middle of a training.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from maskedtrain.files import OutputError, atomic_write, make_folder, output_errors, write_json
from maskedtrain.training.console import Console, format_duration
from maskedtrain.training.signals import Interrupted

__all__ = ["Piece", "Result", "Store", "execute"]

Result = Mapping[str, Any]
"""What a piece of work found, in terms of JSON: ``seconds`` of the work itself, ``wall_seconds``
with all that goes with it where that is known.
"""

_POLL_S = 2.0


class Piece(Protocol):
    """One piece of a plan."""

    @property
    def id(self) -> str:
        """A name for files, the same for the same options and for no others."""
        ...

    @property
    def label(self) -> str:
        """What a person calls it."""
        ...

    @property
    def kind(self) -> str:
        """Pieces of one kind take about as long."""
        ...

    def matches(self, result: Result) -> bool:
        """Whether this is a result of just these options."""
        ...

    def run(self, folder: Path, label: str, console: Console) -> dict[str, Any]:
        """Do it, or go on with it in this folder; its result."""
        ...


class Store:
    """The folder of a plan."""

    def __init__(self, folder: Path, *, keep_work: bool = False) -> None:
        self.folder = folder
        self.keep_work = keep_work
        self._failed_before = {
            path.name: path.stat().st_mtime_ns for path in (folder / "work").glob("*.failed")
        }

    def result(self, piece: Piece) -> Result | None:
        """The result of the piece; None where it is not done.

        A file that is damaged, or is not of these options, does not count.
        """
        with suppress(FileNotFoundError, ValueError, TypeError, LookupError):
            found = json.loads(self.result_file(piece).read_bytes())
            if piece.matches(found):
                return found
        return None

    def failure(self, piece: Piece) -> str | None:
        """Why the piece failed the last time, if it is not done."""
        if self.result(piece) is not None:
            return None
        with suppress(OSError):
            return self._failed(piece).read_text(encoding="utf-8")
        return None

    def failed_since(self, piece: Piece) -> bool:
        """Whether it has failed, here or in another process, since this one began with the plan."""
        file = self._failed(piece)
        with suppress(FileNotFoundError):
            return file.stat().st_mtime_ns != self._failed_before.get(file.name)
        return False

    @contextmanager
    def claimed(self, piece: Piece) -> Iterator[bool]:
        """Whether the piece is this process's within the block: no other is at it."""
        make_folder(self.folder / "work")
        lock = FileLock(self.folder / "work" / f"{piece.id}.lock", blocking=False)
        with output_errors(lock.lock_file):
            try:
                lock.acquire()
            # An OSError, too.
            except Timeout:
                lock = None
        if lock is None:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def do(self, piece: Piece, label: str, console: Console) -> None:
        """Run a piece that is this process's, and keep its result."""
        if self.result_file(piece).exists():
            console.warn(f"{self.result_file(piece)} is damaged, or of other options: once more")
        with output_errors(self._failed(piece)):
            self._failed(piece).unlink(missing_ok=True)
        found = piece.run(self.work(piece), label, console)
        make_folder(self.folder / "results")
        write_json(self.result_file(piece), found)
        self.tidy(piece, console)

    def tidy(self, piece: Piece, console: Console) -> None:
        """Remove what a piece that is done has left in the folder of work."""
        if self.keep_work or not self.work(piece).exists():
            return
        try:
            shutil.rmtree(self.work(piece))
        except OSError as error:
            console.warn(f"{self.work(piece)} could not be removed: {error.strerror}")

    def fail(self, piece: Piece, reason: str) -> None:
        """Keep the reason why a piece failed."""
        with atomic_write(self._failed(piece)) as file:
            file.write(reason.encode())

    def work(self, piece: Piece) -> Path:
        """Where the piece writes while it is in hand."""
        return self.folder / "work" / piece.id

    def result_file(self, piece: Piece) -> Path:
        """Where the piece's result is, once it is done."""
        return self.folder / "results" / f"{piece.id}.json"

    def _failed(self, piece: Piece) -> Path:
        return self.folder / "work" / f"{piece.id}.failed"


def execute(pieces: Sequence[Piece], store: Store, console: Console) -> dict[str, str]:
    """Do all that is not done yet; why each that failed did, by its label.

    Pieces that other processes are at are waited for in the end.

    Raises:
        Interrupted: SIGINT or SIGTERM came; calling this again goes on from there.
        OutputError: something could not be written: that would be so of the other pieces, too.
    """
    make_folder(store.folder)
    failures: dict[str, str] = {}
    left = {piece.id: piece for piece in pieces if store.result(piece) is None}
    if done := len(pieces) - len(left):
        console.print(f"{done} of {len(pieces)} runs are done already")
    while left:
        before = len(left)
        for piece in list(left.values()):
            with store.claimed(piece) as ours:
                if not ours:
                    continue
                del left[piece.id]
                # Another process may have done it since the last look.
                if store.result(piece) is not None:
                    store.tidy(piece, console)
                    continue
                if store.failed_since(piece):
                    failures[piece.label] = store.failure(piece) or "it failed"
                    continue
                _do(piece, pieces, store, console, failures)
        if left and len(left) == before:
            _wait(list(left.values()), store, console)
    return failures


def _do(
    piece: Piece,
    pieces: Sequence[Piece],
    store: Store,
    console: Console,
    failures: dict[str, str],
) -> None:
    place = f"[{pieces.index(piece) + 1}/{len(pieces)}]"
    console.print(f"\n{place} {piece.label}; {_work_left(pieces, store)}")
    try:
        store.do(piece, f"{place} {piece.label}", console)
    except (Interrupted, KeyboardInterrupt) as stop:
        number = stop.signum if isinstance(stop, Interrupted) else signal.SIGINT
        raise _stopped(number, f"in {piece.label}") from None
    except OutputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        failures[piece.label] = reason
        store.fail(piece, reason)
        console.warn(f"{piece.label} failed: {reason}")


def _stopped(signum: int, where: str) -> Interrupted:
    return Interrupted(signum, f"stopped {where}; the same command goes on from there")


def _work_left(pieces: Sequence[Piece], store: Store) -> str:
    """How long all that is not done will take one process, as far as pieces of its kind tell."""
    took: dict[str, list[float]] = {}
    to_do: list[str] = []
    for piece in pieces:
        result = store.result(piece)
        if result is None:
            to_do.append(piece.kind)
        else:
            seconds = result.get("wall_seconds", result["seconds"])
            took.setdefault(piece.kind, []).append(seconds)
    known = [statistics.mean(took[kind]) for kind in to_do if kind in took]
    unknown = len(to_do) - len(known)
    if not known:
        return f"{len(to_do)} runs left"
    rest = f", and {unknown} runs of unknown length" if unknown else ""
    return f"{len(to_do)} runs left, {format_duration(sum(known))} of work{rest}"


def _wait(left: Sequence[Piece], store: Store, console: Console) -> None:
    """Wait until one that another process is at is done, has failed or was given up."""
    console.print(f"waiting for {len(left)} runs that other processes are at")
    try:
        while True:
            time.sleep(_POLL_S)
            for piece in left:
                with store.claimed(piece) as ours:
                    if ours:
                        return
    except KeyboardInterrupt:
        raise _stopped(signal.SIGINT, "while waiting") from None

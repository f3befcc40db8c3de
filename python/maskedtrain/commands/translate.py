"""translate lines from standard input with a network of a run"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from maskedtrain.commands._options import Checkpoint, load_checkpoint, parse
from maskedtrain.tasks.translation import Task
from maskedtrain.training.console import Console
from maskedtrain.training.run import Run


@dataclass(frozen=True)
class Options(Checkpoint):
    """Translate lines from standard input to standard output, one sentence a line."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    subnet: str = "full"
    """The network that translates."""
    beam: int | None = None
    """Hypotheses that are kept while searching, 1 for greedy; the run's own where not given."""
    nbest: int = 1
    """Translations of each line; more than one come as: line number, score, translation, with tabs
    between."""
    buffer: int = 2000
    """Lines that are read before they are translated, sorted by length for speed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beam", "nbest", "buffer"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")


def main(arguments: Sequence[str], console: Console) -> None:
    options = parse(Options, arguments, command="translate")
    run = Run.restore(options.run, Console(sys.stderr))
    if not isinstance(run.task, Task):
        raise ValueError(f"{options.run} is a run on {run.config.data.task}: it cannot translate")
    subnet = run.subnet(options.subnet)
    beam = run.task.options.beam if options.beam is None else options.beam
    if options.nbest > beam:
        raise ValueError(f"nbest must be <= beam = {beam}, got {options.nbest}")
    load_checkpoint(run, subnet, options)
    done = 0
    for buffer in _buffers(options.buffer):
        found = run.task.translate(run.model, subnet, buffer, beam=beam, nbest=options.nbest)
        for number, best in enumerate(found, start=done + 1):
            for translated in best:
                prefix = f"{number}\t{translated.score:.4f}\t" if options.nbest > 1 else ""
                sys.stdout.write(f"{prefix}{translated.text}\n")
        sys.stdout.flush()
        done += len(buffer)


def _buffers(size: int) -> Iterator[list[str]]:
    """Lines of standard input, UTF-8 whatever the locale, so many at a time; only a line feed ends
    one. An error comes after the lines before it.
    """
    read = 0
    while lines := list(islice(sys.stdin.buffer, size)):
        decoded: list[str] = []
        for number, line in enumerate(lines, start=read + 1):
            try:
                decoded.append(line.decode().rstrip("\r\n"))
            except UnicodeDecodeError as error:  # noqa: PERF203
                yield decoded
                message = f"standard input, line {number}: not UTF-8 ({error.reason})"
                raise ValueError(message) from None
        yield decoded
        read += len(lines)

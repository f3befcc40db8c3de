"""Command-line options from dataclasses, with errors of one line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import tyro

from maskedtrain.subnetwork import SubNetwork
from maskedtrain.training.run import Run

__all__ = ["Checkpoint", "load_checkpoint", "parse", "take"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which weights of a run a command takes."""

    step: int | None = None
    """Checkpoint to take; the newest where not given."""
    average: int = 1
    """Take the mean of the weights of so many checkpoints: this one and those before it."""
    weights: Literal["selected", "last", "best"] = "selected"
    """The last ones, the best ones on the validation data, which runs with --select best keep, or
    those that the run selected for its results."""

    def __post_init__(self) -> None:
        if self.weights == "best" and (self.step is not None or self.average != 1):
            raise ValueError("--weights best is one checkpoint: no --step or --average")


def load_checkpoint(run: Run, subnet: SubNetwork, options: Checkpoint) -> int:
    """Load the weights into the run's model; the number of steps that trained the sub-network."""
    named = options.step is not None or options.average != 1
    selected = not named and options.weights == "selected" and run.config.run.select == "best"
    if options.weights == "best" or selected:
        best = run.best(subnet.name)
        if not best.steps():
            raise ValueError(f"{run.folder} kept no best weights of {subnet.name}: --select best")
        return run.load_best(subnet.name).state["passes"]
    checkpoint = run.load_weights(options.step, average=options.average)
    return checkpoint.state["trainer"]["passes"][subnet.name]


_Options = TypeVar("_Options")


def parse(
    kind: type[_Options],
    arguments: Sequence[str],
    *,
    command: str,
    default: Any = None,
    about: str | None = None,
) -> _Options:
    """The options of a command, from a dataclass; ValueError of one line if they do not parse.

    ``about`` is the text above the options in the help, in place of the dataclass's docstring.
    """
    given = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                tyro.conf.OmitArgPrefixes[kind],
                args=list(arguments),
                prog=f"maskedtrain {command}",
                description=about,
                **given,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(
            f"{_summary(errors.getvalue())} (see maskedtrain {command} --help)"
        ) from None


def take(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of one ``--flag VALUE`` or ``--flag=VALUE``, and the arguments without it."""
    rest = list(arguments)
    for at, argument in enumerate(rest):
        if argument.startswith(f"{flag}="):
            del rest[at]
            return argument.partition("=")[2], rest
        if argument == flag:
            if at + 1 == len(rest):
                raise ValueError(f"{flag} needs a value")
            value = rest[at + 1]
            del rest[at : at + 2]
            return value, rest
    return None, rest


def _summary(message: str) -> str:
    """What tyro's box of an error says, in a line: the text above its first rule, and the hint."""
    lines = [line.strip("│ \t") for line in message.splitlines()]
    body = [line for line in lines if line and line[0] not in "╭╰"]
    head = " ".join(body[: next((i for i, line in enumerate(body) if line[0] == "─"), len(body))])
    if not head:
        return "the options cannot be read"
    head = re.sub(r"^Error parsing \w+: ", "", head)
    if "Perhaps you meant:" in body:
        near = body[body.index("Perhaps you meant:") + 1].split()[0]
        head += f"; did you mean {near}?"
    return head

"""evaluate the networks of a run"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from maskedtrain.commands._options import Checkpoint, load_checkpoint, parse
from maskedtrain.tasks.base import Split
from maskedtrain.training.console import Console
from maskedtrain.training.run import Run, result_row


@dataclass(frozen=True)
class Options(Checkpoint):
    """Evaluate the networks of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    subnet: str | None = None
    """The network to evaluate; all where not given."""
    split: Split = "test"
    """Which data."""


def main(arguments: Sequence[str], console: Console) -> None:
    options = parse(Options, arguments, command="eval")
    run = Run.restore(options.run, console)
    names = list(run.method.subnets) if options.subnet is None else [options.subnet]
    subnets = [run.subnet(name) for name in names]
    rows = [
        result_row(run, subnet, options.split, load_checkpoint(run, subnet, options))
        for subnet in subnets
    ]
    console.results_table(rows)
    for remark in run.task.remarks():
        console.print(remark)

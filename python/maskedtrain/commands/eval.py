"""evaluate the networks of a run"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

from maskedtrain.commands._options import parse
from maskedtrain.config import unknown_name
from maskedtrain.training.console import Console, ResultRow
from maskedtrain.training.loop import evaluate
from maskedtrain.training.run import Run, read_config


@dataclass(frozen=True)
class Options:
    """Evaluate the networks of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    subnet: str | None = None
    """The network to evaluate; all where not given."""
    split: Literal["val", "test"] = "test"
    """Which images."""
    step: int | None = None
    """Checkpoint to take; the newest where not given."""


def main(arguments: Sequence[str], console: Console) -> None:
    options = parse(Options, arguments, command="eval")
    run = Run(read_config(options.run), console)
    subnets = run.method.subnets
    if options.subnet is not None:
        if options.subnet not in subnets:
            raise unknown_name("sub-network", options.subnet, subnets)
        subnets = {options.subnet: subnets[options.subnet]}
    checkpoint = run.load_weights(options.step)
    batches = run.batches(getattr(run.dataset, options.split))
    autocast = torch.bfloat16 if run.config.run.bf16 else None
    rows: list[ResultRow] = []
    for name, subnet in subnets.items():
        result = evaluate(run.model, subnet, batches, F.cross_entropy, autocast=autocast)
        row = ResultRow(
            network=name,
            method=run.config.method.name,
            iterations=checkpoint.state["trainer"]["passes"][name],
            accuracy=result.accuracy,
            params=subnet.numel(),
            forward_flops=run.image_flops(subnet),
        )
        rows.append(row)
    console.results_table(rows)

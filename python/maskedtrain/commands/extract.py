"""write a sub-network as plain weights or a self-contained program"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from maskedtrain.commands._options import Checkpoint, load_checkpoint, parse
from maskedtrain.training.console import Console
from maskedtrain.training.export import save_program, save_weights
from maskedtrain.training.run import Run


@dataclass(frozen=True)
class Options(Checkpoint):
    """Write a sub-network of a run as a network of its own."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    subnet: str = "core"
    """The network to extract."""
    out: Path | None = None
    """Write its weights to this safetensors file."""
    export: Path | None = None
    """Write it as a torch.export program (.pt2) for batches of any size."""


def main(arguments: Sequence[str], console: Console) -> None:
    options = parse(Options, arguments, command="extract")
    if options.out is None and options.export is None:
        raise ValueError(
            "nothing to write: give --out FILE.safetensors, --export FILE.pt2, or both"
        )
    run = Run.restore(options.run, console)
    subnet = run.subnet(options.subnet)
    load_checkpoint(run, subnet, options)
    network = subnet.extract().cpu().eval()
    if options.out is not None:
        save_weights(network, options.out)
        console.print(f"weights of {options.subnet} written to {options.out}")
    if options.export is not None:
        save_program(network, *run.task.example(), options.export)
        console.print(f"program of {options.subnet} written to {options.export}")

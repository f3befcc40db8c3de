"""time what masks save on this machine, and tune the kernels for it"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from maskedtrain.benchmark import crossings, machine, report, suite
from maskedtrain.benchmark.cases import Size
from maskedtrain.benchmark.models import linear_layers, load_model
from maskedtrain.benchmark.training import EXPERIMENTS
from maskedtrain.commands._options import parse
from maskedtrain.config import unknown_name
from maskedtrain.training.console import Console
from partial_kernels._core import crossovers, discovery, tiles
from partial_kernels._core.contest import Step
from partial_kernels._core.tables import device_name
from partial_kernels._core.tiles import Tile
from partial_kernels._core.tuning import tune

_QUICK_TRAINING = ("digits-resnet8",)
_TRAINING = ("cifar10-resnet18", "multi30k-lowrank32")


@dataclass(frozen=True)
class Options:
    """Time layers under masks against full ones on this machine; and training methods."""

    quick: bool = False
    """Smaller layers and fewer of them: three minutes at most on two CPU cores."""
    shapes: tuple[str, ...] = ()
    """Layers, as OUTPUTSxINPUTS:TOKENS: 512x2048:8192 is a weight [512, 2048] and 8192 tokens."""
    model: str | None = None
    """Time the linear layers of a model: MODULE:CALLABLE, which returns an nn.Module, or a
    preset."""
    tokens: int = 1024
    """Tokens that go through the layers of --model."""
    families: tuple[str, ...] = ()
    """Only rows of these families of kernels; optim is the optimizer step under every mask."""
    training: tuple[str, ...] = ("auto",)
    """Trainings to compare, by name; auto are the usual ones where nothing is chosen above, none
    are none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products (autocast; parameters are float32); auto is bfloat16 on a GPU."""
    out: Path | None = None
    """Folder to write bench.json, bench.md and drawings to."""
    overwrite: bool = False
    """Replace these files of an earlier run."""
    tune: bool = False
    """Instead, find out below which density each kernel beats the dense product here, and on a GPU
    which tiles are fastest, and keep it for this user: in $XDG_CONFIG_HOME/maskedtrain, whence it
    is read from then on."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"--tokens must be >= 1, got {self.tokens}")
        if self.model is not None and self.shapes:
            raise ValueError("--model times the model's own shapes: no --shapes")


def main(arguments: Sequence[str], console: Console) -> None:
    options = parse(Options, arguments, command="bench")
    families = _families(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tune:
        _tune(families, device, console)
        return
    layers = None if options.model is None else linear_layers(load_model(options.model))
    whole = not (options.families or options.shapes or layers)
    plan = suite.Plan(
        device=device,
        dtype=_dtype(options, device),
        quick=options.quick,
        families=families,
        sizes=[Size.parse(shape) for shape in options.shapes],
        layers=layers,
        tokens=options.tokens,
        everything=layers is None and not options.shapes,
        training=_training(options, whole=whole),
    )
    if options.out is not None:
        report.check_folder(options.out, overwrite=options.overwrite)
    _warn_if_busy(console)
    if layers is not None:
        console.print(
            f"{options.model}: {sum(layers.counts.values())} linear layers of {len(layers.counts)} "
            f"shapes, with {layers.share:.0%} of the parameters; {layers.small} smaller ones are "
            "left out"
        )
    found = suite.run(plan, console, _as_json(options), options.model)
    name = device_name(device) + (" threads" if device.type == "cpu" else "")
    rates = machine.rates(device, plan.dtype)
    console.print(
        f"{name}: products at {rates.flops_per_s / 1e9:.0f} GFLOP/s, copies at "
        f"{rates.bytes_per_s / 1e9:.0f} GB/s"
    )
    report.show(found, console)
    if options.out is not None:
        console.print(f"\nwritten: {report.write(options.out, found, rates, name)}")
    console.print(f"{found.seconds:.0f} seconds")


def _families(options: Options) -> Sequence[str]:
    known = discovery.families()
    for family in options.families:
        if family not in known:
            raise unknown_name("family", family, known)
    return options.families or known


def _training(options: Options, *, whole: bool) -> Sequence[str]:
    if options.training == ("auto",):
        usual = _QUICK_TRAINING if options.quick else _TRAINING
        return usual if whole else ()
    if options.training == ("none",):
        return ()
    for name in options.training:
        if name not in EXPERIMENTS:
            raise unknown_name("training", name, [*EXPERIMENTS, "auto", "none"])
    return options.training


def _dtype(options: Options, device: torch.device) -> torch.dtype:
    if options.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, options.dtype)


def _as_json(options: Options) -> dict[str, Any]:
    return dataclasses.asdict(options)


def _warn_if_busy(console: Console) -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        console.warn(
            f"the load is {load:.1f} on {cores} cores: with other programs running, short steps "
            "above all take longer than they would"
        )


def _tune(families: Sequence[str], device: torch.device, console: Console) -> None:
    tiled: list[str] = []
    if device.type == "cuda" and "triton" not in discovery.unavailable():
        tiled = [name for name in families if "triton" in discovery.backends(name)]
    wanted = crossings.crossings(families, device.type)
    if not (tiled or wanted):
        raise RuntimeError(
            f"--tune finds nothing to choose: {', '.join(families)} have no kernels on "
            f"{device.type} whose time goes with the density, or with tiles"
        )
    if tiled:
        _tune_tiles(tiled, device, console)
    for key, density, speedups in crossings.tune(wanted, device):
        shown = "  ".join(f"{d:.3g}: {speedup:.2g}x" for d, speedup in speedups.items())
        console.print(f"{key:<34} up to a density of {density:.3f}   ({shown})")
    if wanted:
        file = crossovers.TABLES.user_file(device_name(device))
        console.print(f"{len(wanted)} crossovers in {file}")


def _tune_tiles(families: Sequence[str], device: torch.device, console: Console) -> None:
    from triton.testing import do_bench  # only where there are tiles to choose

    def seconds(step: Callable[[], object]) -> float:
        return cast("float", do_bench(step, warmup=5, rep=30, return_mode="median")) / 1e3

    file = tiles.TABLES.user_file(device_name(device))
    found: dict[str, Tile] = {}
    for name, module in discovery.cases():
        if name not in families:
            continue
        kernels = importlib.import_module(f"{discovery.PACKAGE}.{name}.kernels")
        for case, _ in module.gpu_cases():
            step: Step = module.contest(case, device="cuda", impl="triton").ours
            for key, default, best in tune(step, kernels.CANDIDATES, seconds, found):
                gain = f"{default / best:.2f} times as fast" if key in found else "the default"
                console.print(f"{key:<56} {1e3 * best:8.3f} ms   {gain}")
                # After each: what a run had when it was stopped is kept.
                tiles.TABLES.write(file, found)
    console.print(f"{len(found)} tiles in {file}")

"""train a network and its core four ways in minutes, compare, extract"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskedtrain.commands._options import parse
from maskedtrain.config import TrainConfig
from maskedtrain.files import atomic_write
from maskedtrain.presets import preset
from maskedtrain.training.console import Console, ResultRow, format_bytes, results_markdown
from maskedtrain.training.export import save_program
from maskedtrain.training.metrics import plot_comparison
from maskedtrain.training.run import Run, train
from maskedtrain.training.signals import Interrupted

# In the order of the table: each network by itself, then the two ways to train both.
_ROWS = {"core": "core alone", "full": "full alone", "ats": "ATS", "slimmable": "slimmable"}


@dataclass(frozen=True)
class Options:
    """Compare ATS with slimmable training and each network alone, on digits."""

    out: Path = Path("runs/demo")
    """Folder to write to; an earlier demo there is replaced."""
    epochs: float | None = None
    """Passes over the training images, the same for every row."""
    seeds: int = 1
    """Repeat with so many seeds, and print mean and standard deviation."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")


def main(arguments: Sequence[str], console: Console) -> None:
    options = parse(Options, arguments, command="demo")
    console.print(
        "1,797 digits from scikit-learn, a small ResNet, a core of half its width.\n"
        "Four trainings, each with the same number of steps and mini-batches:\n"
    )
    tables = [_train_all(options, seed, console) for seed in range(options.seeds)]
    rows = tables[0] if len(tables) == 1 else [_mean(cells) for cells in zip(*tables, strict=True)]
    console.print()
    console.results_table(rows)
    remarks = [
        "iterations: optimizer steps that trained this network; training FLOPs and seconds: of "
        "the whole training that the row comes from.",
        *_comparison(tables),
    ]
    if len(tables) > 1:
        remarks.append(
            f"means over {len(tables)} seeds; ±: standard deviation of the accuracy, in points."
        )
    for remark in remarks:
        console.print(textwrap.fill(remark, 80))
    plot = options.out / "comparison.png"
    runs = {label: options.out / name / "metrics.jsonl" for name, label in _ROWS.items()}
    reason = plot_comparison(dict(runs), plot, title="digits: ResNet-8 and its half-width core")
    _write_report(options.out, rows, remarks, plotted=reason is None)
    _extract_and_check(options.out, console)
    written = "report.md, core.pt2" + (
        ", comparison.png" if reason is None else f" (no plot: {reason})"
    )
    console.print(f"\nwritten to {options.out}: {written}")


def _config(options: Options, name: str, seed: int) -> TrainConfig:
    config = preset(f"digits-resnet8-{name}")
    out = options.out / (name if seed == 0 else f"{name}-seed{seed}")
    epochs = config.run.epochs if options.epochs is None else options.epochs
    return replace(config, run=replace(config.run, out=out, epochs=epochs, seed=seed))


def _train_all(options: Options, seed: int, console: Console) -> list[ResultRow]:
    rows: list[ResultRow] = []
    for name, label in _ROWS.items():
        config = _config(options, name, seed)
        try:
            found = train(config, console, overwrite=True, label=label)
        except Interrupted as stop:
            # The run could go on alone; the comparison starts over.
            raise Interrupted(stop.signum, "demo stopped; the next one starts over") from None
        # Small networks first, as in the rows of the networks trained alone.
        rows += [
            replace(row, method=label) for row in sorted(found, key=lambda row: row.params or 0)
        ]
    return rows


def _mean(cells: Sequence[ResultRow]) -> ResultRow:
    """The row of means over seeds, the spread of the accuracy in the network's name."""
    accuracy = [100 * (cell.accuracy or 0.0) for cell in cells]
    seconds = [cell.seconds or 0.0 for cell in cells]
    spread = statistics.stdev(accuracy)
    return replace(
        cells[0],
        network=f"{cells[0].network} (±{spread:.2f})",
        accuracy=statistics.mean(accuracy) / 100,
        seconds=statistics.mean(seconds),
        peak_mem_bytes=max(cell.peak_mem_bytes or 0 for cell in cells) or None,
    )


def _comparison(tables: Sequence[Sequence[ResultRow]]) -> list[str]:
    """What the table says about ATS, in words; ratios are medians over the seeds, paired."""

    def ratio(field: str) -> float:
        return statistics.median(
            getattr(_find(table, "ATS"), field) / getattr(_find(table, "slimmable"), field)
            for table in tables
        )

    return [
        f"ATS took {ratio('train_flops'):.2f} of slimmable training's FLOPs and "
        f"{ratio('seconds'):.2f} of its seconds."
    ]


def _find(rows: Sequence[ResultRow], method: str) -> ResultRow:
    return next(row for row in rows if row.method == method)


def _write_report(
    folder: Path, rows: Sequence[ResultRow], remarks: Sequence[str], *, plotted: bool
) -> None:
    parts = ["# maskedtrain demo: digits\n", results_markdown(rows), *(f"{r}\n" for r in remarks)]
    if plotted:
        parts.append("![validation accuracy](comparison.png)\n")
    parts.append(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {sys.version.split()[0]}\n"
    )
    with atomic_write(folder / "report.md") as file:
        file.write("\n".join(parts).encode())


def _extract_and_check(folder: Path, console: Console) -> None:
    """Export ATS's core and run it where neither package can be imported."""
    run = Run(_config(Options(out=folder), "ats", 0), console)
    run.load_weights()
    core = run.method.subnets["core"]
    program = folder / "core.pt2"
    save_program(core.extract().cpu().eval(), run.dataset.image_shape, program)
    images, _ = next(iter(run.batches(run.dataset.test)))
    run.model.eval()
    with torch.no_grad(), core.activate():
        expected = run.model(images).cpu()
    outputs = run_without_packages(program, images.cpu())
    difference = (outputs - expected).abs().max().item()
    # The same sums, perhaps by other kernels.
    bound = 1e-4 * expected.abs().max().item()
    if not difference <= bound:
        raise RuntimeError(f"the extracted core differs from the sub-network by {difference:.3g}")
    remark = (
        f"The core, exported ({format_bytes(program.stat().st_size)}), ran in a process that can "
        f"import neither package: {len(images)} outputs equal the sub-network's (largest "
        f"difference {difference:.1g})."
    )
    console.print(textwrap.fill(remark, 80))


_CHILD = """
import sys
sys.modules["maskedtrain"] = sys.modules["partial_kernels"] = None  # importing them is an error now
import torch
from safetensors.torch import load_file, save_file
program, images, outputs = sys.argv[1:]
core = torch.export.load(program).module()
save_file({"outputs": core(load_file(images)["images"]).detach().contiguous()}, outputs)
"""


def run_without_packages(program: Path, images: Tensor) -> Tensor:
    """Outputs of an exported program, run by a Python process without this package's code."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "images"), Path(folder, "outputs")
        save_file({"images": images.contiguous()}, given)
        command = [sys.executable, "-I", "-c", _CHILD, str(program), str(given), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the exported program did not run: {done.stderr.strip()[-500:]}")
        return load_file(result)["outputs"]

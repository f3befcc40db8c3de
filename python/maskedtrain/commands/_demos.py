"""What the demo shows: trainings to compare, and a network that runs without the package."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskedtrain.config import TrainConfig
from maskedtrain.presets import preset
from maskedtrain.training.console import ResultRow, format_bytes
from maskedtrain.training.run import Run

__all__ = ["Demo", "digits", "translation"]

Tables = Sequence[Sequence[ResultRow]]


@dataclass(frozen=True)
class Demo:
    """Trainings of one experiment, by the names of their folders, and what to make of them.

    ``remarks`` says in words what the tables, one for each seed, show. ``check`` runs an extracted
    network in a plain process and says what came of it; RuntimeError if it is not the sub-network.
    """

    title: str
    intro: str
    labels: Mapping[str, str]
    configs: Mapping[str, TrainConfig]
    remarks: Callable[[Tables], list[str]]
    extracted: str
    check: Callable[[Run, Path], str]


def digits() -> Demo:
    """A ResNet and its half-width core on handwritten digits."""
    labels = {"core": "core alone", "full": "full alone", "ats": "ATS", "slimmable": "slimmable"}

    def remarks(tables: Tables) -> list[str]:
        flops, seconds = (_ratio(tables, field) for field in ("train_flops", "seconds"))
        return [
            f"ATS took {flops:.2f} of slimmable training's FLOPs and {seconds:.2f} of its seconds."
        ]

    return Demo(
        title="digits: ResNet-8 and its half-width core",
        intro="1,797 digits from scikit-learn, a small ResNet, a core of half its width.\n"
        "Four trainings, each with the same number of steps and mini-batches:\n",
        labels=labels,
        configs={name: preset(f"digits-resnet8-{name}") for name in labels},
        remarks=remarks,
        extracted="ats",
        check=_check_logits,
    )


def _ratio(tables: Tables, field: str) -> float:
    """Of ATS to slimmable training: the median over the seeds, paired."""

    def value(rows: Sequence[ResultRow], method: str) -> float:
        return getattr(next(row for row in rows if row.method == method), field)

    return statistics.median(value(rows, "ATS") / value(rows, "slimmable") for rows in tables)


def _check_logits(run: Run, program: Path) -> str:
    images, _ = next(iter(run.task.eval_batches("test")))
    run.model.eval()
    with torch.no_grad(), run.subnet("core").activate():
        expected = run.model(images).cpu()
    outputs = run_without_packages(_LOGITS, program, {"images": images.cpu()})
    difference = (outputs - expected).abs().max().item()
    # The same sums, perhaps by other kernels.
    bound = 1e-4 * expected.abs().max().item()
    if not difference <= bound:
        raise RuntimeError(f"the extracted core differs from the sub-network by {difference:.3g}")
    return (
        f"The core, exported ({format_bytes(program.stat().st_size)}), ran in a process that can "
        f"import neither package: {len(images)} outputs equal the sub-network's (largest "
        f"difference {difference:.1g})."
    )


RATIOS = {"1/32": 1 / 32, "1/4": 1 / 4}


def translation() -> Demo:
    """A Transformer and its low-rank cores on number words."""
    labels, configs = {"full": "full alone"}, {"full": preset("numbers-lowrank-full")}
    for shown, ratio in RATIOS.items():
        alone, ats = preset("numbers-lowrank-core"), preset("numbers-lowrank")
        folder = shown.replace("/", "-")
        labels[f"core-{folder}"] = f"core alone {shown}"
        configs[f"core-{folder}"] = replace(alone, method=replace(alone.method, ratio=ratio))
        labels[f"ats-{folder}"] = f"ATS {shown}"
        configs[f"ats-{folder}"] = replace(ats, method=replace(ats.method, ratios=(ratio,)))

    def remarks(tables: Tables) -> list[str]:
        return [
            f"Core at r = {shown}: {_points(tables, f'core alone {shown}', f'ATS {shown}')}."
            for shown in RATIOS
        ]

    return Demo(
        title="numbers: a Transformer and its low-rank cores",
        intro="English number words to German ones, a small Transformer; in its cores the feed-\n"
        "forward layers and the query and key projections are low-rank, of r times full rank.\n"
        "Five trainings, each with the same number of steps and mini-batches:\n",
        labels=labels,
        configs=configs,
        remarks=remarks,
        extracted="ats-1-4",
        check=_check_translations,
    )


def _points(tables: Tables, alone: str, together: str) -> str:
    """BLEU of the core after two trainings, in words."""

    def mean(method: str) -> float:
        rows = [r for rows in tables for r in rows if (r.network, r.method) == ("core", method)]
        return statistics.mean(row.bleu or 0.0 for row in rows)

    first, second = mean(alone), mean(together)
    return f"ATS {second:.2f} BLEU, alone {first:.2f} ({second - first:+.2f})"


def _check_translations(run: Run, program: Path) -> str:
    from maskedtrain.data.vocabulary import BOS, EOS, PAD
    from maskedtrain.tasks.translation import Task

    assert isinstance(run.task, Task)
    lines = run.task.dataset.test.source_lines[:100]
    found = run.task.translate(run.model, run.subnet("core"), lines, beam=1)
    expected = [best.text for best, *_ in found]
    sources, target = run.task.vocabularies
    rows = [torch.tensor([*ids, EOS]) for ids in sources.encode(lines)]
    source = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    special = torch.tensor([BOS, EOS, source.shape[1]])
    outputs = run_without_packages(_GREEDY, program, {"source": source, "special": special})
    texts = [
        target.decode(row[: row.index(EOS)] if EOS in row else row) for row in outputs.tolist()
    ]
    same = sum(a == b for a, b in zip(texts, expected, strict=True))
    # A near tie may fall the other way by another kernel's rounding.
    if same < 0.98 * len(lines):
        raise RuntimeError(f"only {same} of {len(lines)} translations of the core are the same")
    return (
        f"The core, exported ({format_bytes(program.stat().st_size)}), translated in a process "
        f"that can import neither package: {same} of {len(lines)} sentences as the sub-network."
    )


_CHILD = """
import sys
sys.modules["maskedtrain"] = sys.modules["partial_kernels"] = None  # importing them is an error now
import torch
from safetensors.torch import load_file, save_file
program, inputs, outputs = sys.argv[1:]
core, given = torch.export.load(program).module(), load_file(inputs)
with torch.no_grad():
    result = run(core, given)
save_file({"outputs": result.contiguous()}, outputs)
"""

_LOGITS = """
def run(core, given):
    return core(given["images"])
"""

_GREEDY = """
def run(core, given):
    source = given["source"]
    bos, eos, length = given["special"].tolist()
    target = torch.full((len(source), 2), bos)
    # The program takes two tokens or more: a second one that nothing before it sees.
    first = core(source, target)[:, 0].argmax(-1)
    target[:, 1] = first
    for _ in range(int(1.2 * length) + 10):
        target = torch.cat([target, core(source, target)[:, -1].argmax(-1, keepdim=True)], 1)
    return target[:, 1:]
"""


def run_without_packages(run: str, program: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What ``run(core, inputs)`` makes of an exported program, in a Python process without this
    package's code.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "inputs"), Path(folder, "outputs")
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, given)
        command = [sys.executable, "-I", "-c", run + _CHILD, str(program), str(given), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the exported program did not run: {done.stderr.strip()[-500:]}")
        return load_file(result)["outputs"]

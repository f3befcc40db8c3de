"""The command line: results that agree, files that load elsewhere, errors of one clear line."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import partial_kernels as pk
from maskedtrain import cli, methods
from maskedtrain.commands import _demos
from maskedtrain.presets import PRESETS
from maskedtrain.training import checkpoint
from maskedtrain.training.console import Console, ResultRow
from maskedtrain.training.loop import StepReport, Trainer
from maskedtrain.training.metrics import read_metrics
from maskedtrain.training.run import Run, read_config

# 20 steps of 64 images an epoch.
TINY = shlex.split("--preset digits-resnet8-ats --depth 8 --width 8 --image-size 8 --device cpu")

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must end with one line on stderr and exit code 2; returns the message."""

    def check(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        errors = capsys.readouterr().err
        assert stop.value.code == 2
        assert errors.startswith("maskedtrain: error: ")
        assert errors.count("\n") == 1 and errors.endswith("\n")
        return errors.removeprefix("maskedtrain: error: ").rstrip()

    return check


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    cli.main(["train", *TINY, "--epochs", "2", "--out", str(folder)])
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[list[ResultRow]]:
    """The tables that are printed from now on, as rows."""
    printed: list[list[ResultRow]] = []
    monkeypatch.setattr(Console, "results_table", lambda self, rows: printed.append(list(rows)))
    return printed


def summary(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "summary.json").read_text())["results"]


def plain_torch(code: str, *arguments: object, cwd: Path | None = None) -> str:
    """Output of code in a process where neither package can be imported."""
    block = 'import sys; sys.modules["maskedtrain"] = sys.modules["partial_kernels"] = None\n'
    command = [sys.executable, "-I", "-c", block + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean train? (known: "),
        ("train --preset digits-resnet8-at", "did you mean digits-resnet8-ats? (known: "),
        ("train --preset", "--preset needs a value"),
        ("train --method atss", "unknown method 'atss'; did you mean ats? (known: "),
        ("train --model resnett", "unknown model 'resnett'; did you mean resnet? (known: "),
        ("train --weight-decy 0", "did you mean --weight-decay? (see maskedtrain train --help)"),
        ("train --lr fast", "--lr: could not convert string to float: 'fast'"),
        ("train --batch-size 1.5", "--batch-size: invalid literal for int()"),
        ("train --batch-size 0", "batch_size must be >= 1, got 0"),
        ("train --batch-size 2000", "batch_size=2000, drop_last=True, got 1295 images"),
        ("train --lr nan", "lr must be >= 0, got nan"),
        ("train --schedule linear", "invalid choice 'linear'"),
        ("train --depth 20", "invalid choice '20'"),
        ("train --ratios 1.5", "ratios must be different numbers in (0, 1), got [1.5]"),
        ("train --method standard --network core --ratio 0", "ratio must be in (0, 1], got 0"),
        ("train --dataset mnist", "unknown dataset 'mnist' (known: cifar10, cola, digits"),
        ("train --dataset cifar10", "pass their folder or set MASKEDTRAIN_DATA"),
        ("train --dataset cifar10 --data nowhere", "no such file or folder: nowhere"),
        ("train --data nowhere", "Unrecognized options: --data"),
        ("train --core lowrank", "ResNet names no lowrank_targets: it has no low-rank core"),
        ("train --image-size 7", "upsampled images must be >= 8x8, got (7, 7)"),
        ("train --device tpu", "device 'tpu' cannot be used: "),
        ("train --seed -1", "seed must be >= 0, got -1"),
        ("train --resume nowhere", "nowhere holds no run: there is no nowhere/config.json"),
        ("train --resume a --preset b", "--resume goes on with a run as it was: no --preset"),
        ("train --resume a --model resnet", "--resume goes on with a run as it was: no --model"),
        ("eval", "PATH"),
        ("eval nowhere", "nowhere holds no run"),
        ("extract nowhere", "nothing to write: give --out FILE.safetensors, --export FILE.pt2"),
        ("extract nowhere --out x", "nowhere holds no run"),
        ("demo --seeds 0", "seeds must be >= 1, got 0"),
        ("doctor --all", "Unrecognized options: --all"),
    ],
)
def test_a_mistake_is_one_clear_line(
    line: str, message: str, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MASKEDTRAIN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert message in fails(*line.split())
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="unknown preset") as caught:
        cli.main(["train", "--debug", "--preset", "x"])
    assert caught.traceback[-1].name == "preset"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --out {run}", "{run} holds a run already, at step 40; go on with: "),
        ("eval {run} --subnet cor", "unknown sub-network 'cor'; did you mean core?"),
        ("eval {run} --step 7", "no checkpoint of step 7 in {run}/checkpoints: has 20, 40"),
        ("eval {run} --split train", "invalid choice 'train'"),
        ("extract {run} --subnet half --out x", "unknown sub-network 'half' (known: core, full)"),
        ("extract {run} --out {file}/core.safetensors", "cannot write {file}/core.safetensors: "),
        ("train --resume {run} --lr 0.2", "--lr cannot change when a run goes on: it is 0.1"),
        ("train --resume {run} --width 16", "--width cannot change when a run goes on: it is 8"),
        ("train --resume {run} --ratios 0.25", "it is [0.5], got [0.25]"),
        ("train --resume {run} --no-augment", "--augment cannot change"),
        ("train --resume {run} --epochs 3", "--epochs cannot change"),
        ("train --resume {run} --seed 1", "--seed cannot change"),
        ("train --resume {run} --out other", "--out cannot change"),
    ],
)
def test_a_mistake_about_a_run_is_one_clear_line(
    line: str, message: str, run: Path, fails: Fails, tmp_path: Path
):
    file = tmp_path / "file"
    file.touch()
    places = {"run": run, "file": file}
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    assert message.format(**places) in fails(*line.format(**places).split())
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before


def test_what_the_next_step_does_not_depend_on_may_change(run: Path):
    free = "--max-steps 40 --eval-every 3 --save-every 4 --keep-last 5 --log-every 6 --threads 1"
    cli.main(["train", "--resume", str(run), *free.split()])
    assert read_config(run).run.keep_last == 5


def test_truncated_data_are_named(fails: Fails, tmp_path: Path):
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (tmp_path / name).write_bytes(bytes(3073))
    message = fails("train", "--dataset", "cifar10", "--data", tmp_path, "--out", tmp_path / "out")
    assert message.startswith(f"{tmp_path}/data_batch_")
    assert message.endswith("must hold 30730000 bytes (10000 records of 3073), got 3073")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(fails: Fails, tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    assert fails("train", *TINY, "--out", file / "run") == (
        f"cannot write {file}/run: Not a directory"
    )


def test_a_full_disk_ends_a_run_that_can_be_resumed(
    trained: Path, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    write = checkpoint._write

    def full(path: Path, data: bytes) -> dict[str, int | str]:
        if "step-00000040" in str(path) and path.name == checkpoint.STATE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(checkpoint, "_write", full)
    message = fails("train", *TINY, "--epochs", "2", "--out", folder)
    assert message == f"cannot write {folder}/checkpoints/step-00000040: No space left on device"
    monkeypatch.undo()
    cli.main(["train", "--resume", str(folder)])
    weights, uncut = (
        load_file(place / "checkpoints" / "step-00000040" / checkpoint.WEIGHTS)
        for place in (folder, trained)
    )
    assert all(torch.equal(weights[name], uncut[name]) for name in uncut)


def test_a_diverging_run_is_one_clear_line(fails: Fails, tmp_path: Path):
    diverging = ["--lr", "1e30", "--warmup-steps", "0", "--save-every", "1"]
    message = fails("train", *TINY, *diverging, "--out", tmp_path / "run")
    assert "Try a lower learning rate" in message
    assert f"the last good checkpoint, {tmp_path}/run/checkpoints/step-00000001" in message


def test_scikit_learn_is_asked_for(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = fails("train", *TINY, "--out", tmp_path / "run")
    assert message == 'digits need scikit-learn: pip install "maskedtrain[data]"'
    assert not (tmp_path / "run").exists()


def test_plots_are_optional(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (run / "curves.png").unlink()
    shutil.rmtree(run / "tensorboard")
    for module in (
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "torch.utils.tensorboard",
    ):
        monkeypatch.setitem(sys.modules, module, None)
    cli.main(["train", "--resume", str(run)])
    assert "no curves.png: matplotlib is not installed" in capsys.readouterr().out
    assert not (run / "curves.png").exists()
    assert not (run / "tensorboard").exists()


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code in (None, 0)
    text, errors = capsys.readouterr()
    assert errors == ""
    # All but tyro's own line of usage.
    assert max(map(len, text.splitlines()[1:])) <= 80
    return text


@pytest.mark.parametrize(
    "command", ["bench", "demo", "doctor", "eval", "extract", "train", "translate"]
)
def test_every_command_has_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert help_of([command, "--help"], capsys).startswith(f"usage: maskedtrain {command} ")
    for arguments in ([], ["--help"]):
        cli.main(arguments)
        overview = capsys.readouterr().out
        assert f"\n  {command} " in overview
        assert max(map(len, overview.splitlines())) <= 80


def test_help_of_train_lists_what_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(["train", "--help"], capsys)
    flags = "--preset NAME", "--resume RUN", "--dataset NAME", "--model NAME", "--method NAME"
    for flag in flags:
        assert f"\n  {flag}\n" in text
    for name in PRESETS:
        assert name in text
    assert f"options below: {', '.join(methods.configs())} " in " ".join(text.split())
    for group in read_defaults().values():
        for option in group:
            assert f"--{option.replace('_', '-')}" in text
    # Options of the method that is chosen, not of the default.
    assert "--core-lr-scale" not in help_of(["train", "--method", "slimmable", "-h"], capsys)


def read_defaults() -> dict[str, dict[str, Any]]:
    from maskedtrain.config import TrainConfig, to_dict

    groups = to_dict(TrainConfig())
    for named in ("data", "model", "method"):
        del groups[named]["name"]
    return groups


def test_version(capsys: pytest.CaptureFixture[str]):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"maskedtrain {pk.__version__}\n"


def test_a_reader_that_leaves_early_is_no_error():
    code = "from maskedtrain.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.close()
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGPIPE
    assert errors == b""


def test_a_run_leaves_its_files(trained: Path):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"checkpoints", "config.json", "curves.png", "metrics.jsonl", "summary.json"}
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_eval_finds_what_training_found(trained: Path, tables: list[list[ResultRow]]):
    cli.main(["eval", str(trained)])
    fields = ("network", "iterations", "accuracy", "params", "forward_flops")
    found = [[getattr(row, field) for field in fields] for row in tables[0]]
    assert found == [[row[field] for field in fields] for row in summary(trained)]
    assert [row.network for row in tables[0]] == ["full", "core"]


@pytest.mark.parametrize("step", [20, 40])
def test_eval_of_one_network_at_one_step(step: int, trained: Path, tables: list[list[ResultRow]]):
    options = ["--subnet", "core", "--split", "val", "--step", str(step)]
    cli.main(["eval", str(trained), *options])
    ((row,),) = tables
    logged = read_metrics(trained / "metrics.jsonl")
    (record,) = (r for r in logged if (r["step"], r["kind"], r["subnet"]) == (step, "eval", "core"))
    assert (row.accuracy, row.iterations) == (record["accuracy"], step // 2)


PROGRAM = """
import torch
from safetensors.torch import load_file, save_file
program, weights, batches, outputs = sys.argv[1:]
core = torch.export.load(program).module()
core.load_state_dict(load_file(weights))
results = {name: core(x).detach() for name, x in load_file(batches).items()}
save_file(results, outputs)
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & {"maskedtrain", "partial_kernels"}
"""


def outputs_of(run: Run, subnet: str, batches: dict[str, Tensor]) -> dict[str, Tensor]:
    run.model.eval()
    with torch.no_grad(), run.method.subnets[subnet].activate():
        return {name: run.model(x) for name, x in batches.items()}


@pytest.mark.parametrize("subnet", ["core", "full"])
def test_what_was_extracted_runs_in_plain_torch(
    subnet: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    program, weights = tmp_path / "core.pt2", tmp_path / "core.safetensors"
    cli.main(["extract", str(trained), "--subnet", subnet, "--export", str(program)])
    # Those of another checkpoint, so that they must come from this file.
    early = ["--subnet", subnet, "--step", "20", "--out", str(weights)]
    cli.main(["extract", str(trained), *early])
    assert f"written to {weights}" in capsys.readouterr().out
    batches = {"one": torch.randn(1, 1, 8, 8), "seven": torch.randn(7, 1, 8, 8)}
    save_file(batches, tmp_path / "in")
    plain_torch(PROGRAM, program, weights, tmp_path / "in", tmp_path / "out")
    run = Run(read_config(trained), Console())
    run.load_weights(20)
    found = load_file(tmp_path / "out")
    for name, expected in outputs_of(run, subnet, batches).items():
        # The same sums, perhaps by other kernels.
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
    run.load_weights()
    later = outputs_of(run, subnet, batches)["seven"]
    assert (found["seven"] - later).abs().max() > 1e-2


def test_the_demo_from_end_to_end(
    fails: Fails,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tables: list[list[ResultRow]],
):
    out = tmp_path / "demo"
    arguments = ["demo", "--epochs", "0.1", "--out", str(out)]
    rows = [("core", "core alone", 2), ("full", "full alone", 2), ("core", "ATS", 1)]
    rows += [("full", "ATS", 1), ("core", "slimmable", 2), ("full", "slimmable", 2)]

    cli.main(arguments)
    assert [(row.network, row.method, row.iterations) for row in tables[0]] == rows
    printed = capsys.readouterr().out
    assert "core alone: step 2/2" in printed
    assert "ATS took 0.50 of slimmable training's FLOPs and " in printed
    assert "(largest difference " in printed
    report = (out / "report.md").read_text()
    assert all(f"| {network} | {method} |" in report for network, method, _ in rows)
    assert "![validation score](comparison.png)" in report
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert torch.export.load(out / "core.pt2").module()(torch.zeros(3, 1, 16, 16)).shape == (3, 10)

    # A second demo in the same folder, stopped in its third training.
    with monkeypatch.context() as patch:
        train_step = Trainer.train_step

        def interrupted(self: Trainer, batches: Any) -> StepReport:
            report = train_step(self, batches)
            if len(self.method.subnets) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return report

        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
    assert stop.value.code == 128 + signal.SIGINT
    errors = capsys.readouterr().err
    assert errors.endswith("maskedtrain: demo stopped; the next one starts over\n")
    assert "--resume" not in errors

    # A third, over seeds, whose exported program does not compute what the sub-network does.
    with monkeypatch.context() as patch:
        patch.setattr(_demos, "run_without_packages", lambda *_: torch.zeros(359, 10))
        message = fails(*arguments, "--seeds", "2")
    assert message.startswith("the extracted core differs from the sub-network by ")
    assert [row.network.split(" (±")[0] for row in tables[1]] == [network for network, *_ in rows]
    assert (out / "slimmable-seed1" / "summary.json").exists()


def test_doctor(capsys: pytest.CaptureFixture[str]):
    cli.main(["doctor"])
    printed = capsys.readouterr().out
    for name in ("maskedtrain", "Python", "torch", "CUDA", "triton", "kernel families"):
        assert any(line.startswith(name) for line in printed.splitlines()), name
    assert "self-check       cpu: masked results equal the dense computation's" in printed


masked_linear = pk.masked_linear


def wrong_result(x: Tensor, weight: Tensor, *, mask: pk.Mask) -> Tensor:
    return masked_linear(x, weight, mask=mask) * (1 + 1e-4)


def wrong_gradient(x: Tensor, weight: Tensor, *, mask: pk.Mask) -> Tensor:
    y = masked_linear(x, weight, mask=mask)
    return y + (y - y.detach())


def gradient_outside(x: Tensor, weight: Tensor, *, mask: pk.Mask) -> Tensor:
    leak = weight.sum()
    return masked_linear(x, weight, mask=mask) + (leak - leak.detach())


@pytest.mark.parametrize("wrong", [wrong_result, wrong_gradient, gradient_outside])
def test_doctor_notices_a_backend_that_is_wrong(
    wrong: Any, fails: Fails, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pk, "masked_linear", wrong)
    message = fails("doctor")
    assert message.startswith("self-check failed on cpu: ")
    assert ("gradient of" in message) == (wrong is not wrong_result)
    assert "Element" in message


@pytest.mark.skipif("MASKEDTRAIN_DATA" not in os.environ, reason="needs CIFAR-10's files")
def test_two_steps_on_cifar10(tmp_path: Path, tables: list[list[ResultRow]]):
    options = "--preset cifar10-resnet18-ats --depth 8 --width 8 --max-steps 2 --device cpu"
    cli.main(["train", *options.split(), "--out", str(tmp_path)])
    assert [(row.network, row.iterations) for row in tables[0]] == [("full", 1), ("core", 1)]


def test_bench_times_the_families_that_were_named(capsys: pytest.CaptureFixture[str]):
    cli.main(["bench", "--quick", "--families", "stats"])
    lines = capsys.readouterr().out.splitlines()
    assert "Kernels without a layer" in lines
    (row,) = (line for line in lines if line.startswith("stats "))
    assert re.fullmatch(r"stats prefix-half +kernel +[\d.]+ +[\d.]+x +[\d.]+–[\d.]+ +\S.+", row)


def test_bench_says_what_it_cannot_do(fails: Fails):
    assert "unknown family 'stat'" in fails("bench", "--families", "stat")
    assert "--tune finds nothing" in fails("bench", "--tune", "--families", "element")

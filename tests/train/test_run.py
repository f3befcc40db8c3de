"""A run that was stopped, however and wherever, ends bit for bit as one that never was."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskedtrain.config import OptimConfig, RunConfig, TrainConfig
from maskedtrain.data.digits import Config as DigitsConfig
from maskedtrain.methods import MethodConfig
from maskedtrain.methods.ats import Config as ATSConfig
from maskedtrain.methods.slimmable import Config as SlimmableConfig
from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.models.resnet import Config as ResNetConfig
from maskedtrain.training.checkpoint import CheckpointError, Checkpoints
from maskedtrain.training.console import Console
from maskedtrain.training.loop import NonFiniteError, StepReport, Trainer
from maskedtrain.training.memory import peak_bytes, reset_peak
from maskedtrain.training.metrics import read_metrics
from maskedtrain.training.run import Run, read_config
from maskedtrain.training.signals import Interrupted
from maskedtrain.training.train import train

Same = Callable[[object, object], None]

# 1,295 images, 20 steps of 64 an epoch (10 of 2 x 64); evaluations at 8, 16, ...
STEPS = 45
ATS_SGD = TrainConfig(
    DigitsConfig(image_size=8, batch_size=64),
    ResNetConfig(depth=8, width=8),
    ATSConfig(core_lr_scale=0.5),
    OptimConfig(lr=0.1, warmup_steps=10),
    RunConfig(epochs=3.0, max_steps=STEPS, eval_every=8, save_every=10, log_every=1, device="cpu"),
)
SLIMMABLE_ADAMW = replace(
    ATS_SGD,
    method=SlimmableConfig(ratios=(0.5, 0.25), round_to=2),
    optim=OptimConfig(
        "adamw", lr=0.01, weight_decay=0.1, warmup_steps=10, clip_grad_norm=1.0, accumulate=2
    ),
    run=replace(ATS_SGD.run, epochs=6.0),
)
CONFIGS = {"ats-sgd": ATS_SGD, "slimmable-adamw": SLIMMABLE_ADAMW}


def configured(config: TrainConfig, out: Path, **run: Any) -> TrainConfig:
    return replace(config, run=replace(config.run, out=out, **run))


def console() -> Console:
    return Console(io.StringIO())


def resume(folder: Path, **run: Any) -> str:
    """Go on with a run; returns what was printed."""
    output = io.StringIO()
    config = read_config(folder)
    train(replace(config, run=replace(config.run, **run)), Console(output), resume=True)
    return output.getvalue()


def final_state(folder: Path) -> list[Any]:
    """All that a run leaves that does not depend on the clock."""
    checkpoint = Checkpoints(folder / "checkpoints").load()
    state = {key: value for key, value in checkpoint.state.items() if key != "seconds"}
    return [checkpoint.step, checkpoint.weights, state]


def records(folder: Path) -> list[dict[str, Any]]:
    found = read_metrics(folder / "metrics.jsonl")
    timed = {"time_s", "targets_per_s", "flop_utilization"}
    return [{key: value for key, value in r.items() if key not in timed} for r in found]


def results(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "summary.json").read_text())["results"]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "peak_mem_bytes")} for row in rows
    ]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folders of runs that nothing stopped, by the name of their configuration."""

    @functools.cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / name
        train(configured(CONFIGS[name], folder), console())
        return folder

    return run


@pytest.fixture(params=CONFIGS)
def whole(request: pytest.FixtureRequest, whole_runs: Callable[[str], Path]) -> Path:
    return whole_runs(request.param)


@pytest.fixture
def whole_ats(whole_runs: Callable[[str], Path]) -> Path:
    return whole_runs("ats-sgd")


@pytest.fixture
def copied(whole_ats: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_ats, tmp_path / "run"))


Signals = Callable[[dict[int, Sequence[int]]], None]


@pytest.fixture
def signals_at(monkeypatch: pytest.MonkeyPatch) -> Signals:
    """Sends this process signals in the middle of chosen steps."""
    due: dict[int, Sequence[int]] = {}
    train_step = Trainer.train_step

    def step_with_signals(self: Trainer, batches: Any) -> StepReport:
        report = train_step(self, batches)
        for signum in due.get(report.step, ()):
            os.kill(os.getpid(), signum)
        return report

    monkeypatch.setattr(Trainer, "train_step", step_with_signals)
    return due.update


def test_a_run_cut_again_and_again_ends_as_an_uncut_one(
    whole: Path, tmp_path: Path, signals_at: Signals, assert_identical: Same
):
    folder = tmp_path / "run"
    # Before and after an evaluation (8), at the end of an epoch (20; 40 with an evaluation), right
    # after the warm-up (10), with the super-network's step next (8, 10, 20, 40) and the core's.
    cuts = [1, 7, 8, 10, 20, 23, 40, STEPS]
    signals_at({cut: [(signal.SIGINT, signal.SIGTERM)[i % 2]] for i, cut in enumerate(cuts)})
    for i, cut in enumerate(cuts):
        config = configured(CONFIGS[whole.name], folder) if i == 0 else read_config(folder)
        with pytest.raises(Interrupted, match=f"stopped at step {cut}; go on with: .*") as caught:
            train(config, console(), resume=i > 0)
        assert caught.value.signum == (signal.SIGINT, signal.SIGTERM)[i % 2]
        assert not (folder / "summary.json").exists()
    # The last signal came in the last step: what is left are the results.
    resume(folder)
    assert_identical(final_state(folder), final_state(whole))
    assert records(folder) == records(whole)
    assert results(folder) == results(whole)


def test_max_steps_cuts_and_goes_on(whole_ats: Path, tmp_path: Path, assert_identical: Same):
    folder = tmp_path / "run"
    train(configured(ATS_SGD, folder, max_steps=13), console())
    # Kept in the folder, so that a run stopped before it goes on to it and no further.
    assert "--max-steps 13 ends it here, of 60 steps" in resume(folder)
    resume(folder, max_steps=20)
    assert read_config(folder).run.max_steps == 20
    resume(folder, max_steps=STEPS)
    assert_identical(final_state(folder), final_state(whole_ats))
    # The end of each part was evaluated, too.
    extra = [r for r in records(folder) if r["kind"] == "eval" and r["step"] in (13, 20)]
    assert len(extra) == 4
    assert [r for r in records(folder) if r not in extra] == records(whole_ats)
    assert results(folder) == results(whole_ats)


def command(*arguments: str) -> subprocess.Popen[str]:
    """The real command, in a process of its own."""
    code = "from maskedtrain.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_which_can_be_resumed(
    signum: signal.Signals, tmp_path: Path, assert_identical: Same
):
    folder = tmp_path / "a run"
    options = """--preset digits-resnet8-ats --depth 8 --width 8 --image-size 8 --batch-size 8
        --epochs 1000 --log-every 1 --device cpu"""
    child = command("train", *options.split(), "--out", str(folder))
    metrics = folder / "metrics.jsonl"
    try:
        # In the first epoch, of 161 steps, unless this process sleeps for seconds.
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 25):
            assert child.poll() is None, child.communicate()
            time.sleep(0.01)
        child.send_signal(signum)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()

    assert child.returncode == 128 + signum
    (step,) = Checkpoints(folder / "checkpoints").steps()
    assert "\nmaskedtrain: stopping after this step (Ctrl-C: at once)\n" in errors
    assert errors.endswith(
        f"maskedtrain: stopped at step {step}; go on with: maskedtrain train --resume '{folder}'\n"
    )
    assert "Traceback" not in errors
    until = step + 15
    resume(folder, max_steps=until)
    train(configured(read_config(folder), tmp_path / "whole"), console())
    assert_identical(final_state(folder), final_state(tmp_path / "whole"))
    assert records(folder) == records(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(
    whole_ats: Path, tmp_path: Path, signals_at: Signals, assert_identical: Same
):
    folder = tmp_path / "run"
    config = configured(ATS_SGD, folder)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signals_at({17: [signal.SIGINT, signal.SIGINT]})
    with pytest.raises(Interrupted, match=r"stopped at once.*step-00000010 .*go on with: "):
        train(config, console())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    signals_at({17: []})
    resume(folder)
    assert_identical(final_state(folder), final_state(whole_ats))
    assert records(folder) == records(whole_ats)


def test_a_second_ctrl_c_before_any_checkpoint(tmp_path: Path, signals_at: Signals):
    signals_at({3: [signal.SIGTERM, signal.SIGINT]})
    with pytest.raises(KeyboardInterrupt):
        train(configured(ATS_SGD, tmp_path), console())
    signals_at({3: []})
    assert f"warning: {tmp_path} has no checkpoint: starting at step 0" in resume(
        tmp_path, max_steps=1
    )


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path: Path):
    worker = threading.Thread(
        target=train, args=(configured(ATS_SGD, tmp_path, max_steps=1), console())
    )
    worker.start()
    worker.join()
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 1


def test_a_second_ctrl_c_after_resuming(copied: Path, signals_at: Signals):
    signals_at({STEPS + 2: [signal.SIGTERM, signal.SIGINT]})
    with pytest.raises(Interrupted, match=f"at once, with .*step-000000{STEPS} as the last"):
        resume(copied, max_steps=STEPS + 5)


def test_the_seed_settles_every_generator(tmp_path: Path, assert_identical: Same):
    def start(seed: int) -> list[Any]:
        run = Run(configured(ATS_SGD, tmp_path, seed=seed), console())
        draws = torch.rand(2), np.random.rand(), random.random()  # noqa: NPY002
        return [run.model.state_dict(), *draws]

    first = start(7)
    assert_identical(start(7), first)
    assert all(found != before for found, before in zip(start(8)[2:], first[2:], strict=True))


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir())


def test_a_damaged_newest_checkpoint_is_reported_and_passed_over(
    copied: Path, whole_ats: Path, assert_identical: Same
):
    weights = newest(copied) / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    output = resume(copied)
    assert f"warning: damaged checkpoint passed over: {newest(whole_ats).name}" in output.replace(
        f"{copied}/checkpoints/", ""
    )
    assert f"resuming {copied} at step 40" in output
    assert_identical(final_state(copied), final_state(whole_ats))
    assert records(copied) == records(whole_ats)


def test_no_undamaged_checkpoint_is_an_error(copied: Path):
    before = (copied / "metrics.jsonl").read_bytes()
    for checkpoint in (copied / "checkpoints").iterdir():
        (checkpoint / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        resume(copied)
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_a_moved_run_goes_on_in_its_new_place(copied: Path, whole_ats: Path, tmp_path: Path):
    moved = tmp_path / "else" / "where"
    shutil.move(copied, moved)
    assert f"resuming {moved} at step {STEPS}" in resume(moved)
    assert read_config(moved).run.out == moved
    assert not copied.exists()
    assert results(moved) == results(whole_ats)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"run": {"out": ', "Expecting value"),
        (b'{"run": "\xff"}', "codec can't decode"),
        (b"[]", "indices must be integers"),
        (b'{"data": {}}', "'run'"),
        (b'{"run": {"epochs": "many"}}', "config.run.epochs must be float, got 'many'"),
        (b'{"run": {"epoch": 3}}', "did you mean epochs"),
        (b'{"run": {"epochs": 0}}', "epochs must be > 0, got 0.0"),
    ],
)
def test_a_damaged_configuration_is_named(content: bytes, reason: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{path} is damaged: ")


def test_a_folder_without_a_run_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no run: there is no .*config\.json"):
        read_config(tmp_path)


def test_a_run_is_not_overwritten_by_accident(copied: Path, whole_ats: Path):
    config = configured(ATS_SGD, copied, max_steps=1)
    with pytest.raises(ValueError, match=f"holds a run already, at step {STEPS}; go on with: "):
        train(config, console())
    assert records(copied) == records(whole_ats)
    (copied / "leftover").touch()
    train(config, console(), overwrite=True)
    assert {r["step"] for r in records(copied)} == {1}
    assert not (copied / "leftover").exists()


def test_a_diverging_run_says_what_is_left(tmp_path: Path):
    config = replace(ATS_SGD, optim=replace(ATS_SGD.optim, lr=1e30, warmup_steps=0))
    with pytest.raises(NonFiniteError, match=r"at step 3\..* in another --out; no checkpoint"):
        train(configured(config, tmp_path / "first"), console())

    folder = tmp_path / "second"
    # The loss of step 2 was finite still: its weights are what shows it before they are saved.
    with pytest.raises(NonFiniteError, match=r"conv1.weight is not finite after step 2") as caught:
        train(configured(config, folder, save_every=1), console())
    good = folder / "checkpoints" / "step-00000001"
    assert f"the last good checkpoint, {good}, is there" in str(caught.value)
    assert all(t.isfinite().all() for t in Checkpoints(good.parent).load().weights.values())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * (t - 4) / 16))),
        ("multistep", lambda t: 0.1 ** ((t >= 10) + (t >= 15))),
        ("constant", lambda t: 1.0),
    ],
)
def test_learning_rates(schedule: Any, expected: Callable[[int], float], tmp_path: Path):
    optim = OptimConfig(lr=0.2, warmup_steps=4, schedule=schedule)
    config = replace(ATS_SGD, method=StandardConfig("core"), optim=optim)
    train(configured(config, tmp_path, epochs=1.0, max_steps=None), console())
    rates = {r["step"]: r["lr"] for r in records(tmp_path) if r["kind"] == "train"}
    for step in range(1, 21):
        # Steps before this one; the first 4 rise to the peak.
        t = step - 1
        factor = (t + 1) / 5 if t < 4 else expected(t)
        assert rates[step] == pytest.approx(0.2 * factor, rel=1e-9), step


def test_costs_that_a_run_reports(whole_ats: Path, tmp_path: Path):
    def flops(method: MethodConfig) -> dict[int, float]:
        config = configured(replace(ATS_SGD, method=method), tmp_path, max_steps=8)
        train(config, console(), overwrite=True)
        return {r["step"]: r["train_flops"] for r in records(tmp_path)}

    ats = {r["step"]: r["train_flops"] for r in records(whole_ats)}
    slimmable, full, core = map(
        flops, [SlimmableConfig(), StandardConfig(), StandardConfig("core")]
    )
    for step in (2, 4, 8):
        assert 2 * ats[step] == slimmable[step] == full[step] + core[step]
    assert ats[1] == full[1] > ats[2] - ats[1] == core[1] > 0
    rows = json.loads((whole_ats / "summary.json").read_text())["results"]
    assert [(row["network"], row["iterations"]) for row in rows] == [("full", 23), ("core", 22)]
    for row in rows:
        assert row["train_flops"] == ats[STEPS]
        assert row["forward_flops"] > 0
        assert row["seconds"] > 0
    assert rows[0]["peak_mem_bytes"] == rows[1]["peak_mem_bytes"] > 0


def test_losses_are_logged_by_each_networks_own_count(tmp_path: Path):
    train(configured(ATS_SGD, tmp_path, max_steps=9, log_every=2), console())
    logged = [(r["step"], r["subnet"]) for r in records(tmp_path) if r["kind"] == "train"]
    assert logged == [(3, "full"), (4, "core"), (7, "full"), (8, "core")]


def test_the_default_data_go_through_every_depth(tmp_path: Path):
    # 8 x 8 digits leave one pixel after three halvings, which batch norm has refused.
    config = configured(TrainConfig(), tmp_path, max_steps=1, device="cpu")
    small = replace(config.model, width=2)
    train(replace(config, model=small), console())
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_is_of_the_stretch_asked_for():
    cpu = torch.device("cpu")
    size = 256 << 20
    reset_peak(cpu)
    before = peak_bytes(cpu)
    torch.ones(size, dtype=torch.uint8)
    during = peak_bytes(cpu)
    reset_peak(cpu)
    after = peak_bytes(cpu)
    assert before is not None and during is not None and after is not None
    # Allocator and interpreter may hold or return a little meanwhile.
    assert during - before > 0.9 * size
    assert during - after > 0.9 * size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_what_is_freed_is_kept_until_a_peak_is_measured():
    """In a process of its own, since others must be able to measure theirs."""
    code = """
import resource, torch
from maskedtrain.training.memory import keep_freed_memory, peak_bytes, reset_peak

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults()
keep_freed_memory()
# The heap may grow once or twice before a hole fits.
kept = peak_bytes(torch.device("cpu")) if min(faults() for _ in range(5)) < fresh / 4 else 0
reset_peak(torch.device("cpu"))
print(kept - peak_bytes(torch.device("cpu")))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 0.9 * (64 << 20)


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta2"])
def test_an_unusable_device_is_named(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used: "):
        train(configured(ATS_SGD, tmp_path, device=name), console())


def test_the_best_weights_of_each_network_are_kept(tmp_path: Path, assert_identical: Same):
    # The validation accuracy of a rate that is too high goes up and down.
    optim = replace(ATS_SGD.optim, lr=0.5, warmup_steps=0)
    config = replace(ATS_SGD, optim=optim)
    folder = tmp_path / "best"
    train(configured(config, folder, select="best", eval_every=3, save_every=3), console())
    logged = [r for r in records(folder) if r["kind"] == "eval"]
    run = Run.restore(folder, console())
    steps = []
    for name, row in zip(("full", "core"), results(folder), strict=True):
        own = [r for r in logged if r["subnet"] == name]
        # The first of equals.
        best = max(own, key=lambda r: r["accuracy"])
        kept = run.best(name).load()
        assert (kept.step, kept.state["accuracy"]) == (best["step"], best["accuracy"])
        run.model.load_state_dict(kept.weights)
        subnet = run.method.subnets[name]
        assert run.task.evaluate(run.model, subnet, "val")["accuracy"] == best["accuracy"]
        assert row["accuracy"] == run.task.evaluate(run.model, subnet, "test")["accuracy"]
        steps.append(kept.step)
    # It would prove nothing if the last were the best.
    assert min(steps) < STEPS

    # Cut where the best ones of before and of after are not the same.
    cut = tmp_path / "cut"
    first = configured(config, cut, select="best", eval_every=3, save_every=3, max_steps=9)
    train(first, console())
    resume(cut, max_steps=STEPS)
    assert results(cut) == results(folder)
    for name in ("full", "core"):
        before, after = (Run.restore(f, console()).best(name).load() for f in (folder, cut))
        assert_identical([after.step, after.weights], [before.step, before.weights])


def test_the_mean_of_checkpoints(copied: Path):
    run = Run.restore(copied, console())
    steps = run.checkpoints.steps()
    assert len(steps) == 2
    older, newer = (run.checkpoints.load(step).weights for step in steps)
    run.load_weights(average=2)
    counters = 0
    for name, tensor in run.model.state_dict().items():
        if tensor.is_floating_point():
            mean = (older[name].double() + newer[name].double()) / 2
            assert torch.equal(tensor, mean.float()), name
            continue
        assert torch.equal(tensor, newer[name]) and not torch.equal(tensor, older[name]), name
        counters += 1
    assert counters > 0
    with pytest.raises(ValueError, match=r"average must be <= 2, the checkpoints of .*, got 3"):
        run.load_weights(average=3)
    with pytest.raises(ValueError, match="average must be >= 1, got 0"):
        run.load_weights(average=0)


def test_a_run_needs_no_data_to_be_restored(copied: Path, monkeypatch: pytest.MonkeyPatch):
    def load(self: DigitsConfig) -> Any:
        raise AssertionError("the data were loaded")

    monkeypatch.setattr(DigitsConfig, "load", load)
    run = Run.restore(copied, console())
    run.load_weights()
    with pytest.raises(AssertionError, match="the data were loaded"):
        run.task.evaluate(run.model, run.method.subnets["core"], "test")


def test_a_run_does_not_go_on_with_other_data(copied: Path):
    path = copied / "task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_classes": 9}))
    before = (copied / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"the data are not those .* num_classes must be 9, got 10"
    ):
        resume(copied)
    path.unlink()
    with pytest.raises(ValueError, match=r"task\.json is missing or damaged"):
        resume(copied)
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_the_speed_of_a_run_is_logged(whole_ats: Path):
    logged = read_metrics(whole_ats / "metrics.jsonl")
    trained = [r for r in logged if r["kind"] == "train"]
    assert len(trained) == STEPS
    seconds = {r["step"]: r["time_s"] for r in trained}
    for record in trained:
        step = record["step"]
        spent = seconds[step] - seconds.get(step - 1, 0.0)
        # Every step is logged: 64 images in its own time.
        assert record["targets_per_s"] == pytest.approx(64 / spent, rel=1e-6)
        assert record["flop_utilization"] > 0

"""Training as configured: the loop with its logs, evaluations and checkpoints, and the results."""

from __future__ import annotations

import math
import shlex
import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from maskedtrain.config import TrainConfig, to_dict
from maskedtrain.files import make_folder, output_errors, write_json
from maskedtrain.training.checkpoint import Checkpoint, Checkpoints
from maskedtrain.training.console import Console, ResultRow
from maskedtrain.training.loop import NonFiniteError, Trainer
from maskedtrain.training.memory import peak_bytes, reset_peak
from maskedtrain.training.metrics import MetricsLog, plot_curves, write_summary
from maskedtrain.training.optimizer import make_optimizer
from maskedtrain.training.run import Run, result_row
from maskedtrain.training.signals import Interrupted, noted_signals
from maskedtrain.training.throughput import Meter, Stretch, matmul_flops_per_s

__all__ = ["Results", "train"]


@dataclass(frozen=True)
class Results:
    """The table of a run, a row for each network, and what must be said of it."""

    results: list[ResultRow]
    remarks: Sequence[str]


def train(
    config: TrainConfig,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    label: str | None = None,
) -> Results:
    """Train as configured and write everything to ``config.run.out``.

    Args:
        resume: go on from the newest good checkpoint in the folder.
        overwrite: delete an earlier run in the folder first.
        label: what the progress is of; the method's name where not given.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the run can be resumed.
        NonFiniteError: a loss was not finite; the checkpoints hold the last good state.
        ValueError: bad data or options, or the folder holds a run and neither flag was given.
        OutputError: something could not be written.
    """
    folder = config.run.out
    done = Checkpoints(folder / "checkpoints").steps()
    if done and not (resume or overwrite):
        raise ValueError(
            f"{folder} holds a run already, at step {done[-1]}; {_go_on(folder)}; "
            "or choose another --out"
        )
    run = Run(config, console, saved=folder if done and resume else None)
    # Data that are not the run's are found before weights that do not fit them.
    batches = run.task.train_batches().stream()
    checkpoint = run.load_weights() if done and resume else None
    run.method.prepare(batches)
    reset_peak(run.device)
    # What can be wrong with the options has been found before the folder is touched.
    session = _Session(run)
    if done and overwrite:
        with output_errors(folder):
            shutil.rmtree(folder)
    make_folder(folder)
    if checkpoint is not None:
        session.restore(checkpoint)
        step = session.trainer.step
        console.print(f"resuming {folder} at step {step}")
        if session.until <= step < session.total:
            console.warn(f"--max-steps {session.until} ends it here, of {session.total} steps")
    elif resume:
        console.warn(f"{folder} has no checkpoint: starting at step 0")
    # Also of a run that goes on: some of its options may have changed.
    write_json(folder / "config.json", to_dict(config))
    if run.task.saved is None:
        run.task.save(folder)
    for note in run.task.notes():
        console.print(note)
    with MetricsLog(folder, resume_step=session.trainer.step or None) as log:
        _fit(session, log, label or config.method.name)
    results = Results(session.results(), run.task.remarks())
    summary = {"config": to_dict(config), **asdict(results)}
    write_summary(folder, {**summary, "step": session.trainer.step})
    curves = folder / "metrics.jsonl", folder / "curves.png"
    reason = plot_curves(*curves, score=run.task.score)
    if reason is not None:
        console.print(f"no curves.png: {reason}")
    return results


def _fit(session: _Session, log: MetricsLog, label: str) -> None:
    """``session.fit``, where what ends it early says which checkpoint is left."""
    try:
        session.fit(log, label)
    except NonFiniteError as error:
        left = "no checkpoint had been saved yet"
        if session.saved is not None:
            left = f"the last good checkpoint, {session.saved}, is there for eval and extract"
        raise NonFiniteError(f"{error}, in another --out; {left}") from error
    except KeyboardInterrupt:
        if session.saved is None:
            raise
        message = f"stopped at once, with {session.saved} as the last checkpoint"
        raise Interrupted(signal.SIGINT, f"{message}; {_go_on(session.run.folder)}") from None


class _Session:
    """A run in training: what changes from step to step, and what is written."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self.run = run
        self.loader = run.task.train_batches()
        batches = config.optim.accumulate * run.method.batches
        self.steps_per_epoch = max(1, len(self.loader) // batches)
        self.total = max(1, round(config.run.epochs * self.steps_per_epoch))
        optimizer, scheduler = make_optimizer(config.optim, run.model, self.total)
        self.trainer = Trainer(
            run.model,
            run.method,
            optimizer,
            run.task.loss,
            scheduler=scheduler,
            autocast=run.task.autocast,
            clip_grad_norm=config.optim.clip_grad_norm,
            accumulate=config.optim.accumulate,
            compile=config.run.compile,
            shapes=run.task.shapes,
            # On a GPU a check waits for the device; the loop checks before each checkpoint, too.
            check_every=1 if run.device.type == "cpu" else config.run.log_every,
            measure_every=config.run.measure_every or 0,
            measure_smoothness=config.run.measure_smoothness,
            alpha=config.optim.alpha,
        )
        self.earlier_seconds = 0.0
        self.train_flops = 0
        self.best: dict[str, float] = {}
        self.saved: Path | None = None
        self.meter = Meter(
            run.task.batch_flops,
            matmul_flops_per_s(run.device, run.task.autocast or torch.float32),
            run.method.networks,
        )

    @property
    def until(self) -> int:
        """The step to train to."""
        return min(self.total, self.run.config.run.max_steps or self.total)

    @property
    def seconds(self) -> float:
        """What all steps took, those before it was resumed too; waits for the last ones."""
        return self.earlier_seconds + self.meter.seconds()

    def save(self) -> None:
        self.trainer.check()
        state = {
            "trainer": self.trainer.state_dict(),
            "loader": self.loader.state_dict(),
            "seconds": self.seconds,
            "train_flops": self.train_flops,
            "best": dict(self.best),
        }
        weights = self.run.model.state_dict()
        self.saved = self.run.checkpoints.save(self.trainer.step, weights, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from it; its weights are the model's already."""
        self.trainer.load_state_dict(checkpoint.state["trainer"])
        self.loader.load_state_dict(checkpoint.state["loader"])
        self.earlier_seconds = checkpoint.state["seconds"]
        self.train_flops = checkpoint.state["train_flops"]
        self.best = checkpoint.state["best"]
        self.saved = checkpoint.path

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Every network on the validation data; the best weights of each so far are kept."""
        run, score = self.run, self.run.task.score.name
        found = {
            name: run.task.evaluate(run.model, subnet, "val")
            for name, subnet in run.method.subnets.items()
        }
        for name, result in found.items():
            if run.config.run.select == "best" and result[score] > self.best.get(name, -math.inf):
                self.best[name] = result[score]
                state = {
                    "passes": self.trainer.passes[name],
                    score: result[score],
                    "method": run.method.state_dict(),
                }
                run.best(name).save(self.trainer.step, run.model.state_dict(), state)
        return found

    def fit(self, log: MetricsLog, label: str) -> None:
        """Train to the end, logging, evaluating and saving on the way."""
        options, trainer, run = self.run.config.run, self.trainer, self.run
        score = run.task.score
        until = self.until
        eval_every = options.eval_every or self.steps_per_epoch
        save_every = options.save_every or self.steps_per_epoch
        stopping = False
        with (
            noted_signals() as caught,
            run.console.progress(until, start=trainer.step, label=label, score=score) as bar,
        ):
            stream = self.meter.seen(self.loader.stream())
            while trainer.step < until and not stopping:
                stretch = Stretch(run.device)
                report = trainer.train_step(stream)
                stretch.end()
                step, last = report.step, report.step == until
                losses = {
                    name: float(loss)
                    for name, loss in report.losses.items()
                    # By its own count of steps: a method may train another network at every step.
                    if trainer.passes[name] % options.log_every == 0
                }
                self.train_flops += self.meter.step(report.plan, stretch.seconds)
                for name, loss in losses.items():
                    values = {"loss": loss, "lr": report.lr, **self.meter.rates(name)}
                    if trainer.alpha == "auto":
                        values["alpha"] = report.alpha
                    log.log(step, "train", name, **self.record(values))
                    bar.update(step, loss=loss)
                for name, measured in report.criteria.items():
                    values = measured.whole.quantities()
                    if report.smoothness is not None:
                        L = report.smoothness.L
                        values |= {"L": L, "assumption3": measured.whole.assumption3(L)}
                    log.log(step, "criteria", name, **self.record(values))
                    for layer, one in measured.by_layer().items() if options.measure_layers else ():
                        values = {"layer": layer, **one.quantities()}
                        log.log(step, "criteria", name, **self.record(values))
                bar.update(step)
                if step % eval_every == 0 or last:
                    found = self.evaluate()
                    for name, result in found.items():
                        log.log(step, "eval", name, **self.record(result))
                    bar.update(step, score=next(iter(found.values()))[score.name])
                # A signal that comes later than this is for the next step.
                stopping = bool(caught)
                if step % save_every == 0 or last or stopping:
                    log.sync()
                    self.save()
            if caught:
                advice = _go_on(run.folder)
                raise Interrupted(caught[0], f"stopped at step {trainer.step}; {advice}")

    def record(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "train_flops": self.train_flops, "time_s": self.seconds}

    def results(self) -> list[ResultRow]:
        """The table: every network on the test data, with the weights that are selected."""
        run = self.run
        peak_mem_bytes = peak_bytes(run.device)
        rows: list[ResultRow] = []
        for name, subnet in run.method.subnets.items():
            if name in self.best:
                run.load_best(name)
            row = result_row(run, subnet, "test", self.trainer.passes[name])
            row = replace(row, train_flops=self.train_flops, seconds=self.seconds)
            rows.append(replace(row, peak_mem_bytes=peak_mem_bytes))
        return rows


def _go_on(folder: Path) -> str:
    return f"go on with: maskedtrain train --resume {shlex.quote(str(folder))}"

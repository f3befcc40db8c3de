"""A training run from its configuration: data, model, method, loop, checkpoints, results."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from maskedtrain import data
from maskedtrain.config import OptimConfig, TrainConfig, from_dict, to_dict
from maskedtrain.data.images import BatchLoader, ImageSplit
from maskedtrain.files import make_folder, output_errors, write_json
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.optim.base import MaskedOptimizer
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.training.checkpoint import Checkpoint, Checkpoints
from maskedtrain.training.console import Console, ResultRow
from maskedtrain.training.loop import (
    Evaluation,
    NonFiniteError,
    Trainer,
    evaluation_mode,
    seed_generators,
)
from maskedtrain.training.memory import peak_bytes, reset_peak
from maskedtrain.training.metrics import MetricsLog, plot_curves, write_summary
from maskedtrain.training.signals import Interrupted, noted_signals

__all__ = ["Run", "read_config", "train"]


class Run:
    """Data, model and method of a run, all from its configuration and its seed."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.folder = config.run.out
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        self.device = _device(config.run.device)
        size = config.data.image_size
        options = {} if size is None else {"image_size": size}
        self.dataset = data.load(config.data.dataset, config.data.data, **options)
        seed_generators(config.run.seed)
        channels, *_ = self.dataset.image_shape
        self.model: nn.Module = config.model.build(
            in_channels=channels, num_classes=self.dataset.num_classes
        )
        self.model.to(self.device)
        self.method = config.method.build(self.model)
        if config.run.channels_last:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", keep_last=config.run.keep_last, report=console.warn
        )

    def batches(self, split: ImageSplit, *, training: bool = False) -> BatchLoader:
        """Batches of a split: shuffled and augmented for training, else in order and as they
        are.
        """
        options = self.config.data
        return BatchLoader(
            split,
            options.batch_size if training else options.eval_batch_size,
            mean=self.dataset.mean,
            std=self.dataset.std,
            augment=self.dataset.augment if training and options.augment else None,
            seed=self.config.run.seed,
            device=self.device,
            shuffle=training,
            drop_last=training,
            channels_last=self.config.run.channels_last,
        )

    def image_flops(self, subnet: SubNetwork, *, training: bool = False) -> int:
        """FLOPs of one image: a forward pass, or a forward and backward one."""
        image = torch.empty(1, *self.dataset.image_shape, device=self.device)
        # Batch norm in training mode refuses a single value per channel.
        with evaluation_mode(self.model):
            return subnet.flops(image, training=training)

    def load_weights(self, step: int | None = None) -> Checkpoint:
        """Load the newest good checkpoint (or that of one step) into the model."""
        checkpoint = self.checkpoints.load(step)
        self.model.load_state_dict(checkpoint.weights)
        return checkpoint


class _Session:
    """A run in training: what changes from step to step, and what is written."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self.run = run
        self.loader = run.batches(run.dataset.train, training=True)
        self.steps_per_epoch = max(1, len(self.loader) // config.optim.accumulate)
        self.total = max(1, round(config.run.epochs * self.steps_per_epoch))
        optimizer, scheduler = _optimizer(config.optim, run.model, self.total)
        self.trainer = Trainer(
            run.model,
            run.method,
            optimizer,
            F.cross_entropy,
            scheduler=scheduler,
            autocast=torch.bfloat16 if config.run.bf16 else None,
            clip_grad_norm=config.optim.clip_grad_norm,
            accumulate=config.optim.accumulate,
            compile=config.run.compile,
            # On a GPU a check waits for the device; the loop checks before each checkpoint, too.
            check_every=1 if run.device.type == "cpu" else config.run.log_every,
        )
        self.seconds = 0.0
        self.saved: Path | None = None
        images = config.data.batch_size * config.optim.accumulate
        self._step_flops = {
            name: run.image_flops(subnet, training=True) * images
            for name, subnet in run.method.subnets.items()
        }

    @property
    def train_flops(self) -> int:
        """FLOPs of all forward and backward passes so far."""
        return sum(self._step_flops[name] * count for name, count in self.trainer.passes.items())

    @property
    def until(self) -> int:
        """The step to train to."""
        return min(self.total, self.run.config.run.max_steps or self.total)

    def save(self) -> None:
        self.trainer.check()
        state = {
            "trainer": self.trainer.state_dict(),
            "loader": self.loader.state_dict(),
            "seconds": self.seconds,
        }
        weights = self.run.model.state_dict()
        self.saved = self.run.checkpoints.save(self.trainer.step, weights, state)

    def restore(self) -> None:
        checkpoint = self.run.load_weights()
        self.trainer.load_state_dict(checkpoint.state["trainer"])
        self.loader.load_state_dict(checkpoint.state["loader"])
        self.seconds = checkpoint.state["seconds"]
        self.saved = checkpoint.path

    def evaluate(self, split: ImageSplit) -> dict[str, Evaluation]:
        batches = self.run.batches(split)
        subnets = self.run.method.subnets
        return {name: self.trainer.evaluate(batches, subnet) for name, subnet in subnets.items()}

    def fit(self, log: MetricsLog, label: str) -> None:
        """Train to the end, logging, evaluating and saving on the way."""
        options, trainer, console = self.run.config.run, self.trainer, self.run.console
        until = self.until
        eval_every = options.eval_every or self.steps_per_epoch
        save_every = options.save_every or self.steps_per_epoch
        stopping = False
        with (
            noted_signals() as caught,
            console.progress(until, start=trainer.step, label=label) as bar,
        ):
            stream = self.loader.stream()
            while trainer.step < until and not stopping:
                started = time.perf_counter()
                report = trainer.train_step(stream)
                step, last = report.step, report.step == until
                losses = {
                    name: float(loss)
                    for name, loss in report.losses.items()
                    # By its own count of steps: a method may train another network at every step.
                    if trainer.passes[name] % options.log_every == 0
                }
                evaluating = step % eval_every == 0 or last
                if evaluating:
                    self._wait()
                self.seconds += time.perf_counter() - started
                for name, loss in losses.items():
                    log.log(step, "train", name, **self.record({"loss": loss, "lr": report.lr}))
                    bar.update(step, loss=loss)
                bar.update(step)
                if evaluating:
                    found = self.evaluate(self.run.dataset.val)
                    for name, result in found.items():
                        log.log(step, "eval", name, **self.record(asdict(result)))
                    bar.update(step, accuracy=next(iter(found.values())).accuracy)
                # A signal that comes later than this is for the next step.
                stopping = bool(caught)
                if step % save_every == 0 or last or stopping:
                    log.sync()
                    self.save()
            if caught:
                raise Interrupted(caught[0], f"stopped at step {trainer.step}; {_go_on(self.run)}")

    def _wait(self) -> None:
        """Wait for the steps that an accelerator has yet to do, so that they are timed as steps."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)

    def record(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "train_flops": self.train_flops, "time_s": self.seconds}

    def results(self) -> list[ResultRow]:
        """The table: every network on the test images."""
        test = self.evaluate(self.run.dataset.test)
        peak_mem_bytes = peak_bytes(self.run.device)
        return [
            ResultRow(
                network=name,
                method=self.run.config.method.name,
                iterations=self.trainer.passes[name],
                accuracy=test[name].accuracy,
                params=subnet.numel(),
                forward_flops=self.run.image_flops(subnet),
                train_flops=self.train_flops,
                seconds=self.seconds,
                peak_mem_bytes=peak_mem_bytes,
            )
            for name, subnet in self.run.method.subnets.items()
        ]


def train(
    config: TrainConfig,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    label: str | None = None,
) -> list[ResultRow]:
    """Train as configured and write everything to ``config.run.out``; returns the table of results.

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
    run = Run(config, console)
    folder = run.folder
    done = run.checkpoints.steps()
    if done and not (resume or overwrite):
        raise ValueError(
            f"{folder} holds a run already, at step {done[-1]}; {_go_on(run)}; "
            "or choose another --out"
        )
    reset_peak(run.device)
    # What can be wrong with the options has been found before the folder is touched.
    session = _Session(run)
    if done and overwrite:
        with output_errors(folder):
            shutil.rmtree(folder)
    make_folder(folder)
    if done and resume:
        session.restore()
        step = session.trainer.step
        console.print(f"resuming {folder} at step {step}")
        if session.until <= step < session.total:
            console.warn(f"--max-steps {session.until} ends it here, of {session.total} steps")
    elif resume:
        console.warn(f"{folder} has no checkpoint: starting at step 0")
    # Also of a run that goes on: some of its options may have changed.
    write_json(folder / "config.json", to_dict(config))
    with MetricsLog(folder, resume_step=session.trainer.step or None) as log:
        _fit(session, log, label or config.method.name)
    rows = session.results()
    summary = {"config": to_dict(config), "results": [asdict(row) for row in rows]}
    write_summary(folder, {**summary, "step": session.trainer.step})
    if (reason := plot_curves(folder / "metrics.jsonl", folder / "curves.png")) is not None:
        console.print(f"no curves.png: {reason}")
    return rows


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
        raise Interrupted(signal.SIGINT, f"{message}; {_go_on(session.run)}") from None


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in this folder, which may have been moved since.

    Raises:
        ValueError: there is no run in the folder, or its configuration is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no {path}")
    try:
        values = json.loads(path.read_bytes())
        values["run"]["out"] = str(folder)
        return from_dict(values)
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _go_on(run: Run) -> str:
    return f"go on with: maskedtrain train --resume {shlex.quote(str(run.folder))}"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _optimizer(
    options: OptimConfig, model: nn.Module, total: int
) -> tuple[MaskedOptimizer, lr_scheduler.LRScheduler]:
    """The optimizer, and its learning rate over ``total`` steps."""
    parameters = list(model.parameters())
    if options.optimizer == "sgd":
        optimizer = MaskedSGD(
            parameters,
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
        )
    else:
        optimizer = MaskedAdamW(
            parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        )
    warmup = min(options.warmup_steps, total - 1)
    rest = total - warmup
    if options.schedule == "cosine":
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, rest)
    elif options.schedule == "multistep":
        at = [round(share * total) - warmup for share in options.milestones]
        schedule = lr_scheduler.MultiStepLR(optimizer, at)
    else:
        schedule = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if warmup:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        schedule = lr_scheduler.SequentialLR(optimizer, [rise, schedule], [warmup])
    return optimizer, schedule

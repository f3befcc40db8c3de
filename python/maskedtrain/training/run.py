"""What a training run consists of, made from its configuration or from its folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from maskedtrain.config import TrainConfig, from_dict, unknown_name
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.tasks import make_task
from maskedtrain.tasks.base import Split
from maskedtrain.training.checkpoint import Checkpoint, Checkpoints
from maskedtrain.training.console import Console, ResultRow
from maskedtrain.training.initial import load_initial
from maskedtrain.training.loop import seed_generators

__all__ = ["Run", "read_config", "result_row"]


class Run:
    """Task, model and method of a run, all from its configuration and its seed.

    ``saved`` is the folder of the run if it has begun: then the data are not needed for this.
    """

    def __init__(self, config: TrainConfig, console: Console, *, saved: Path | None = None) -> None:
        self.config = config
        self.console = console
        self.folder = config.run.out
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        self.device = _device(config.run.device)
        self.task = make_task(config, self.device, saved=saved)
        sizes = self.task.model_arguments()
        seed_generators(config.run.seed)
        self.model: nn.Module = config.model.build(**sizes)
        if config.run.init_from is not None and saved is None:
            load_initial(self.model, config.run.init_from)
        self.model.to(self.device)
        self.method = config.method.build(self.model)
        if config.run.channels_last:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", keep_last=config.run.keep_last, report=console.warn
        )

    @classmethod
    def restore(cls, folder: Path, console: Console) -> Run:
        """The run in a folder, with its initial weights."""
        return cls(read_config(folder), console, saved=folder)

    def subnet(self, name: str) -> SubNetwork:
        """One of the method's sub-networks; ValueError with the known ones otherwise."""
        if name not in self.method.subnets:
            raise unknown_name("sub-network", name, self.method.subnets)
        return self.method.subnets[name]

    def best(self, name: str) -> Checkpoints:
        """Where the best weights of a sub-network are kept."""
        return Checkpoints(self.folder / "best" / name, keep_last=1, report=self.console.warn)

    def load_weights(self, step: int | None = None, *, average: int = 1) -> Checkpoint:
        """Load the newest good checkpoint (or that of one step) into the model.

        Args:
            step: of the checkpoint.
            average: take the mean of the weights of so many checkpoints, this and those before it.
        """
        checkpoint = self.checkpoints.load(step)
        # First: it may say what the model's parameters were.
        self.method.load_state_dict(checkpoint.state["trainer"]["method"])
        self.model.load_state_dict(
            checkpoint.weights if average == 1 else self._mean_weights(checkpoint, average)
        )
        return checkpoint

    def load_best(self, subnet: str) -> Checkpoint:
        """Load the best weights of a sub-network into the model."""
        checkpoint = self.best(subnet).load()
        self.method.load_state_dict(checkpoint.state["method"])
        self.model.load_state_dict(checkpoint.weights)
        return checkpoint

    def _mean_weights(self, newest: Checkpoint, count: int) -> dict[str, Tensor]:
        if count < 1:
            raise ValueError(f"average must be >= 1, got {count}")
        steps = [step for step in self.checkpoints.steps() if step <= newest.step][-count:]
        if len(steps) < count:
            raise ValueError(
                f"average must be <= {len(steps)}, the checkpoints of {self.folder} up to step "
                f"{newest.step}, got {count} (--keep-last of the training says how many stay)"
            )
        sums = {name: tensor.double() for name, tensor in newest.weights.items()}
        for step in steps[:-1]:
            for name, tensor in self.checkpoints.load(step).weights.items():
                if tensor.shape != sums[name].shape:
                    raise ValueError(
                        f"average needs checkpoints of one size: {name} of step {step} must have "
                        f"shape {list(sums[name].shape)}, got {list(tensor.shape)}"
                    )
                sums[name] += tensor
        # What counts something, such as a batch norm's batches, is not averaged.
        return {
            name: (sums[name] / count).to(tensor.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in newest.weights.items()
        }


def result_row(run: Run, subnet: SubNetwork, split: Split, iterations: int) -> ResultRow:
    """A sub-network, with the model's present weights, on the data of a split."""
    found = run.task.evaluate(run.model, subnet, split, final=True)
    return ResultRow(
        network=subnet.name,
        method=run.config.method.name,
        iterations=iterations,
        params=subnet.numel(),
        forward_flops=run.task.unit_flops(subnet),
        unit=run.task.unit,
        # Of a translation it is the whole that counts, not each token after the right ones.
        accuracy=None if "bleu" in found else found["accuracy"],
        bleu=found.get("bleu"),
        exact_match=found.get("exact_match"),
        matthews=found.get("matthews"),
    )


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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device

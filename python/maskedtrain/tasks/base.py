"""What a run asks of its task."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from maskedtrain.config import TrainConfig
from maskedtrain.files import write_json
from maskedtrain.methods.base import Plan
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.training.loop import Batch
from maskedtrain.training.losses import cross_entropy
from maskedtrain.training.scores import Score

__all__ = ["Batches", "Split", "Task"]

Split = Literal["val", "test"]
FILE = "task.json"


class Batches(Protocol):
    """Batches of a training run, with a position that can be saved."""

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def stream(self) -> Iterator[Batch]:
        """Batches without end, from the position on."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Task(ABC):
    """One kind of data and what networks are to do with it.

    ``saved`` is the folder of a run that has begun: it says what the data were, so that they need
    not be loaded to rebuild the model; where they are, they must be the same.
    """

    unit: ClassVar[str]
    """What costs are given by."""
    score: ClassVar[Score]
    """What networks are compared by."""

    def __init__(self, config: TrainConfig, device: torch.device, saved: Path | None) -> None:
        self.config = config
        self.device = device
        self.saved = saved
        self.autocast = torch.bfloat16 if config.run.bf16 else None

    @cached_property
    def dataset(self) -> Any:
        """The data, loaded when first asked for; ValueError if the run's were others."""
        dataset = self.load()
        if self.saved is not None:
            found, expected = self.describe(dataset), self.description
            for name, value in expected.items():
                if found[name] != value:
                    raise ValueError(
                        f"the data are not those of the run in {self.saved}: {name} must be "
                        f"{value}, got {found[name]}"
                    )
        return dataset

    def load(self) -> Any:
        """The data, as the configuration says."""
        return self.config.data.load()

    @cached_property
    def description(self) -> dict[str, Any]:
        """What a run's folder holds of the data, as JSON."""
        if self.saved is None:
            return self.describe(self.dataset)
        path = self.saved / FILE
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from None

    def save(self, folder: Path) -> None:
        """Write what rebuilding the model will need; raises OutputError."""
        write_json(folder / FILE, self.description)

    @abstractmethod
    def describe(self, dataset: Any) -> dict[str, Any]:
        """What the model depends on, as JSON."""

    @abstractmethod
    def model_arguments(self) -> dict[str, Any]:
        """Sizes of the data, for ``ModelConfig.build``."""

    @abstractmethod
    def train_batches(self) -> Batches:
        """The training data, in an order that the seed settles."""

    @property
    def shapes(self) -> int | None:
        """How many shapes training batches have, where these are few."""
        return None

    @abstractmethod
    def eval_batches(self, split: Split) -> Iterable[Batch]:
        """The data of a split, once and in order."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, subnet: SubNetwork, split: Split, *, final: bool = False
    ) -> dict[str, float]:
        """A sub-network's loss, scores and ``count`` of targets; ``final`` takes the trouble of
        results.
        """

    @abstractmethod
    def batch_flops(self, plan: Plan) -> Callable[[Any], int]:
        """FLOPs of a plan whose passes run on one batch, forward and backward, by its inputs."""

    @abstractmethod
    def unit_flops(self, subnet: SubNetwork) -> float:
        """FLOPs of a forward pass, by unit."""

    @abstractmethod
    def example(self) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Inputs of the model on the CPU and their dynamic axes, as ``torch.export`` takes them."""

    def notes(self) -> Sequence[str]:
        """What must be said of the data before they are trained on."""
        return ()

    def remarks(self) -> Sequence[str]:
        """What must be said of the results."""
        return ()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss."""
        return cross_entropy(outputs, targets, self.config.optim.label_smoothing)

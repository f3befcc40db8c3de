"""Weights that a run starts from."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from maskedtrain.training.checkpoint import CheckpointError, Checkpoints

__all__ = ["load_initial"]


def load_initial(model: nn.Module, source: Path) -> None:
    """Load the weights of a run's newest checkpoint, or of a safetensors file, into the model.

    Raises:
        ValueError: there are none, or they are another model's; the model has not changed.
    """
    weights = _read(source)
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise ValueError(f"{source} has no {name}: it is of another model or method")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{name} must have shape {list(tensor.shape)}, got {list(weights[name].shape)} in "
                f"{source}"
            )
    for name in weights:
        if name not in own:
            raise ValueError(f"{source} has {name}, which the model has not: extract one network")
    model.load_state_dict(weights)


def _read(source: Path) -> dict[str, Tensor]:
    try:
        if source.is_dir():
            return Checkpoints(source / "checkpoints").load().weights
        return safetensors.torch.load_file(source)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise ValueError(f"{source} is no run and no safetensors file: {error}") from None

"""An extracted network on disk, for plain torch."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskedtrain.files import atomic_write
from maskedtrain.training.checkpoint import weights_bytes

__all__ = ["save_program", "save_weights"]


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the network's state to a safetensors file; raises OutputError."""
    with atomic_write(path) as file:
        file.write(weights_bytes(network.state_dict()))


def save_program(
    network: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: tuple[Any, ...], path: Path
) -> None:
    """Write the network as a ``torch.export`` program for inputs like these, of any size in their
    dynamic axes.

    ``torch.export.load(path).module()`` runs it wherever there is torch, with the network's own
    names in its state. Raises OutputError.
    """
    # torch.export.save takes a weight in channels-last layout for part of a larger one, and warns.
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    first = next(iter(inspect.signature(network.forward).parameters.values()))
    # torch.export takes what *args gathers, as a Sum's does, for one argument.
    shapes = (dynamic_shapes,) if first.kind is first.VAR_POSITIONAL else dynamic_shapes
    program = torch.export.export(network, inputs, dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())

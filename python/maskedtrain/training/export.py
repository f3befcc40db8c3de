"""An extracted network on disk, for plain torch."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from maskedtrain.files import atomic_write
from maskedtrain.training.checkpoint import weights_bytes

__all__ = ["save_program", "save_weights"]


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the network's state to a safetensors file; raises OutputError."""
    with atomic_write(path) as file:
        file.write(weights_bytes(network.state_dict()))


def save_program(network: nn.Module, input_shape: Sequence[int], path: Path) -> None:
    """Write the network as a ``torch.export`` program for batches ``[B, *input_shape]`` of any size
    B.

    ``torch.export.load(path).module()`` runs it wherever there is torch, with the network's own
    names in its state. Raises OutputError.
    """
    # torch.export.save takes a weight in channels-last layout for part of a larger one, and warns.
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    # Two examples: torch.export would take a batch of one for a constant.
    example = torch.zeros(2, *input_shape)
    program = torch.export.export(
        network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())

"""The hidden neurons of a model: which layers make them and which take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from maskedtrain.subnetwork import SubNetwork
from maskedtrain.widths import widths_of
from partial_kernels import Index

__all__ = ["Neurons", "neurons_of"]


@dataclass(frozen=True)
class Neurons:
    """Neurons or channels of one width: rows of the producers, columns of the consumers."""

    total: int
    producers: tuple[nn.Module, ...]
    consumers: tuple[nn.Module, ...]


def neurons_of(model: nn.Module) -> dict[str, Neurons]:
    """The widths of neurons, by name.

    A width that no layer takes as its columns is none: attention scores are sums over the query and
    key dimensions, whatever these are.

    Raises:
        TypeError: the model has no ``width_masks(kept)``.
    """
    found: dict[str, Neurons] = {}
    for width, total in widths_of(model).items():
        first = SubNetwork.neurons(model, {width: torch.arange(1)}, name=width)
        cut = {name: mask for name, mask in first.masks.items() if isinstance(mask, Index)}
        producers = [name for name, mask in cut.items() if mask.rows is not None]
        consumers = [name for name, mask in cut.items() if mask.cols is not None]
        if consumers:
            found[width] = Neurons(total, _owners(model, producers), _owners(model, consumers))
    return found


def _owners(model: nn.Module, parameters: list[str]) -> tuple[nn.Module, ...]:
    """The modules that these parameters belong to, each once."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return tuple(model.get_submodule(name) for name in names)

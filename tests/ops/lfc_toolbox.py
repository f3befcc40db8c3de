"""Small cases of ``lfc_linear``, and what its graph keeps of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import partial_kernels as pk
from partial_kernels.lfc.cases import Case

FORMS = ("merged", "factored")
SUPER = Case("", (23,), 13, 11, 3)
CORE = replace(SUPER, core=True)


def tensors(made: dict[str, Any]) -> list[Tensor]:
    return [value for value in made.values() if isinstance(value, Tensor)]


def saved(made: dict[str, Any], **like: Any) -> list[Tensor]:
    """What the graph keeps beside the arguments, once each: all, or those with such attributes."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = pk.lfc_linear(**made)
    del y
    arguments = {t.untyped_storage().data_ptr() for t in tensors(made)}
    beside = [tensor for pointer, tensor in found.items() if pointer not in arguments]
    return [t for t in beside if all(getattr(t, name) == value for name, value in like.items())]

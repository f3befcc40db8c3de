"""Sub-networks of modules that know nothing of them: parameters that read as zero off a mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from partial_kernels import Mask

__all__ = ["check_full_width", "zeroed"]

_PLAIN = "_plain_class"
_MASKS = "_zeroed_masks"


@contextmanager
def zeroed(module: nn.Module, masks: Mapping[str, Mask | None]) -> Iterator[None]:
    """Within it, ``module.weight`` and kin read as zero off these masks; an outer ``zeroed`` rests.

    The module's class becomes a subclass with a property in each such parameter's place. Unlike
    forward hooks that reaches parents that read the parameter themselves (``nn.MultiheadAttention``
    does), and ``torch.compile``, which guards on the class. The parameters stay what they are:
    ``parameters()``, ``state_dict()`` and ``functional_call`` see them whole.

    Args:
        module: any module but one of this package's layers.
        masks: by the name of a parameter of its own; None is zero throughout. Others read as ever.

    Raises:
        TypeError: a mask is compact, or the module does not read its parameters by name.
    """
    check_full_width(module, masks)
    if masks and isinstance(module, nn.RNNBase):
        raise TypeError(f"{type(module).__name__} keeps its weights in a list: none can be masked")
    state, outer = module.__dict__, type(module)
    plain = getattr(outer, _PLAIN, outer)
    if not masks and outer is plain:
        yield
        return
    outer_masks = state.get(_MASKS)
    module.__class__ = _subclass(plain, tuple(masks)) if masks else plain
    state[_MASKS] = masks
    try:
        yield
    finally:
        module.__class__ = outer
        if outer_masks is None:
            del state[_MASKS]
        else:
            state[_MASKS] = outer_masks


def check_full_width(module: nn.Module, masks: Mapping[str, Mask | None]) -> None:
    """Raise TypeError if one of the masks would give this plain module a smaller parameter."""
    for name, mask in masks.items():
        if mask is not None and mask.compact:
            raise TypeError(
                f"{type(module).__name__}.{name} has the compact mask {mask}, which only layers of "
                "maskedtrain.layers compute with; an Element mask works with any module"
            )


# One class for the same parameters: a new one at each activation would make torch.compile start
# over.
@cache
def _subclass(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    properties: dict[str, Any] = {name: property(_reader(name)) for name in names}
    return type(plain.__name__, (plain,), {_PLAIN: plain, **properties})


def _reader(name: str) -> Any:
    def read(module: nn.Module) -> Tensor:
        # At each reading: the graph of one restriction serves one backward.
        parameter: Any = module._parameters[name]
        mask = module.__dict__[_MASKS][name]
        return torch.zeros_like(parameter) if mask is None else mask.restrict(parameter)

    return read

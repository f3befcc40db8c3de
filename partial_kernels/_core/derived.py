"""What kernels make from a tensor's contents, kept as long as these stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["derived"]

_Value = TypeVar("_Value")

_HELD = "_partial_kernels_derived"


def derived(source: Tensor, name: str, make: Callable[[], _Value]) -> _Value:
    """``make()``, once: it is kept on the tensor by this name until the tensor changes in place.

    For masks, whose bits and lists of blocks would else be made anew in every step. What is made
    while a CUDA graph is captured lives in the graph's memory and is not kept.
    """
    # Without a version nobody would notice a change.
    if source.is_inference():
        return make()
    held: dict[str, tuple[int, Any]] | None = getattr(source, _HELD, None)
    if held is None:
        held = {}
        setattr(source, _HELD, held)
    if (entry := held.get(name)) is not None and entry[0] == source._version:
        return entry[1]
    value = make()
    if not (source.is_cuda and torch.cuda.is_current_stream_capturing()):
        held[name] = source._version, value
    return value

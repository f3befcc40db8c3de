"""Masks: which elements of a parameter belong to a sub-network.

A parameter has shape ``[O, ...]`` or ``[O, I, ...]``: dimension 0 are its *rows* (outputs),
dimension 1 its *columns* (inputs); every further dimension (a convolution's kernel) is kept whole.

``Full``, ``Prefix`` and ``Index`` are *compact*: the sub-network sees a smaller tensor. ``Block``,
``Element`` and ``Packed`` keep the full shape: the sub-network sees zeros off the mask. Masks are
immutable, compare and hash by content, and know nothing of the parameter until they are given its
shape.
"""

from partial_kernels.masks.base import Mask
from partial_kernels.masks.compact import Full, Index, Prefix
from partial_kernels.masks.sets import Difference, union
from partial_kernels.masks.zeroing import Block, Element, Packed

__all__ = [
    "Block",
    "Difference",
    "Element",
    "Full",
    "Index",
    "Mask",
    "Packed",
    "Prefix",
    "union",
]

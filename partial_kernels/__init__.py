"""Fused kernels for partial ("masked") training: every one an autograd operation with a PyTorch
twin.

Masks (``pk.Prefix`` and kin) say which elements of a parameter belong to a sub-network; the
functions compute with those alone. Kernel families are the folders beside this file; their public
names are here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partial_kernels._core import discovery as _discovery
from partial_kernels._core.explain import explain
from partial_kernels.masks import Block, Element, Full, Index, Mask, Packed, Prefix

if TYPE_CHECKING:
    # What the loop below finds, for type checkers; a test keeps the two equal.
    from partial_kernels.lfc import MergeCache, lfc_linear
    from partial_kernels.optim import masked_adamw_, masked_sgd_
    from partial_kernels.packed import packed_linear
    from partial_kernels.select import topk_select
    from partial_kernels.stats import MaskedStats, masked_stats
    from partial_kernels.submatrix import masked_linear
    from partial_kernels.topk import topk_linear

__version__ = "0.1.0"

for _family in _discovery.families():
    _module = _discovery.load(_family)
    globals().update({_name: getattr(_module, _name) for _name in getattr(_module, "__all__", ())})

__all__ = [
    "Block",
    "Element",
    "Full",
    "Index",
    "Mask",
    "MaskedStats",
    "MergeCache",
    "Packed",
    "Prefix",
    "explain",
    "lfc_linear",
    "masked_adamw_",
    "masked_linear",
    "masked_sgd_",
    "masked_stats",
    "packed_linear",
    "topk_linear",
    "topk_select",
]

"""``masked_linear`` for Block masks: full-width x and y."""

from __future__ import annotations

from torch import Tensor

from partial_kernels._core.linear_ops import linear_function
from partial_kernels.blocksparse.reference import OPS
from partial_kernels.linear import masks_linear
from partial_kernels.masks import Block

_linear = linear_function(OPS)


@masks_linear(Block)
def block_linear(
    x_TI: Tensor, weight: Tensor, bias: Tensor | None, mask: Block, impl: str
) -> Tensor:
    # The mask's own bitmap, wherever it is: backends keep on it what they make of it, which under
    # torch.compile they could not on a copy made in every call.
    return _linear(x_TI, weight, bias, impl, mask.bitmap, mask.size)

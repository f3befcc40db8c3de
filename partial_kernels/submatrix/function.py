"""``masked_linear`` for Prefix and Index masks: the compact linear layer of a sub-network."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._core.linear_ops import linear_function
from partial_kernels._core.ops import is_auto, plain_call
from partial_kernels.linear import masks_linear
from partial_kernels.masks import Index, Prefix
from partial_kernels.submatrix.reference import OPS, forward

Selection = tuple[int, Tensor | None, Tensor | None]

# Elements of a weight up to which torch's own autograd of the formula costs less than an
# autograd.Function around the ops, although it writes the weight's gradient twice. (Half of 256 x
# 256 in each direction, 64 tokens, forward and backward on a CPU: 0.17 against 0.27 ms; 512 x 512:
# 0.51 against 0.44. On CUDA so small a layer waits for its launches alone.)
SMALL = 1 << 16

_linear = linear_function(OPS)


def _selection(mask: Prefix | Index, weight: Tensor) -> Selection:
    if isinstance(mask, Prefix):
        return weight.shape[0] if mask.rows is None else mask.rows, None, None
    row_index, col_index = mask.on(weight.device, "rows"), mask.on(weight.device, "cols")
    # An index's own length would be one more symbol for dynamo to carry to the backward.
    return weight.shape[0] if row_index is None else 0, row_index, col_index


@masks_linear(Prefix, Index)
def submatrix_linear(
    x_TC: Tensor, weight: Tensor, bias: Tensor | None, mask: Prefix | Index, impl: str
) -> Tensor:
    selection = _selection(mask, weight)
    if (
        type(mask) is Prefix
        and weight.numel() <= SMALL
        and (weight.is_cpu or weight.is_cuda)
        and not torch.compiler.is_compiling()
        and is_auto(impl)
    ):
        plain_call("masked_linear", "auto", f"calls cost more than work up to {SMALL} weights")
        return forward(x_TC, weight, bias, *selection)
    return _linear(x_TC, weight, bias, impl, *selection)

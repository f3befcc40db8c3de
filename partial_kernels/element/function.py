"""``masked_linear`` for Element and Packed masks: full-width x and y."""

from __future__ import annotations

from torch import Tensor

from partial_kernels._core.linear_ops import linear_function
from partial_kernels.element.reference import OPS
from partial_kernels.linear import masks_linear
from partial_kernels.masks import Element, Packed

_linear = linear_function(OPS)


@masks_linear(Element, Packed)
def element_linear(
    x_TI: Tensor, weight: Tensor, bias: Tensor | None, mask: Element | Packed, impl: str
) -> Tensor:
    return _linear(x_TI, weight, bias, impl, mask.laid_out(weight.shape, weight.device))

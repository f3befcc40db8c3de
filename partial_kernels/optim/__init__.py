"""Masked SGD and AdamW, in place: nothing outside a mask is read or written."""

from partial_kernels.optim.function import masked_adamw_, masked_sgd_

__all__ = ["masked_adamw_", "masked_sgd_"]

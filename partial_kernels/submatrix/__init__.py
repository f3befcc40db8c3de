"""Masked GEMM for sub-networks: rows x columns of a weight (Prefix, Index, Full)."""

from partial_kernels.linear import masked_linear
from partial_kernels.submatrix import function as function

__all__ = ["masked_linear"]

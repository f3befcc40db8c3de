"""Masked GEMM for any set of elements of a weight (Element)."""

from partial_kernels.element import function as function

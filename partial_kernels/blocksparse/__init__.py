"""Masked GEMM for a block bitmap (Block)."""

from partial_kernels.blocksparse import function as function

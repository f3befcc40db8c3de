"""Linear layers with a low-rank part: ``x (W + V U)^T``."""

from partial_kernels.lfc.function import MergeCache, lfc_linear

__all__ = ["MergeCache", "lfc_linear"]

"""Exact selection of the largest magnitudes: by row, or of whole columns."""

from partial_kernels.select.function import topk_select

__all__ = ["topk_select"]

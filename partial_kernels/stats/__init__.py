"""Norms and inner products of masked gradients, for the criteria of partial SGD."""

from partial_kernels.stats.function import MaskedStats, masked_stats

__all__ = ["MaskedStats", "masked_stats"]

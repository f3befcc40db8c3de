"""meProp: linear layer whose backward keeps the largest elements of the output's gradient."""

from partial_kernels.topk.function import topk_linear

__all__ = ["topk_linear"]

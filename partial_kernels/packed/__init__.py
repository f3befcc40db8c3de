"""Linear layer with a frozen weight of which a few elements are trained, held packed."""

from partial_kernels.packed.function import packed_linear

__all__ = ["packed_linear"]

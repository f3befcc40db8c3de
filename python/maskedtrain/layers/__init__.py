"""Drop-in layers that compute with the active sub-network's part of their parameters."""

from maskedtrain.layers.base import Active, MaskedModule
from maskedtrain.layers.conv import MaskedConv2d
from maskedtrain.layers.lfc import LFCLinear
from maskedtrain.layers.linear import MaskedLinear
from maskedtrain.layers.norm import SwitchNorm
from maskedtrain.layers.packed import PackedLinear
from maskedtrain.layers.sum import Sum
from maskedtrain.layers.topk import TopKLinear

__all__ = [
    "Active",
    "LFCLinear",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedModule",
    "PackedLinear",
    "Sum",
    "SwitchNorm",
    "TopKLinear",
]

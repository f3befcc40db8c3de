"""Partial ("masked") training: sub-networks of one super-network, trained at their own cost."""

from maskedtrain.layers import (
    LFCLinear,
    MaskedConv2d,
    MaskedLinear,
    PackedLinear,
    Sum,
    SwitchNorm,
    TopKLinear,
)
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.surgery import Heads, layerwise_sum, lowrank, width
from maskedtrain.training.loop import Trainer
from partial_kernels import __version__

__all__ = [
    "Heads",
    "LFCLinear",
    "MaskedConv2d",
    "MaskedLinear",
    "PackedLinear",
    "SubNetwork",
    "Sum",
    "SwitchNorm",
    "TopKLinear",
    "Trainer",
    "__version__",
    "layerwise_sum",
    "lowrank",
    "width",
]

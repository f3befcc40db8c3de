"""Partial ("masked") training: sub-networks of one super-network, trained at their own cost."""

from maskedtrain.layers import (
    LFCLinear,
    MaskedConv2d,
    MaskedLinear,
    PackedLinear,
    SwitchNorm,
    TopKLinear,
)
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.surgery import Heads, lowrank, width
from maskedtrain.training.loop import Trainer
from partial_kernels import __version__

__all__ = [
    "Heads",
    "LFCLinear",
    "MaskedConv2d",
    "MaskedLinear",
    "PackedLinear",
    "SubNetwork",
    "SwitchNorm",
    "TopKLinear",
    "Trainer",
    "__version__",
    "lowrank",
    "width",
]

"""Training methods: each one file, each a choice of masks and perturbations (``base.Plan``).

A file of this folder that defines ``Config`` (a ``MethodConfig`` with a ``name``) is a method that
``maskedtrain train --method NAME`` knows; there is no list to edit.
"""

from __future__ import annotations

from maskedtrain.discovery import find_configs
from maskedtrain.methods.ats import ATS
from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.dropout import ElementDropout, NeuronDropout
from maskedtrain.methods.error_feedback import ErrorFeedback
from maskedtrain.methods.extragradient import Extragradient
from maskedtrain.methods.fish import FishMask
from maskedtrain.methods.freeze import LayerFreeze
from maskedtrain.methods.ist import IST
from maskedtrain.methods.mast import MAST, BernoulliSketch, RandKSketch
from maskedtrain.methods.meprop import MeProp
from maskedtrain.methods.mesimp import MeSimp
from maskedtrain.methods.prune import PruneWithFeedback
from maskedtrain.methods.slimmable import Slimmable
from maskedtrain.methods.standard import Standard

__all__ = [
    "ATS",
    "IST",
    "MAST",
    "BernoulliSketch",
    "ElementDropout",
    "ErrorFeedback",
    "Extragradient",
    "FishMask",
    "LayerFreeze",
    "MeProp",
    "MeSimp",
    "Method",
    "MethodConfig",
    "NeuronDropout",
    "Pass",
    "Plan",
    "PruneWithFeedback",
    "RandKSketch",
    "Slimmable",
    "Standard",
    "configs",
]


def configs() -> dict[str, type[MethodConfig]]:
    """Every method's options, by the method's name."""
    return find_configs(__name__, __path__, MethodConfig)

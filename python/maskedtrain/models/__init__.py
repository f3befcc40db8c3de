"""Models whose widths can be sub-networks.

A file of this folder that defines ``Config`` (a ``ModelConfig`` with a ``name``) is a model that
``maskedtrain train --model NAME`` knows; there is no list to edit.
"""

from maskedtrain.discovery import find_configs
from maskedtrain.models.base import ModelConfig
from maskedtrain.models.mlp import MLP
from maskedtrain.models.resnet import ResNet, resnet8, resnet18, resnet34, resnet50
from maskedtrain.models.text_classifier import TextClassifier
from maskedtrain.models.transformer import Transformer
from maskedtrain.models.wide_deep import WideDeep

__all__ = [
    "MLP",
    "ModelConfig",
    "ResNet",
    "TextClassifier",
    "Transformer",
    "WideDeep",
    "configs",
    "resnet8",
    "resnet18",
    "resnet34",
    "resnet50",
]


def configs() -> dict[str, type[ModelConfig]]:
    """Every model's options, by the model's name."""
    return find_configs(__name__, __path__, ModelConfig)

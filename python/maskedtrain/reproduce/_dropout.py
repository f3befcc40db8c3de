"""Dropout of neurons, as partial SGD, measured while a ResNet is trained.

Every neuron (channel) is kept with probability mu by itself: p keeps its rows and columns of the
weights, and x~ = p x, without the factor 1 / mu that ``nn.Dropout`` has. Both gradients are of the
mini-batch which the next step is made with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from maskedtrain.config import TrainConfig
from maskedtrain.data.cifar10 import Config as CIFAR10Config
from maskedtrain.layers import SwitchNorm
from maskedtrain.methods.base import MethodConfig
from maskedtrain.methods.dropout import Config as DropoutConfig
from maskedtrain.models.resnet import BasicBlock, Bottleneck, ResNet
from maskedtrain.models.resnet import Config as ResNetConfig
from maskedtrain.presets import preset
from maskedtrain.reproduce._training import TrainingFigure, train_and_measure
from maskedtrain.theory.criteria import Criteria, measure
from maskedtrain.training.console import Console
from maskedtrain.training.run import Run

__all__ = ["DropoutFigure", "without_batch_norm"]


@dataclass(frozen=True)
class DropoutFigure(TrainingFigure):
    """Options of a figure on dropout."""

    keep: float = 0.8
    """Probability mu of a neuron to be kept."""
    batch_norm: bool = True
    """Train with batch norm; without, each becomes the scale and shift that it has beside it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Which knows the range of its option.
        _ = self.dropout

    @property
    def dropout(self) -> MethodConfig:
        return DropoutConfig(keep=self.keep, draw_seed=self.seed, count="bernoulli", rescale=False)

    def training(
        self,
        label: str,
        method: MethodConfig,
        quantities: Callable[[Criteria], dict[str, float]],
        console: Console,
    ) -> list[dict[str, Any]]:
        """Rows of what is measured between the whole network and that which dropout draws for the
        step, whether or not the training drops anything.
        """

        def measured(run: Run, step: int, loss: Callable[[], Tensor]) -> dict[str, float]:
            (drawn,) = self.dropout.build(run.model).plan(step).passes
            return quantities(measure(run.model, drawn, loss).whole)

        config = replace(self._training(), method=method)
        return train_and_measure(self, label, config, measured, console)

    def _training(self) -> TrainConfig:
        if self.data is None:
            config = preset("digits-resnet8-full")
            # As they come, 8 x 8, they take a quarter of the time.
            config = replace(config, data=replace(cast("Any", config.data), image_size=None))
        else:
            config = preset("cifar10-resnet18-full")
            data = replace(cast(CIFAR10Config, config.data), data=self.data)
            config = replace(config, data=data)
        if self.batch_norm:
            return config
        model = _NormFreeConfig(**asdict(cast(ResNetConfig, config.model)))
        # Nothing bounds the gradients then.
        return replace(config, model=model, optim=replace(config.optim, clip_grad_norm=1.0))


@dataclass(frozen=True)
class _NormFreeConfig(ResNetConfig):
    def build(self, **sizes: Any) -> ResNet:
        return without_batch_norm(super().build(**sizes))


def without_batch_norm(model: ResNet) -> ResNet:
    """Replace every batch norm by its scale and shift, y = w x + b, and initialise anew.

    Convolutions keep the size of what they are given (He initialisation by fan-in), and the last
    scale of each block is 0: blocks begin as their skip connections, without which depth would make
    activations grow.

    Source: Zhang et al., "Fixup Initialization" (ICLR 2019); De and Smith, "Batch Normalization
    Biases Residual Blocks Towards the Identity Function in Deep Networks" (NeurIPS 2020).
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SwitchNorm):
            model.set_submodule(name, _ScaleAndShift(module.num_features))
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
            nn.init.zeros_(last.weight)
    return model


class _ScaleAndShift(SwitchNorm):
    """A batch norm whose statistics stay 0 and 1: it never enters training mode."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=0.0)
        self.eval()

    def train(self, mode: bool = True) -> _ScaleAndShift:
        return super().train(False)

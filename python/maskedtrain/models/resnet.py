"""Residual networks (He et al. 2016) whose every width can be a sub-network's.

Parameter names are torchvision's (``conv1``, ``bn1``, ``layer1.0.conv1`` ..., ``fc``), so its
checkpoints load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from maskedtrain.layers import MaskedConv2d, MaskedLinear, MaskedModule, SwitchNorm
from maskedtrain.layers.base import Copier
from maskedtrain.models.base import ModelConfig
from maskedtrain.widths import Kept, Width, region
from partial_kernels import Mask

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "Config",
    "ResNet",
    "Stage",
    "resnet8",
    "resnet18",
    "resnet34",
    "resnet50",
]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = MaskedConv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = SwitchNorm(width)
        self.conv2 = MaskedConv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = SwitchNorm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions around a skip connection."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = MaskedConv2d(inputs, width, 1, bias=False)
        self.bn1 = SwitchNorm(width)
        self.conv2 = MaskedConv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = SwitchNorm(width)
        self.conv3 = MaskedConv2d(width, outputs, 1, bias=False)
        self.bn3 = SwitchNorm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    conv = MaskedConv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(conv, SwitchNorm(outputs))


class Stage(MaskedModule, nn.Sequential):
    """Residual blocks in a row.

    A sub-network that has every parameter of a block outside skips the block where its skip
    connection is the identity: the block is not called, costs nothing and keeps its running
    statistics, and no extracted module has it.
    """

    def droppable(self) -> dict[str, nn.Module]:
        return {name: block for name, block in self.named_children() if block.downsample is None}

    def forward(self, input: Tensor) -> Tensor:
        for block in self._kept(self.active.masks if self.active else {}).values():
            input = block(input)
        return input

    def _kept(self, masks: Mapping[str, Mask | None]) -> dict[str, nn.Module]:
        return {name: block for name, block in self.named_children() if name not in masks}

    def plain(self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier) -> nn.Sequential:
        plain = nn.Sequential()
        for name, block in self._kept(masks).items():
            plain.add_module(name, copier.module(block))
        plain.training = self.training
        return plain


class ResNet(nn.Module):
    """Stem, stages of residual blocks (each but the first halves the resolution), mean, linear
    classifier.

    Args:
        block: BasicBlock or Bottleneck.
        blocks: number of blocks of each stage.
        num_classes: outputs of the classifier.
        stem: "cifar" (3x3 convolution) for images of about 32 pixels, "imagenet" (7x7 with stride
            2, then max pooling) for about 224.
        in_channels: of the images.
        width: channels of the first stage; each further stage has twice its predecessor's.
    """

    ist_blocks: ClassVar[tuple[str, ...]] = ("layer3.*",)
    """Blocks that independent subnet training deals out, as patterns."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        *,
        num_classes: int = 10,
        stem: str = "cifar",
        in_channels: int = 3,
        width: int = 64,
    ) -> None:
        super().__init__()
        if stem == "cifar":
            self.conv1 = MaskedConv2d(in_channels, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        elif stem == "imagenet":
            self.conv1 = MaskedConv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            raise ValueError(f'stem must be "cifar" or "imagenet", got {stem!r}')
        self.bn1 = SwitchNorm(width)
        self.relu = nn.ReLU(inplace=True)
        channels = width
        self.stages: list[str] = []
        for stage, count in enumerate(blocks):
            layers: list[nn.Module] = []
            for i in range(count):
                stride = 2 if i == 0 and stage > 0 else 1
                layers.append(block(channels, width << stage, stride))
                channels = (width << stage) * block.expansion
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], Stage(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = MaskedLinear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def width_masks(self, kept: Kept) -> dict[str, Mask]:
        """Masks of a narrower network; images and classes stay whole.

        The widths are ``layer1``, ``layer2`` ..., of the sums along each stage's skip connections,
        ``stem`` where the first stage does not share its width with the stem, and within the blocks
        those of their convolutions, such as ``layer1.0.conv1``.
        """
        masks: dict[str, Mask] = {}

        def layer(conv: str, norm: str, rows: Width, cols: Width) -> Width:
            masks[f"{conv}.weight"] = region(rows, cols)
            masks[f"{norm}.weight"] = region(rows)
            return rows

        first = self.get_submodule("layer1.0")
        stem = "layer1" if first.downsample is None else "stem"
        cols = layer("conv1", "bn1", kept(stem, self.conv1.out_channels), None)
        for stage in self.stages:
            for name, block in self.get_submodule(stage).named_children():
                prefix = f"{stage}.{name}"
                convs = [n for n, m in block.named_children() if isinstance(m, MaskedConv2d)]
                # The last convolution is added to the skip connection: it has the stage's width.
                rows = kept(stage, getattr(block, convs[-1]).out_channels)
                if block.downsample is not None:
                    layer(f"{prefix}.downsample.0", f"{prefix}.downsample.1", rows, cols)
                for conv in convs:
                    width = f"{prefix}.{conv}"
                    inner = conv != convs[-1]
                    count = kept(width, getattr(block, conv).out_channels) if inner else rows
                    cols = layer(width, width.replace("conv", "bn"), count, cols)
        masks["fc.weight"] = region(None, cols)
        return masks


def resnet8(**options: object) -> ResNet:
    """Three stages of one BasicBlock each: small enough to train in seconds on a CPU."""
    return ResNet(BasicBlock, (1, 1, 1), **options)  # pyright: ignore[reportArgumentType]


def resnet18(**options: object) -> ResNet:
    """ResNet-18; options are those of ``ResNet``."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)  # pyright: ignore[reportArgumentType]


def resnet34(**options: object) -> ResNet:
    """ResNet-34; options are those of ``ResNet``."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)  # pyright: ignore[reportArgumentType]


def resnet50(**options: object) -> ResNet:
    """ResNet-50 (bottleneck blocks); options are those of ``ResNet``."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Config(ModelConfig):
    """A residual network."""

    name = "resnet"
    task = "images"

    depth: Literal[8, 18, 34, 50] = 18
    """Number of layers."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers: cifar for images of about 32 pixels, imagenet for about 224."""
    width: int = 64
    """Channels of the first stage; each further stage has twice as many."""

    def build(
        self, *, in_channels: int, num_classes: int, image_size: tuple[int, int] | None = None
    ) -> ResNet:
        # Of any image_size: the last layer takes a mean over positions.
        make = {8: resnet8, 18: resnet18, 34: resnet34, 50: resnet50}[self.depth]
        return make(
            num_classes=num_classes, stem=self.stem, in_channels=in_channels, width=self.width
        )

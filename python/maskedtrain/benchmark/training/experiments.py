"""What is compared: super-networks with their cores, the methods that train them, and the FLOPs of
these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskedtrain.config import TrainConfig, unknown_name
from maskedtrain.methods import ATS, Method, Plan, Slimmable, Standard
from maskedtrain.methods.cores import CoreKind, core_chain
from maskedtrain.presets import preset
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.training.loop import Batch

__all__ = ["EXPERIMENTS", "Experiment", "Flops", "epoch_flops", "round_of", "step_flops"]

# Steps within which every plan of a method has its turn.
_LONGEST_ROUND = 64
# Ids below are those of special tokens.
_FIRST_WORD = 4


@dataclass(frozen=True)
class Flops:
    """FLOPs (2 per multiply-add), forward alone and with the backward."""

    forward: float
    training: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.training + other.training)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.training * factor)


@dataclass(frozen=True)
class Experiment:
    """A super-network with cores, and data of the shape that they would be trained on.

    Methods are known by name: ``standard`` trains the super-network, ``core`` (``core2`` ...) a
    core that is a network of its own, ``separate`` all of these one after the other, ``ats`` the
    networks in turn, ``slimmable`` all of them at every step, and ``sandwich``, where there are at
    least two cores, the largest network, the smallest and one drawn from the others.
    """

    title: str
    config: TrainConfig
    """Model, optimizer, loss and layout are these."""
    sizes: Mapping[str, int]
    """What the model is told of the data."""
    sample: tuple[int, ...]
    """Shape of an image, or of a sentence on either side: its tokens."""
    samples: int
    """Images, or pairs of sentences, of an epoch."""
    core: CoreKind
    ratios: tuple[float, ...]
    """Widths or ranks of the cores, the largest first."""
    batch_sizes: Mapping[str, int]
    """Samples of a step, by type of device."""

    @property
    def cores(self) -> dict[str, float]:
        """Ratios of the cores by name."""
        names = ("core" if i == 1 else f"core{i}" for i in range(1, len(self.ratios) + 1))
        return dict(zip(names, self.ratios, strict=True))

    @property
    def alone(self) -> tuple[str, ...]:
        """The methods that train one network."""
        return ("standard", *self.cores)

    @property
    def methods(self) -> tuple[str, ...]:
        """All of them."""
        sandwich = ("sandwich",) if len(self.ratios) > 1 else ()
        return (*self.alone, "separate", "ats", "slimmable", *sandwich)

    def trains(self, method: str) -> str:
        """What a step of the method trains, in words."""
        named = ["full", *(f"{name} ({ratio:g})" for name, ratio in self.cores.items())]
        if method in self.alone:
            return named[self.alone.index(method)]
        if method == "sandwich":
            return f"{named[0]}, {named[-1]} and one of {', '.join(named[1:-1])}"
        how = {"separate": "each by itself", "ats": "in turn", "slimmable": "all at every step"}
        return f"{', '.join(named)}: {how[method]}"

    def batch_size(self, device: torch.device, given: int | None = None) -> int:
        """Samples of a step on such a device: those given, where there are any.

        Raises:
            ValueError: it is less than one.
        """
        if given is None:
            return self.batch_sizes.get(device.type, self.batch_sizes["cpu"])
        if given < 1:
            raise ValueError(f"batch_size must be >= 1, got {given}")
        return given

    def method(self, name: str) -> Method:
        """One of the methods, of new networks; ``separate`` is several.

        Raises:
            ValueError: there is none of this name.
        """
        if name == "separate" or name not in self.methods:
            raise unknown_name("method", name, [m for m in self.methods if m != "separate"])
        model = self.config.model.build(**self.sizes)
        if name == "standard":
            return Standard(SubNetwork.full(model))
        subnets = core_chain(model, self.core, self.ratios, round_to=16)
        if name in self.cores:
            extracted = subnets[self.alone.index(name)].extract()
            return Standard(SubNetwork.full(extracted, name=name))
        if name == "ats":
            return ATS(subnets)
        return Slimmable(subnets, sandwich=1 if name == "sandwich" else None)

    def batch(self, batch_size: int, device: torch.device) -> Batch:
        """Random samples."""
        shape = (batch_size, *self.sample)
        if self.config.model.task == "images":
            images = torch.randn(shape, device=device)
            if self.config.run.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            return images, torch.randint(self.sizes["num_classes"], (batch_size,), device=device)
        source, *target = (
            torch.randint(_FIRST_WORD, self.sizes[f"{side}_vocab"], shape, device=device)
            for side in ("source", "target", "target")
        )
        return (source, target[0]), target[1]

    def placed(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model on the device, in the configuration's layout."""
        model.to(device)
        if self.config.run.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return model


def round_of(method: Method) -> dict[Plan, int]:
    """The method's plans, each with the first step of it. All must come up equally often in the
    long run, as they do here: a step by each of them is a fair sample of the method's steps.
    """
    found: dict[Plan, int] = {}
    for step in range(_LONGEST_ROUND):
        found.setdefault(method.plan(step), step)
    return found


def step_flops(experiment: Experiment, method: str, *, batch_size: int) -> Flops:
    """Mean FLOPs of a step of the method; of ``separate`` those of a step of every network.

    They are counted by ``SubNetwork.flops`` and ``Plan.flops``: nothing is computed. Products of a
    low-rank layer's factors with each other depend on no sample, the rest goes with their number.
    """
    if method == "separate":
        each = (step_flops(experiment, m, batch_size=batch_size) for m in experiment.alone)
        return sum(each, Flops(0, 0))
    meta = torch.device("meta")
    with meta:
        plans = round_of(experiment.method(method))
        inputs, _ = experiment.batch(batch_size, meta)
    given: tuple[Tensor, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
    passes = [item for plan in plans for item in plan.every_pass]
    forward = sum(item.subnet.flops(*given) for item in passes)
    training = sum(plan.flops(*given) for plan in plans)
    return Flops(forward, training) * (1 / len(plans))


def epoch_flops(experiment: Experiment, method: str, *, batch_size: int | None = None) -> Flops:
    """FLOPs of training on every sample once, at this batch size, or at the one for CPUs.

    The paper's accounting is ``forward``: of 45,000 images each is seen by all networks in
    slimmable training, and by one of them in an epoch of ATS.

    Example:
        >>> epoch_flops(EXPERIMENTS["cifar10-resnet18"], "ats").forward / 1e12
        31.26...
    """
    size = experiment.batch_size(torch.device("cpu"), batch_size)
    return step_flops(experiment, method, batch_size=size) * (experiment.samples / size)


def _cifar10(title: str, *ratios: float) -> Experiment:
    return Experiment(
        title=f"ResNet-18 on CIFAR-10, {title}",
        config=preset("cifar10-resnet18-ats"),
        sizes={"in_channels": 3, "num_classes": 10},
        sample=(3, 32, 32),
        samples=45_000,
        core="width",
        ratios=ratios,
        batch_sizes={"cpu": 16, "cuda": 512},
    )


def _multi30k(title: str, ratio: float) -> Experiment:
    # Vocabularies and mean lengths are those that the preset has of the data.
    return Experiment(
        title=f"Transformer on Multi30k, {title}",
        config=preset("multi30k-lowrank"),
        sizes={"source_vocab": 5765, "target_vocab": 4564},
        sample=(16,),
        samples=29_000,
        core="lowrank",
        ratios=(ratio,),
        batch_sizes={"cpu": 128, "cuda": 256},
    )


def _iwslt14(title: str, ratio: float) -> Experiment:
    # Vocabularies and mean lengths are those of fairseq's preparation.
    return Experiment(
        title=f"Transformer on IWSLT14, {title}",
        config=preset("iwslt14-lowrank"),
        sizes={"source_vocab": 8848, "target_vocab": 6632},
        sample=(25,),
        samples=160_239,
        core="lowrank",
        ratios=(ratio,),
        batch_sizes={"cpu": 64, "cuda": 480},
    )


EXPERIMENTS: dict[str, Experiment] = {
    "digits-resnet8": Experiment(
        title="ResNet-8 on digits, half-width core",
        config=preset("digits-resnet8-ats"),
        sizes={"in_channels": 1, "num_classes": 10},
        sample=(1, 16, 16),
        samples=1295,
        core="width",
        ratios=(0.5,),
        batch_sizes={"cpu": 64},
    ),
    "cifar10-resnet18": _cifar10("half-width core", 0.5),
    "cifar10-resnet18-widths": _cifar10("four widths", 0.75, 0.5, 0.25),
    "multi30k-lowrank32": _multi30k("low-rank core, 1/32", 1 / 32),
    "multi30k-lowrank4": _multi30k("low-rank core, 1/4", 1 / 4),
    "iwslt14-lowrank32": _iwslt14("low-rank core, 1/32", 1 / 32),
    "iwslt14-lowrank4": _iwslt14("low-rank core, 1/4", 1 / 4),
}
"""The compared ones, by name."""

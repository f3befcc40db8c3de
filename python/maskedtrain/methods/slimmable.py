"""Slimmable training (Yu et al. 2019): every width at every step, one update."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.cores import CoreKind, core_chain
from maskedtrain.subnetwork import SubNetwork

__all__ = ["Config", "Slimmable"]


class Slimmable(Method):
    """Add up the gradients of several networks on the same mini-batch, then make one update.

    The baseline that ATS is measured against: a step costs a forward and backward of every network.
    With the sandwich rule these are the largest, the smallest, and some of the others.

    Args:
        subnets: the networks.
        sandwich: how many of the others a step trains, drawn anew at each; all where not given.
        seed: of the draws, which depend on it and on the step alone.

    Source: Yu et al., "Slimmable Neural Networks" (ICLR 2019); the sandwich rule, without its
    distillation, Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques"
    (ICCV 2019).
    """

    def __init__(
        self, subnets: Sequence[SubNetwork], *, sandwich: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(subnets)
        by_size = sorted(subnets, key=SubNetwork.numel)
        self._ends, self._others = [by_size[-1], *by_size[:-1][:1]], by_size[1:-1]
        if sandwich is not None and not 0 <= sandwich <= len(self._others):
            raise ValueError(
                f"sandwich must be from 0 to the {len(self._others)} networks between the largest "
                f"and the smallest, got {sandwich}"
            )
        self._sandwich, self._seed = sandwich, seed
        self._plans: dict[tuple[str, ...], Plan] = {}

    def plan(self, step: int) -> Plan:
        chosen = list(self.subnets.values())
        if self._sandwich is not None:
            drawn = random.Random(f"{self._seed} {step}").sample(self._others, self._sandwich)
            chosen = [*self._ends, *drawn]
        names = tuple(sorted(subnet.name for subnet in chosen))
        if names not in self._plans:
            passes = tuple(Pass(subnet) for subnet in chosen)
            self._plans[names] = Plan(passes, update=SubNetwork.union(*chosen))
        return self._plans[names]


@dataclass(frozen=True)
class Config(MethodConfig):
    """Slimmable training of the super-network and its cores."""

    name = "slimmable"

    core: CoreKind = "width"
    """What the cores are: narrower networks, low-rank factors of the layers the model names, or
    (one core) the part that it names."""
    ratios: tuple[float, ...] = (0.5,)
    """Widths or ranks of the cores, as shares of the whole; called core, core2, core3 ... A part
    has none."""
    round_to: int = 16
    """Widths become multiples of this where the layer allows."""
    sandwich: int | None = None
    """Train the largest network, the smallest and so many of the others, drawn at each step; all
    where not given."""

    def build(self, model: nn.Module) -> Slimmable:
        subnets = core_chain(model, self.core, self.ratios, round_to=self.round_to)
        return Slimmable(subnets, sandwich=self.sandwich)

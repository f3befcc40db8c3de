"""Slimmable training (Yu et al. 2019): every width at every step, one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.cores import CoreKind, core_chain
from maskedtrain.subnetwork import SubNetwork

__all__ = ["Config", "Slimmable"]


class Slimmable(Method):
    """Add up the gradients of all networks on the same mini-batch, then make one update.

    The baseline that ATS is measured against: a step costs a forward and backward of every network.
    """

    def __init__(self, subnets: Sequence[SubNetwork]) -> None:
        super().__init__(subnets)
        passes = tuple(Pass(subnet) for subnet in subnets)
        self._plan = Plan(passes, update=SubNetwork.union(*subnets))

    def plan(self, step: int) -> Plan:
        return self._plan


@dataclass(frozen=True)
class Config(MethodConfig):
    """Slimmable training of the super-network and its cores."""

    name = "slimmable"

    core: CoreKind = "width"
    """What the cores are: narrower networks, or low-rank factors of the layers the model names."""
    ratios: tuple[float, ...] = (0.5,)
    """Widths or ranks of the cores, as shares of the whole; called core, core2, core3 ..."""
    round_to: int = 16
    """Widths become multiples of this where the layer allows."""

    def build(self, model: nn.Module) -> Slimmable:
        return Slimmable(core_chain(model, self.core, self.ratios, round_to=self.round_to))

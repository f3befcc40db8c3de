"""Standard training of one network: p_t = 1 for it, no perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.cores import CoreKind, make_core
from maskedtrain.subnetwork import SubNetwork

__all__ = ["Config", "Standard"]


class Standard(Method):
    """Train one network by itself: the super-network, or a core alone (the baselines of ATS).

    Cost of a step: one forward and backward of that network.
    """

    def __init__(self, subnet: SubNetwork) -> None:
        super().__init__([subnet])
        self._plan = Plan((Pass(subnet),), update=subnet)

    def plan(self, step: int) -> Plan:
        return self._plan


@dataclass(frozen=True)
class Config(MethodConfig):
    """Standard training."""

    name = "standard"

    network: Literal["full", "core"] = "full"
    """The network to train: the whole super-network, or its core alone."""
    core: CoreKind = "width"
    """What the core is: a narrower network, low-rank factors of the layers the model names, or the
    part that it names."""
    ratio: float = 0.5
    """Width or rank of the core, as a share of the whole. A part has none."""
    round_to: int = 16
    """Widths become multiples of this where the layer allows."""

    def build(self, model: nn.Module) -> Standard:
        if self.network == "full":
            return Standard(SubNetwork.full(model))
        return Standard(make_core(model, self.core, self.ratio, round_to=self.round_to))

"""The Alternating Training Scheme (ATS): a super-network and its cores in turn, one a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import nn

from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.cores import CoreKind, core_chain
from maskedtrain.subnetwork import SubNetwork

__all__ = ["ATS", "Config"]


class ATS(Method):
    """Alternate between nested sub-networks: step t trains ``subnets[t % len(subnets)]`` and
    nothing else.

    With (super, core) this is Algorithm 2 of "Masked Training of Neural Networks with Partial
    Gradients" (AISTATS 2022): p_t = 1 at even steps, p_t = core and the gradient of f(p * x) at odd
    ones, one mini-batch a step. More than two nested networks make a hierarchy. A core step costs
    the core's forward and backward; parameters, momentum and decay outside the core are not
    touched.

    Args:
        subnets: the networks, in the order of the cycle; one must hold all others, and any two must
            be nested.
        lr_scales: step-size factor by name of the network; 1 where not named, as in the paper.
    """

    def __init__(
        self, subnets: Sequence[SubNetwork], *, lr_scales: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(subnets)
        if len(subnets) < 2:
            raise ValueError(f"ATS alternates between at least 2 networks, got {len(subnets)}")
        for first, second in combinations(subnets, 2):
            if not (first.issubset(second) or second.issubset(first)):
                raise ValueError(f"ATS needs nested networks; {first.name} and {second.name} cross")
        scales = dict(lr_scales or {})
        for name, scale in scales.items():
            if name not in self.subnets:
                raise ValueError(f"lr_scales names {name!r}; the networks are {list(self.subnets)}")
            if not scale > 0:
                raise ValueError(f"the lr_scale of {name!r} must be > 0, got {scale}")
        self._plans = [
            Plan((Pass(subnet),), update=subnet, lr_scale=scales.get(subnet.name, 1.0))
            for subnet in subnets
        ]

    def plan(self, step: int) -> Plan:
        return self._plans[step % len(self._plans)]


@dataclass(frozen=True)
class Config(MethodConfig):
    """Alternating training of the super-network and its cores."""

    name = "ats"

    core: CoreKind = "width"
    """What the cores are: narrower networks, low-rank factors of the layers the model names, or
    (one core) the part that it names."""
    ratios: tuple[float, ...] = (0.5,)
    """Widths or ranks of the cores, as shares of the whole; called core, core2, core3 ... A part
    has none."""
    round_to: int = 16
    """Widths become multiples of this where the layer allows."""
    core_lr_scale: float = 1.0
    """Step-size factor of the cores' steps."""

    def build(self, model: nn.Module) -> ATS:
        subnets = core_chain(model, self.core, self.ratios, round_to=self.round_to)
        scales = {subnet.name: self.core_lr_scale for subnet in subnets[1:]}
        return ATS(subnets, lr_scales=scales)

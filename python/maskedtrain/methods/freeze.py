"""Layer-wise training: some layers at a time, the others frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.patterns import matching_names
from maskedtrain.subnetwork import SubNetwork

__all__ = ["Config", "LayerFreeze"]


class LayerFreeze(Method):
    """Run the whole network, train the parameters of one stage: p_t is 1 on these, 0 elsewhere.

    Frozen parameters keep their values, decay and momentum included, and cost no weight gradient;
    below the lowest layer that is trained there is no backward at all. Buffers (running statistics)
    follow the forward passes, frozen or not.

    Args:
        model: the network.
        stages: for each stage, patterns (``fnmatch``) of the parameters it trains.
        steps: for each stage, how many steps it lasts; the last one has no end, and the stages
            before it must have.
        cycle: begin again after the last stage, which then needs a number of steps, too.

    Raises:
        ValueError: a pattern matches no parameter, or the lists do not fit.

    Source: "Layer-wise training" as partial SGD, section 3 of "Masked Training of Neural Networks
    with Partial Gradients" (AISTATS 2022).
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Sequence[str]],
        steps: Sequence[int],
        *,
        cycle: bool = False,
    ) -> None:
        full = SubNetwork.full(model)
        super().__init__([full])
        wanted = len(stages) - (not cycle)
        if not stages or len(steps) not in {wanted, len(stages)} or any(s < 1 for s in steps):
            raise ValueError(
                f"steps must be a number >= 1 for each of the {wanted} stages that end, "
                f"got {list(steps)}"
            )
        self._plans = [Plan((Pass(full),), update=_trained(model, s)) for s in stages]
        self._steps, self._cycle = list(steps), cycle

    def plan(self, step: int) -> Plan:
        if self._cycle:
            step %= sum(self._steps)
        for plan, count in zip(self._plans, self._steps, strict=False):
            if step < count:
                return plan
            step -= count
        return self._plans[-1]


def _trained(model: nn.Module, patterns: Sequence[str]) -> SubNetwork:
    """The parameters that a pattern matches."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    trained = set(matching_names("stages", patterns, names, "parameter"))
    outside = {name: None for name in names if name not in trained}
    return SubNetwork(model, outside, name="+".join(patterns))


@dataclass(frozen=True)
class Config(MethodConfig):
    """Layer-wise training: some layers at a time, the others frozen."""

    name = "freeze"

    stages: tuple[str, ...] = ("*",)
    """What each stage trains: patterns of parameters, joined by commas."""
    steps: tuple[int, ...] = ()
    """How many steps each stage lasts; the last may have no end."""
    cycle: bool = False
    """Begin again after the last stage."""

    def build(self, model: nn.Module) -> LayerFreeze:
        stages = [stage.split(",") for stage in self.stages]
        return LayerFreeze(model, stages, self.steps, cycle=self.cycle)

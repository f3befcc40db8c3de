"""Dynamic pruning with feedback: the gradient of the pruned network trains the dense one."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.largest import largest
from maskedtrain.patterns import matching_names
from maskedtrain.subnetwork import SubNetwork
from partial_kernels import Element, Mask

__all__ = ["Config", "PruneWithFeedback", "Scope"]

Scope = Literal["global", "layer"]


class PruneWithFeedback(Method):
    """Update all of x by the gradient at ``p x``, p the mask of the largest magnitudes::

        x_{t+1} = x_t - lr g(p_t x_t),      dx_t = -(1 - p_t) x_t

    What is pruned goes on being trained, so that it comes back where that was a mistake: its
    gradient is that of the pruned network's loss, as if it were there with the value 0. Weight
    decay and momentum are those of x, pruned or not. Everywhere else the parameters hold x, which
    comes back bit for bit from each pass.

    p is drawn at every ``refresh_every``-th step from the weights as they are then, of the sparsity
    s_t of that step (Zhu & Gupta's cubic schedule; s from the first step on without a ramp)::

        s_t = s (1 - (1 - min(t / ramp_steps, 1))^3)

    The reported loss is that of the pruned network. ``subnets["pruned"]`` is that network, of the
    mask that is in force, as one object throughout; extract it when training ends.
    ``subnets["full"]`` is x itself, which no pass runs.

    A step costs a dense forward and backward, two copies of the weights and the memory of one.

    Args:
        model: the network.
        sparsity: s, the share of the prunable weights that is pruned, in [0, 1):
            ``round(s_t N)`` of N elements, ties by their order.
        refresh_every: steps from one mask to the next, >= 1.
        ramp_steps: steps in which the sparsity rises from 0, >= 0; it is s at the first refresh
            after them.
        layers: patterns (``fnmatch``) of the names of modules; of these, parameters that are
            trained and have two dimensions or more are pruned. Biases and norms never are.
        exclude: patterns of modules that stay whole. The output layer is pruned like the others
            unless it is named here.
        scope: "global" compares magnitudes over all prunable weights; "layer" prunes the same
            share of each.

    Raises:
        ValueError: an option is out of range, or a pattern matches no weight that could be pruned.
        TypeError: a module cannot compute with a mask (recurrent ones).

    Source: Lin et al., "Dynamic Model Pruning with Feedback" (ICLR 2020), algorithm 1; the ramp:
    Zhu & Gupta, "To Prune, or Not to Prune" (arXiv 1710.01878), section 3.

    Example:
        >>> method = PruneWithFeedback(model, 0.9, refresh_every=16, ramp_steps=1000)
        >>> for report in Trainer(model, method, optimizer, loss_fn).steps(batches, until=2000): ...
        >>> small = method.subnets["pruned"].extract()
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        refresh_every: int,
        ramp_steps: int = 0,
        layers: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        scope: Scope = "global",
    ) -> None:
        _check(sparsity, refresh_every, ramp_steps, scope)
        self.model, self.sparsity = model, sparsity
        self.refresh_every, self.ramp_steps, self.scope = refresh_every, ramp_steps, scope
        self._weights = _prunable(model, layers, exclude)
        self._pruned = SubNetwork(model, self._masks(0), name="pruned")
        with self._pruned.activate():
            pass  # Modules that cannot be masked say so now.
        full = SubNetwork.full(model)
        super().__init__([self._pruned, full])
        # Of a mask drawn at step t, t // refresh_every; the first step draws in any case.
        self._period = -1
        # Its weights are moved to p x: a mask would stop the gradient of what is pruned.
        self._pass, self._update = SubNetwork.full(model, name="pruned"), full

    def plan(self, step: int) -> Plan:
        moved = partial(self._moved, step)
        return Plan((Pass(self._pass, perturbed=moved),), update=self._update)

    def sparsity_at(self, step: int) -> float:
        """s_t: the share that a mask drawn at this step prunes."""
        if step >= self.ramp_steps:
            return self.sparsity
        return self.sparsity * (1 - (1 - step / self.ramp_steps) ** 3)

    @contextmanager
    def _moved(self, step: int) -> Generator[None]:
        """Within it the weights are p x."""
        self._refresh(step)
        before = [weight.detach().clone() for weight in self._weights]
        try:
            with torch.no_grad():
                for weight in self._weights:
                    mask = cast("Mask", self._pruned.mask_of(weight))
                    weight.copy_(mask.restrict(weight))
            yield
        finally:
            with torch.no_grad():
                for weight, held in zip(self._weights, before, strict=True):
                    weight.copy_(held)

    def _refresh(self, step: int) -> None:
        # Here, not after the step before: a loop that only runs plans prunes, too.
        period = step // self.refresh_every
        if period != self._period:
            self._pruned.change(self._masks(period * self.refresh_every))
            self._period = period

    def _masks(self, step: int) -> dict[str, Mask]:
        """The masks of the weights as they are, by name."""
        groups = [self._weights] if self.scope == "global" else [[w] for w in self._weights]
        masks: dict[nn.Parameter, Mask] = {}
        for group in groups:
            total = sum(weight.numel() for weight in group)
            kept = largest(group, total - round(self.sparsity_at(step) * total))
            for weight, mask in zip(group, kept, strict=True):
                masks[weight] = Element(mask.dense(weight.shape, weight.device))
        return {name: masks[weight] for name, weight in self._named()}

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The prunable weights by all of their names."""
        weights = set(self._weights)
        named = self.model.named_parameters(remove_duplicate=False)
        return [(name, parameter) for name, parameter in named if parameter in weights]

    def state_dict(self) -> dict[str, Any]:
        masks = {name: cast("Mask", self._pruned.masks[name]).state() for name, _ in self._named()}
        return {"period": self._period, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        named = dict(self._named())
        if set(state) != {"period", "masks"} or set(state["masks"]) != set(named):
            raise ValueError(
                f"the state must be a period and masks of {sorted(named)}, "
                f"got {sorted(state)} with {sorted(state.get('masks', ()))}"
            )
        masks: dict[str, Mask] = {}
        for name, weight in named.items():
            mask = Mask.from_state(state["masks"][name])
            masks[name] = Element(mask.dense(weight.shape, weight.device))
        self._pruned.change(masks)
        self._period = state["period"]


def _check(sparsity: float, refresh_every: int, ramp_steps: int, scope: str) -> None:
    """Raise ValueError if an option is out of range."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if refresh_every < 1:
        raise ValueError(f"refresh_every must be >= 1, got {refresh_every}")
    if ramp_steps < 0:
        raise ValueError(f"ramp_steps must be >= 0, got {ramp_steps}")
    if scope not in ("global", "layer"):
        raise ValueError(f'scope must be "global" or "layer", got {scope!r}')


def _prunable(
    model: nn.Module, layers: Sequence[str], exclude: Sequence[str]
) -> list[nn.Parameter]:
    """The weights to prune, each once."""
    named = [
        (name.rpartition(".")[0], parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and parameter.ndim >= 2
    ]
    what = "module with a trained parameter of two dimensions or more"

    def matched(option: str, patterns: Sequence[str]) -> set[nn.Parameter]:
        names = set(matching_names(option, patterns, dict(named), what))
        return {parameter for layer, parameter in named if layer in names}

    chosen = matched("layers", layers)
    if exclude:
        chosen -= matched("exclude", exclude)
    if not chosen:
        raise ValueError(f"layers {list(layers)} without {list(exclude)} leave nothing to prune")
    # In the model's order, which settles ties.
    return [parameter for parameter in model.parameters() if parameter in chosen]


@dataclass(frozen=True)
class Config(MethodConfig):
    """Dynamic pruning with feedback: the pruned network's gradient trains all weights."""

    name = "prune"

    sparsity: float = 0.9
    """Share of the weights that is pruned."""
    refresh_every: int = 16
    """Steps from one mask to the next."""
    ramp_steps: int = 0
    """Steps in which the sparsity rises from 0 to its target."""
    layers: tuple[str, ...] = ("*",)
    """Patterns of the names of the layers to prune."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that stay whole."""
    scope: Scope = "global"
    """Compare magnitudes over all layers, or prune the same share of each."""

    def __post_init__(self) -> None:
        _check(self.sparsity, self.refresh_every, self.ramp_steps, self.scope)

    def build(self, model: nn.Module) -> PruneWithFeedback:
        return PruneWithFeedback(
            model,
            self.sparsity,
            refresh_every=self.refresh_every,
            ramp_steps=self.ramp_steps,
            layers=self.layers,
            exclude=self.exclude,
            scope=self.scope,
        )

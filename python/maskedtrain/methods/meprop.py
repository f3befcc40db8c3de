"""meProp: back-propagation of the largest elements alone, and top-k updates of the exact
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from maskedtrain.layers import MaskedLinear, TopKLinear
from maskedtrain.layers.topk import BiasGrad, Per, WeightGrad, kept_count
from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.largest import largest, only
from maskedtrain.patterns import kind_of, linears_of, matching_linears
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.surgery import check_layer, leave_fast_path
from partial_kernels import Index

__all__ = ["Config", "MeProp", "TopKConfig", "chosen_layers"]

Variant = Literal["backward", "true"]


class MeProp(Method):
    """Train by the k largest elements of a gradient; one full pass a step.

    ``variant="backward"`` is meProp: the layers become ``TopKLinear`` in place (the same module
    objects, with the same parameters, hooks and ``state_dict``), whose backward costs k / O of the
    dense one's. The optimizer updates everything; what was not kept has a gradient of 0. On digits,
    with k = 5 %, SGD with momentum trains as well as by the whole gradient, and AdamW much worse
    with per="row".

    ``variant="true"`` is what "Masked Training of Neural Networks with Partial Gradients" (AISTATS
    2022) analyses in its place: the gradient g is exact, and p_t keeps the k of all d parameters
    with the largest ``|g|``, so that ``c_norm = ||g|| / ||p_t * g|| <= sqrt(d / k)``. It leaves
    everything outside p_t alone, momentum and decay included, and saves no FLOPs. Elements count
    by their absolute value alone, ties by their order; a step waits for the device. In a stock
    loop, ``plan = method.after_backward(step, plan)`` before the optimizer's step draws the mask.

    Args:
        model: the network.
        k: an int is how many of a layer's outputs are kept ("true": of the model's parameters), a
            float in (0, 1] their share.
        variant: "backward" or "true".
        per: "row" keeps k outputs for each example, "batch" the same k for all.
        layers: patterns of module names, as in ``fnmatch``; what they match beside ``nn.Linear``
            and ``MaskedLinear`` stays as it is.
        exclude: patterns of layers that stay; None is the output layer, the last linear layer of
            ``model.named_modules()``, which is the order layers were made in. The authors leave it
            as it is, too.
        weight_grad: of ``TopKLinear``: with "rows" (which needs per="batch") gradients of weights
            are row-sparse, for optimizers of torch.optim that take them. ``after_backward``, which
            ``Trainer`` calls, makes them dense for a masked optimizer and has it update the rows
            that were kept alone: without decay and momentum for the others, at k / O of the cost.
        bias_grad: of ``TopKLinear``.

    Raises:
        ValueError: an option is out of range, a pattern matches no linear layer, or no layer is
            left. Nothing has changed then.
        TypeError: a layer computes its weight from other parameters, or has a forward of its own.

    Source: Sun et al., "meProp: Sparsified Back Propagation for Accelerated Deep Learning with
    Reduced Overfitting" (ICML 2017).

    Example:
        >>> method = MeProp(model, k=0.05, per="batch")
    """

    def __init__(
        self,
        model: nn.Module,
        k: int | float = 0.05,
        *,
        variant: Variant = "backward",
        per: Per = "row",
        layers: Sequence[str] = ("*",),
        exclude: Sequence[str] | None = None,
        weight_grad: WeightGrad = "full",
        bias_grad: BiasGrad = "full",
    ) -> None:
        if variant not in ("backward", "true"):
            raise ValueError(f'variant must be "backward" or "true", got {variant!r}')
        kept_count(k, 1)
        options: dict[str, Any] = {"per": per, "weight_grad": weight_grad, "bias_grad": bias_grad}
        if variant == "true":
            unused = {**options, "layers": tuple(layers), "exclude": exclude}
            given = [name for name, value in unused.items() if value != _DEFAULTS[name]]
            if given:
                raise ValueError(f'variant="true" back-propagates all: it has no {given[0]}')
        else:
            _convert(model, chosen_layers(model, layers, exclude), k, options)
        self.full = SubNetwork.full(model)
        super().__init__([self.full])
        self.k, self.variant = k, variant
        self._rows = weight_grad == "rows"
        self._plan = Plan((Pass(self.full),), update=self.full)

    def plan(self, step: int) -> Plan:
        return self._plan

    def after_backward(self, step: int, plan: Plan) -> Plan:
        if self.variant == "true":
            return replace(plan, update=_largest(plan.update, self.k))
        if self._rows:
            return replace(plan, update=_kept_rows(plan.update))
        return plan


_DEFAULTS = {
    "per": "row",
    "weight_grad": "full",
    "bias_grad": "full",
    "layers": ("*",),
    "exclude": None,
}


def chosen_layers(
    model: nn.Module, patterns: Sequence[str], exclude: Sequence[str] | None
) -> list[nn.Linear]:
    """The layers to convert, each once."""
    for name, given in (("layers", patterns), ("exclude", exclude)):
        if isinstance(given, str):
            raise ValueError(f"{name} must be a list of patterns, got {given!r}")
    linears = linears_of(model)
    if exclude is None:
        stay = list(linears)[-1:]
    else:
        stay = [name for pattern in exclude for name in matching_linears(model, pattern).values()]
    kept = {linears[name] for name in stay}
    names = [name for pattern in patterns for name in matching_linears(model, pattern).values()]
    found = {linears[name]: name for name in names if linears[name] not in kept}
    plain = {
        layer: name
        for layer, name in found.items()
        if type(layer) in (nn.Linear, MaskedLinear, TopKLinear)
    }
    if not plain:
        others = [f"{name}, a {kind_of(layer)}" for layer, name in found.items()]
        others += [f"{name}, which is excluded" for name in stay]
        raise ValueError(
            f"layers {list(patterns)} must match an nn.Linear or MaskedLinear, "
            f"got {'; '.join(others) or 'none'}"
        )
    for layer, name in plain.items():
        check_layer(name, layer, TopKLinear)
    return list(plain)


def _convert(
    model: nn.Module, layers: list[nn.Linear], k: int | float, options: dict[str, Any]
) -> None:
    """Make these layers TopKLinear, as the objects they are: parents, hooks and earlier
    sub-networks hold them.
    """
    # Made before one of them is changed.
    made = [TopKLinear.from_linear(layer, k, **options) for layer in layers]
    for layer, other in zip(layers, made, strict=True):
        vars(layer).update({name: vars(other)[name] for name in ("k", *options)})
        layer.__class__ = TopKLinear
    leave_fast_path(model, layers)
    SubNetwork.layers_changed(layers)


def _largest(subnet: SubNetwork, k: int | float) -> SubNetwork:
    """The k elements of the sub-network with the largest gradients, in absolute value."""
    # A tied parameter once.
    grads = {
        parameter: parameter.grad
        for parameter in subnet.model.parameters()
        if parameter.grad is not None and subnet.mask_of(parameter) is not None
    }
    total = sum(grad.numel() for grad in grads.values())
    masks = largest(list(grads.values()), kept_count(k, total))
    return only(subnet.model, dict(zip(grads, masks, strict=True)), "top-k")


def _kept_rows(subnet: SubNetwork) -> SubNetwork:
    """The sub-network without the rows that a row-sparse gradient does not have; the gradient
    becomes dense.
    """
    masks = {parameter: subnet.mask_of(parameter) for parameter in subnet.model.parameters()}
    for parameter in masks:
        grad = parameter.grad
        if grad is not None and grad.is_sparse:
            grad = grad.coalesce()
            masks[parameter] = Index(grad.indices()[0])
            parameter.grad = grad.to_dense()
    return only(subnet.model, masks, "kept rows")


@dataclass(frozen=True)
class TopKConfig(MethodConfig):
    """What methods with a sparsified backward have in common."""

    ratio: float = 0.05
    """Share of a layer's outputs whose gradients are kept; of its first ones where it shrinks, and
    of all parameters with variant true."""
    k: int | None = None
    """Or their number, in place of the share."""
    per: Literal["row", "batch"] = "row"
    """Keep outputs for each example (or token), or the same ones for the batch."""
    layers: tuple[str, ...] = ("*",)
    """Patterns of the names of the layers to sparsify."""
    exclude: tuple[str, ...] | None = None
    """Patterns of layers that stay as they are; the output layer, the model's last linear one,
    where not given."""
    weight_grad: Literal["full", "rows"] = "full"
    """rows, which needs per batch, updates the rows of weights that were kept alone: no decay and
    no momentum for the others."""
    bias_grad: Literal["full", "topk"] = "full"
    """Gradients of biases from all outputs, or from those that are kept."""

    def __post_init__(self) -> None:
        kept_count(self.count, 1)

    @property
    def count(self) -> int | float:
        """The number that is kept, or the share."""
        return float(self.ratio) if self.k is None else self.k

    @property
    def options(self) -> dict[str, Any]:
        """What the methods take by these names."""
        names = ("per", "layers", "exclude", "weight_grad", "bias_grad")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Config(TopKConfig):
    """meProp: the backward of linear layers from the largest elements alone."""

    name = "meprop"

    variant: Literal["backward", "true"] = "backward"
    """backward sparsifies back-propagation; true computes the exact gradient and updates the
    parameters where it is largest."""

    def build(self, model: nn.Module) -> MeProp:
        return MeProp(model, self.count, variant=self.variant, **self.options)

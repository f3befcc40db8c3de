"""``LFCLinear``: ``nn.Linear`` with a low-rank part that is a network of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from maskedtrain.layers.base import Copier, row_mask
from maskedtrain.layers.linear import MaskedLinear
from partial_kernels import Full, Index, Mask, MergeCache, Prefix, lfc_linear

__all__ = ["LFCInit", "LFCLinear"]

LFCInit = Literal["variance_split", "svd", "zeros"]


class LFCLinear(MaskedLinear):
    """Low-rank factor core: ``y = x (W + V U)^T + b``, with W [O, I], U [K, I] and V [O, K].

    A sub-network that has the weight outside (mask None) is the core, ``y = (x U^T) V^T + b``, at
    the cost of two thin layers; the bias belongs to it. Without an active sub-network, and in one
    that has all of it, a training step costs 1 + K / T of ``nn.Linear``'s for T tokens (see
    ``partial_kernels.lfc_linear``). With U or V outside it is a ``MaskedLinear``. A sub-network's
    masks may also keep rows and columns of the weight, which U and V follow, and the first of the K
    factors: ``{"u": Prefix(k), "v": Prefix(None, k)}``.

    ``W + V U`` is kept while the parameters do not change, in ``cache``: what writes through
    ``parameter.data`` goes unnoticed and must call ``cache.clear()``.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one.
        rank: K.
        rank_ratio: or K by its share of full rank: ``max(1, round(rank_ratio * min(I, O)))``.
        form: of the super layer: "auto", "merged" or "factored" (see ``lfc_linear``).

    Source: "Masked Training of Neural Networks with Partial Gradients" (AISTATS 2022), section 4,
    which leaves the initialisation open; see ``from_linear`` for ours, "variance_split".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int | None = None,
        rank_ratio: float | None = None,
        form: Literal["auto", "merged", "factored"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rank = _rank(in_features, out_features, rank, rank_ratio)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.rank = rank
        self.form: Literal["auto", "merged", "factored"] = form
        self.u = nn.Parameter(self.weight.new_empty(rank, in_features))
        self.v = nn.Parameter(self.weight.new_empty(out_features, rank))
        self.cache = MergeCache()
        self.split_variance()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # nn.Linear's own __init__ comes here before there are factors.
        if "u" in self._parameters:
            self.split_variance()

    @torch.no_grad()
    def split_variance(self) -> None:
        """Give half of the weight's variance s^2 to W, by a factor, and half to V U, drawn anew.

        Elements of V U are sums of K products, of variance K var(U) var(V). With var(U) = 1 / I the
        core's inner values have the variance of x; var(V) = I s^2 / (2 K) then leaves s^2 / 2.
        """
        if self.weight.is_meta:
            return
        variance = self.weight.double().square().mean().item()
        self.weight.mul_(math.sqrt(0.5))
        self.u.normal_(0, self.in_features**-0.5)
        self.v.normal_(0, math.sqrt(self.in_features * variance / (2 * self.rank)))

    def extra_repr(self) -> str:
        form = "" if self.form == "auto" else f", form={self.form!r}"
        return f"{super().extra_repr()}, rank={self.rank}{form}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LFCLinear:
        # It would stay on the device that the layer leaves.
        self.cache.clear()
        return super()._apply(fn, recurse)

    def forward(self, input: Tensor) -> Tensor:
        weight, u, v, bias = (self.part(name) for name in ("weight", "u", "v", "bias"))
        if u is None or v is None:
            return super().forward(input)
        whole = weight is self.weight and u is self.u and v is self.v
        cache = self.cache if whole else None
        return lfc_linear(input, weight, u, v, bias, form=self.form, cache=cache)

    def implied_masks(self, masks: Mapping[str, Mask | None]) -> dict[str, Mask | None]:
        weight = masks.get("weight", Full())
        implied: dict[str, Mask | None] = {}
        if isinstance(weight, Prefix):
            implied = {"u": Prefix(None, weight.cols), "v": Prefix(weight.rows)}
        elif isinstance(weight, Index):
            implied = {"u": Index(None, weight.cols), "v": Index(weight.rows)}
        if self.bias is not None:
            u, v = ({**implied, **masks}.get(name, Full()) for name in "uv")
            implied["bias"] = row_mask(weight if u is None or v is None else v)
        return implied

    def plain(self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier) -> nn.Module:
        if masks["u"] is None or masks["v"] is None:
            return super().plain(masks, subnet, copier)
        bias = copier.bias(self.bias, masks.get("bias"))
        if masks["weight"] is None:
            u, v = (copier.parameter(getattr(self, name), masks[name]) for name in "uv")
            _check_fit(None, u, v, bias)
            return nn.Sequential(_linear(u, None, self), _linear(v, bias, self))
        if copier.share:
            raise ValueError("W + V U is no view: share=True needs the core, or W by itself")
        weight, u, v = (copier.tensor(getattr(self, n), masks[n]) for n in ("weight", "u", "v"))
        _check_fit(weight, u, v, bias)
        trained = any(getattr(self, name).requires_grad for name in ("weight", "u", "v"))
        return _linear(nn.Parameter(torch.addmm(weight, v, u), trained), bias, self)

    def merge(self) -> nn.Linear:
        """The super layer as ``nn.Linear`` with the weight W + V U, a copy: equal to rounding."""
        full: dict[str, Mask | None] = {name: Full() for name in ("weight", "u", "v", "bias")}
        merged = self.plain(full, "", Copier(share=False))
        assert isinstance(merged, nn.Linear)
        return merged

    def core(self) -> nn.Sequential:
        """The core as two ``nn.Linear``, copies: U without a bias, then V."""
        masks: dict[str, Mask | None] = {name: Full() for name in ("u", "v", "bias")}
        core = self.plain({"weight": None, **masks}, "", Copier(share=False))
        assert isinstance(core, nn.Sequential)
        return core

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank_ratio: float | None = None,
        init: LFCInit = "variance_split",
        *,
        rank: int | None = None,
        form: Literal["auto", "merged", "factored"] = "auto",
    ) -> LFCLinear:
        """An LFCLinear over the weight and bias of a linear layer: the same parameters, of which
        the weight changes in place.

        Args:
            linear: the layer.
            rank_ratio: share of full rank, or ``rank`` the number of factors.
            init: "variance_split" for a layer that is not trained yet: W times sqrt(1/2), and
                random factors such that V U has the other half of the variance; W + V U is as
                random as W was. "svd": V U is the best approximation of W of its rank, and W the
                rest: W + V U is the W there was, to rounding. "zeros": V = 0, and the layer is
                what it was, bitwise.
            form: of the super layer.
        """
        if isinstance(linear, LFCLinear):
            raise TypeError("linear must have no factors yet, got an LFCLinear")
        if init not in _INITS:
            raise ValueError(f"init must be one of {', '.join(_INITS)}, got {init!r}")
        inputs, outputs = linear.in_features, linear.out_features
        lfc = cls(
            inputs,
            outputs,
            linear.bias is not None,
            rank=_rank(inputs, outputs, rank, rank_ratio),
            form=form,
            device="meta",
            dtype=linear.weight.dtype,
        )
        lfc.weight, lfc.bias = linear.weight, linear.bias
        lfc.u = nn.Parameter(linear.weight.detach().new_empty(lfc.rank, inputs))
        lfc.v = nn.Parameter(linear.weight.detach().new_empty(outputs, lfc.rank))
        _INITS[init](lfc)
        return lfc.train(linear.training)


def _rank(inputs: int, outputs: int, rank: int | None, ratio: float | None) -> int:
    if (rank is None) == (ratio is None):
        raise ValueError(f"one of rank and rank_ratio must be given, got {rank} and {ratio}")
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"rank_ratio must be in (0, 1], got {ratio}")
        return max(1, round(ratio * min(inputs, outputs)))
    assert rank is not None
    if not 1 <= rank <= min(inputs, outputs):
        raise ValueError(f"rank must be in [1, {min(inputs, outputs)}], got {rank}")
    return rank


def _check_fit(weight: Tensor | None, u: Tensor, v: Tensor, bias: Tensor | None) -> None:
    # As a call would: this one is of no token.
    lfc_linear(u.new_empty(0, u.shape[1]), weight, u, v, bias)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None, like: nn.Module) -> nn.Linear:
    rows, cols = weight.shape
    linear = nn.Linear(cols, rows, bias=bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias  # pyright: ignore[reportAttributeAccessIssue]
    return linear.train(like.training)


@torch.no_grad()
def _svd(layer: LFCLinear) -> None:
    # Half precision has no SVD.
    weight = layer.weight.float() if layer.weight.itemsize < 4 else layer.weight
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    root = sizes[: layer.rank].sqrt()
    layer.v.copy_(left[:, : layer.rank] * root)
    layer.u.copy_(root[:, None] * right[: layer.rank])
    layer.weight.sub_(layer.v @ layer.u)


@torch.no_grad()
def _zeros(layer: LFCLinear) -> None:
    layer.u.normal_(0, layer.in_features**-0.5)
    layer.v.zero_()


_INITS = {"variance_split": LFCLinear.split_variance, "svd": _svd, "zeros": _zeros}

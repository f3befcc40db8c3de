"""``TopKLinear``: ``nn.Linear`` trained by the largest elements of its output's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from maskedtrain.layers.linear import MaskedLinear, check_plain
from partial_kernels import topk_linear

__all__ = ["TopKLinear", "kept_count"]

Per = Literal["row", "batch"]
WeightGrad = Literal["full", "rows"]
BiasGrad = Literal["full", "topk"]


class TopKLinear(MaskedLinear):
    """``nn.Linear`` whose backward uses the k largest of the O outputs' gradients (meProp).

    ::

        y = x W^T + b        dx = D W        dW = D^T x        db = dy^T 1

    with x ``[..., I]``, W ``[O, I]``, and D the gradient dy of y where it is kept and 0 elsewhere.
    In training the two products of the backward cost ``2 T k I`` FLOPs each for T rows of x instead
    of ``2 T O I``. The forward is ``nn.Linear``'s, bit for bit; so are the gradients in evaluation
    mode and with k >= O. The ``state_dict`` is ``nn.Linear``'s.

    A sub-network's masks mean what they do for ``MaskedLinear``; k is of the outputs that are left:
    a share of these, or at most all of them. An extracted layer is an ``nn.Linear``, which
    back-propagates all.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one.
        k: how many are kept: an int >= 1, or a float in (0, 1], their share of the outputs:
            ``max(1, round(k * O))``.
        per: "row" keeps k elements of each row of dy, "batch" k columns: those with the largest sum
            of ``|dy|``.
        weight_grad: "full", or "rows" for a row-sparse ``weight.grad`` (hybrid COO, as of
            ``nn.Embedding(sparse=True)``), which needs per="batch", an optimizer that takes such
            gradients and, in training, the whole weight.
        bias_grad: "full", the sum over all of dy, as in the authors' code, or "topk": over D.

    Raises:
        ValueError: k is out of range or an option is none of these; in the forward, x does not fit,
            or weight_grad is "rows" and a sub-network has a part of the weight.

    Source: Sun et al., "meProp: Sparsified Back Propagation for Accelerated Deep Learning with
    Reduced Overfitting" (ICML 2017), section 3.
    """

    on_gradient: Callable[[Tensor], None] | None = None
    """Called with dy, whole, in the backward of every training pass that runs while it is set."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        k: int | float,
        per: Per = "row",
        weight_grad: WeightGrad = "full",
        bias_grad: BiasGrad = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # As a call would: this one is of no token.
        options = {"per": per, "weight_grad": weight_grad, "bias_grad": bias_grad}
        one = torch.empty(1, 1)
        topk_linear(one[:0], one, k=kept_count(k, 1), **options)  # pyright: ignore[reportArgumentType]
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.k = k
        self.per: Per = per
        self.weight_grad: WeightGrad = weight_grad
        self.bias_grad: BiasGrad = bias_grad

    def extra_repr(self) -> str:
        shown = f"{super().extra_repr()}, k={self.k}, per={self.per!r}"
        for name in ("weight_grad", "bias_grad"):
            if (value := getattr(self, name)) != "full":
                shown += f", {name}={value!r}"
        return shown

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not torch.is_grad_enabled():
            return super().forward(input)
        weight = self.part("weight")
        if weight is None:
            return super().forward(input)
        if self.weight_grad == "rows" and weight is not self.weight:
            assert self.active is not None
            raise ValueError(
                'weight_grad="rows" trains the whole weight, got the mask '
                f"{self.active.masks['weight']} of {self.active.subnet!r}"
            )
        y = topk_linear(
            input,
            weight,
            self.part("bias"),
            k=kept_count(self.k, weight.shape[0]),
            per=self.per,
            weight_grad=self.weight_grad,
            bias_grad=self.bias_grad,
        )
        if self.on_gradient is not None and y.requires_grad:
            y.register_hook(self.on_gradient)
        return y

    @classmethod
    def from_linear(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        linear: nn.Linear,
        k: int | float,
        *,
        per: Per = "row",
        weight_grad: WeightGrad = "full",
        bias_grad: BiasGrad = "full",
    ) -> TopKLinear:
        """A TopKLinear over the same parameters (not copies).

        Raises:
            TypeError: the layer is more than an ``nn.Linear``, which would be lost.
        """
        check_plain(linear, TopKLinear)
        made = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            k=k,
            per=per,
            weight_grad=weight_grad,
            bias_grad=bias_grad,
            device="meta",
        )
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)


def kept_count(k: int | float, total: int) -> int:
    """How many of ``total`` k means: an int is a count, a float a share, of which at least 1.

    Raises:
        ValueError: k is neither an int >= 1 nor a float in (0, 1].
    """
    if isinstance(k, float) and 0 < k <= 1:
        return max(1, round(k * total))
    if isinstance(k, int) and not isinstance(k, bool) and k >= 1:
        return min(k, max(1, total))
    raise ValueError(f"k must be a count, an int >= 1, or a share, a float in (0, 1], got {k!r}")

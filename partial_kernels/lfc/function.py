"""``lfc_linear``: a linear layer with a low-rank part, at the cost of a plain one."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from partial_kernels._core.checks import check_tensors, compute_dtype, no_autocast
from partial_kernels._core.ops import FUNC, plain_call, transformed
from partial_kernels.lfc.reference import CORE, MERGE, factor_costs, factor_gradients

__all__ = ["Form", "MergeCache", "lfc_linear"]

# T tokens, O outputs, I inputs, K rank

Form = Literal["auto", "merged", "factored"]


Key = tuple[Any, ...]


class MergeCache:
    """Keeps ``W' = W + V U`` from call to call while W, U and V stay the same tensors, unchanged.

    One matrix at most is held. Changes are noticed by the tensors' version counters, as autograd
    does: what writes through ``tensor.data`` must call ``clear`` itself. Calls that are compiled or
    exported go past the cache; one that is captured in a CUDA graph ends it, since replays change
    tensors unnoticed. A copy of it, or what a pickle holds of it, is empty.
    """

    def __init__(self) -> None:
        self._held: tuple[Key, Tensor, list[Tensor]] | None = None
        self._ended = False

    def clear(self) -> None:
        """Forget the matrix."""
        self._held = None

    def __reduce__(self) -> tuple[type[MergeCache], tuple[()]]:
        return MergeCache, ()

    def key(
        self, weight: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype, impl: str
    ) -> Key | None:
        """What W' depends on, or None where it cannot be kept."""
        if torch.compiler.is_compiling() or self._ended:
            return None
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            self._ended, self._held = True, None
            return None
        tensors = weight, u, v
        # Fake tensors hold nothing, and those made in inference mode have no version.
        if any(type(t) not in (Tensor, Parameter) or t.is_inference() for t in tensors):
            return None
        versions = ((tensor._version, tensor.data_ptr()) for tensor in tensors)
        return *tensors, *versions, dtype, impl

    def find(self, key: Key) -> Tensor | None:
        """The matrix of this key; None, and nothing held any more, if what is held is another."""
        # Read once: another thread may end it.
        if (entry := self._held) is not None:
            held, merged, _ = entry
            # Tensors by identity: "==" would compare their elements.
            if all(a is b for a, b in zip(held[:3], key[:3], strict=True)) and held[3:] == key[3:]:
                return merged
            # Dropped before its successor is made, so that there are never two.
            self._held = None
        return None

    def keep(self, key: Key, merged: Tensor) -> None:
        """Hold the matrix of this key."""
        # With aliases of its tensors: the address of memory that is free again says nothing.
        self._held = key, merged, [tensor.detach() for tensor in key[:3]]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_TI: Tensor,
        weight: Tensor,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        merged: Tensor,
    ) -> Tensor:
        needs_dx, *needs_x = ctx.needs_input_grad[:4]
        # Beside parameters: x, which a plain layer would save, and W', which it would not need to.
        kept = (merged, weight) if needs_dx else (None, None)
        ctx.save_for_backward(x_TI if any(needs_x) else None, *kept, u, v)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x_TI, merged, None if bias is None else bias.to(x_TI.dtype))

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, merged, weight, u, v = ctx.saved_tensors
        needs_dx, needs_dweight, needs_du, needs_dv, needs_dbias, _ = ctx.needs_input_grad
        needs = needs_dweight, needs_du, needs_dv
        dx = dweight = du = dv = dbias = None
        # A backward may run within autocast's context: what is in fp32 stays so.
        with no_autocast(dy_TO):
            if needs_dx:
                # Under create_graph=True, dx depends on W, U and V, which W' has forgotten.
                graph = torch.is_grad_enabled()
                dx = dy_TO @ ((weight + v @ u).to(dy_TO.dtype) if graph else merged)
            if x_TI is not None:
                dweight, du, dv = factor_gradients(dy_TO, x_TI, u, v, needs)
        if needs_dbias:
            dbias = dy_TO.sum(0).to(ctx.bias_dtype)
        return dx, dweight, du, dv, dbias, None


_merged: Any = cast("Any", _Merged).apply


class _Core(torch.autograd.Function):
    # Old-style forward(ctx, ...): the setup_context form costs 17 us more a call. h is a result, so
    # that a second derivative goes through it to x and U, whether or not x is kept.
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x_TI: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, impl: str
    ) -> tuple[Tensor, Tensor]:
        y_TO, h_TK = CORE(x_TI, u, v, bias, impl)
        _, needs_du, needs_dv, *_ = ctx.needs_input_grad
        # A frozen factor must not keep its input alive.
        ctx.save_for_backward(x_TI if needs_du else None, h_TK if needs_dv else None, u, v)
        ctx.impl, ctx.bias_dtype = impl, None if bias is None else bias.dtype
        # Dynamo does not trace this, so that h's gradient would be zeros; nor is what it compiles
        # differentiated twice, so that there is no other.
        ctx.compiled = torch.compiler.is_compiling()
        if not ctx.compiled:
            ctx.set_materialize_grads(False)
        return y_TO, h_TK

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor | None, dh_TK: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, h_TK, u, v = ctx.saved_tensors
        needs_dx, needs_du, needs_dv, needs_dbias, _ = ctx.needs_input_grad
        dx = du = dv = dbias = None
        if ctx.compiled:
            dh_TK = None
        # A backward may run within autocast's context: what is in fp32 stays so.
        with no_autocast(u):
            # Grad mode is on in a backward only under create_graph=True: then take the formulas,
            # which autograd can differentiate once more.
            first_order = dh_TK is None and not torch.is_grad_enabled()
            if needs_dx and dy_TO is not None and first_order:
                dx, dh_TK = CORE(dy_TO, v.mT, u.mT, None, ctx.impl)
            else:
                if dy_TO is not None and (needs_dx or needs_du):
                    dh_of_y = dy_TO @ v.to(dy_TO.dtype)
                    dh_TK = dh_of_y if dh_TK is None else dh_TK + dh_of_y
                if dh_TK is not None and needs_dx:
                    dx = dh_TK @ u.to(dh_TK.dtype)
            if dh_TK is not None and needs_du:
                du = (dh_TK.mT @ x_TI).to(u.dtype)
            if dy_TO is not None and needs_dv:
                dv = (dy_TO.mT @ h_TK).to(v.dtype)
        if needs_dbias and dy_TO is not None:
            dbias = dy_TO.sum(0).to(ctx.bias_dtype)
        return dx, du, dv, dbias, None


_core: Any = cast("Any", _Core).apply


def lfc_linear(
    x: Tensor,
    weight: Tensor | None,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    form: Form = "auto",
    cache: MergeCache | None = None,
    impl: str = "auto",
) -> Tensor:
    """Linear layer with a low-rank part: ``y = x (W + V U)^T + b``; without ``weight`` its core,
    ``y = (x U^T) V^T + b``.

    The two forms give the same result and the same gradients, to rounding:

    - merged: ``W' = W + V U`` is formed once (2 O I K FLOPs), then used as a plain layer's weight,
      forward and backward; dU and dV come from dW. For T tokens and rank K a training step costs
      1 + K / T of a plain layer's. Saved for the backward beside parameters: x and W'.
    - factored: ``y = x W^T + (x U^T) V^T``, for few tokens; saved beside parameters: x and
      ``x U^T``, [T, K]. The core saves the same, as two plain layers do: to compute ``x U^T`` again
      would take a sixth of its step's FLOPs where I = O, to save K / I of x's memory. (x only where
      U is trained, ``x U^T`` where V is.)

    In fp32 the forms differ by rounding. In bf16 (autocast) W' is formed in the parameters' dtype
    and rounded once, which costs as much as rounding the outputs does; but an error of W's scale
    is large for V U where that is small: at 1 % of W's scale the low-rank part is off by about 16 %
    merged. Where that part must be resolved by itself, take ``form="factored"``.

    Deterministic for one backend and thread count; differentiable twice.

    Args:
        x: ``[..., I]``.
        weight: W ``[O, I]``, or None for the core, whose cost is ``2 T K (I + O)`` and which reads
            nothing else.
        u: U ``[K, I]``.
        v: V ``[O, K]``.
        bias: ``[O]`` or None.
        form: "auto" takes the one of fewer FLOPs, forward and for the gradients that are needed:
            where all are, or none, merged for ``T (I + O) >= O I``. In ``torch.export``, whose T is
            no number, merged.
        cache: keeps W' for the next call with unchanged parameters. With gradients off "auto" takes
            W' from it for few tokens, too. With gradients on the form does not depend on earlier
            calls, so that checkpointed activations are recomputed, and runs resumed, in the same.
        impl: backend of the merging, or of the core, by name (it runs or raises), or "auto": for a
            core two plain PyTorch calls, except on CUDA, where few tokens of a narrow layer take
            one kernel, forward and for dx. The factored form with W has no backends.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``form`` is unknown.
        RuntimeError: the backend named by ``impl`` cannot run these arguments; the message says
            why.

    Source: the low-rank cores of "Masked Training of Neural Networks with Partial Gradients"
    (AISTATS 2022), section 4.
    """
    _check(x, weight, u, v, bias, form)
    if weight is None:
        return _core_linear(x, u, v, bias, impl)
    if transformed():
        plain_call("lfc_linear", impl, FUNC)
        return F.linear(x, weight, bias) + F.linear(F.linear(x, u), v)
    dtype = compute_dtype(x)
    few = form == "factored" or (form == "auto" and _few(x, weight, u, v))
    key = merged = None
    if cache is not None and form != "factored" and not (few and torch.is_grad_enabled()):
        key = cache.key(weight, u, v, dtype, impl)
        merged = None if key is None else cache.find(key)
    if merged is None and few:
        plain_call("lfc_linear", impl)
        return F.linear(x, weight, bias) + F.linear(F.linear(x, u), v)
    if merged is None:
        merged = _merge(weight, u, v, dtype, impl, cache, key)
    return _shaped(_merged(_by_token(x, dtype), weight, u, v, bias, merged), x)


def _core_linear(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    # Only CUDA has a kernel for it; elsewhere torch's own two calls cost less than one around them.
    if impl == "torch" or (impl == "auto" and (transformed() or not x.is_cuda)):
        plain_call("lfc_linear", impl)
        return F.linear(F.linear(x, u), v, bias)
    y_TO, _ = _core(_by_token(x, compute_dtype(x)), u, v, bias, impl)
    return _shaped(y_TO, x)


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as [T, I]."""
    if x.ndim == 2 and x.dtype == dtype:
        return x
    return x.to(dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _shaped(y_TO: Tensor, x: Tensor) -> Tensor:
    """y with the leading dimensions of x."""
    return y_TO if x.ndim == 2 else y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


def _few(x: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> bool:
    """Whether the factored form takes fewer FLOPs, with the gradients that are needed."""
    # A comparison would make torch.export's number of tokens one of a range.
    if torch.compiler.is_exporting():
        return False
    (outputs, inputs), rank, tokens = weight.shape, u.shape[0], math.prod(x.shape[:-1])
    graph = torch.is_grad_enabled()
    dx, dweight, du, dv = (graph and tensor.requires_grad for tensor in (x, weight, u, v))
    # Beyond a plain layer's, in units of 2 FLOPs.
    merged = outputs * inputs * rank
    merged += min(factor_costs(tokens, outputs, inputs, rank, (dweight, du, dv)))
    width = inputs * (1 + dx + du) + outputs * (1 + (dx or du) + dv)
    return tokens * rank * width < merged


def _merge(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    impl: str,
    cache: MergeCache | None,
    key: Key | None,
) -> Tensor:
    """W', kept in the cache where there is a key for it."""
    if cache is None or key is None:
        with torch.no_grad():
            return MERGE(weight, u, v, dtype, impl)
    # What is made in inference mode could not be saved for a backward later.
    with torch.inference_mode(False), torch.no_grad():
        merged = MERGE(weight, u, v, dtype, impl)
    cache.keep(key, merged)
    return merged


def _check(
    x: Tensor, weight: Tensor | None, u: Tensor, v: Tensor, bias: Tensor | None, form: str
) -> None:
    if form not in ("auto", "merged", "factored"):
        raise ValueError(f'form must be "auto", "merged" or "factored", got {form!r}')
    for name, tensor, axes in (("u", u, "[K, I]"), ("v", v, "[O, K]")):
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be 2-D {axes}, got shape {list(tensor.shape)}")
    (rank, inputs), outputs = u.shape, v.shape[0]
    if v.shape[1] != rank:
        raise ValueError(f"v must be [O, K] = [{outputs}, {rank}] as u says, got {list(v.shape)}")
    if weight is not None and tuple(weight.shape) != (outputs, inputs):
        raise ValueError(
            f"weight must be [O, I] = [{outputs}, {inputs}] as v and u say, "
            f"got {list(weight.shape)}"
        )
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x must be [..., I] = [..., {inputs}], got shape {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias must be [O] = [{outputs}], got {list(bias.shape)}")
    check_tensors(x, weight=weight, u=u, v=v, bias=bias)
    # Without autocast that is said; with it, W' could be formed in neither.
    if weight is not None and not weight.dtype == u.dtype == v.dtype:
        raise ValueError(
            f"weight, u and v must have one dtype, got {weight.dtype}, {u.dtype} and {v.dtype}"
        )

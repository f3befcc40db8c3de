"""meProp's layers: few outputs kept and many, by row and by batch; for speed, 5 % of wide ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.contest import Bars, Contest, Step, backward
from partial_kernels._core.crossovers import Crossing, dtype_name
from partial_kernels._core.linear_cases import (
    WEIGHT_LAYOUTS,
    X_LAYOUTS,
    call_with_gradients,
    doubled,
    random_tensors,
    results,
)
from partial_kernels._core.testing import (
    Call,
    assert_within_budget,
    assert_zero_outside,
    poisoned,
)
from partial_kernels.select.cases import exact as selected
from partial_kernels.select.function import Per, topk_select
from partial_kernels.topk.function import BiasGrad, WeightGrad, topk_linear
from partial_kernels.topk.reference import ROW_DWEIGHT, ROW_DX

__all__ = [
    "BENCH_CASES",
    "CASES",
    "Case",
    "bytes_moved",
    "call",
    "check",
    "contest",
    "crossings",
    "flops",
    "gpu_cases",
]

# T tokens, O outputs, I inputs


@dataclass(frozen=True)
class Case:
    """Arguments of one call of ``topk_linear``, by shape and layout."""

    name: str
    batch: tuple[int, ...]
    """Leading dimensions of x."""
    outputs: int
    inputs: int
    k: int
    per: Per = "row"
    weight_grad: WeightGrad = "full"
    bias_grad: BiasGrad = "full"
    dtype: torch.dtype = torch.float32
    bias: bool = True
    x_layout: str = "contiguous"
    """A key of ``X_LAYOUTS``; ``check`` gives dy the same one."""
    weight_layout: str = "contiguous"

    @property
    def tokens(self) -> int:
        return math.prod(self.batch)

    def make(
        self, seed: int = 0, device: torch.device | str = "cpu", *, requires_grad: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments for ``topk_linear``; the same numbers on every device."""
        random = random_tensors(self.dtype, device, seed)
        layout = WEIGHT_LAYOUTS[self.weight_layout]
        leaves = {
            "x": X_LAYOUTS[self.x_layout](random, (*self.batch, self.inputs)),
            "weight": layout(random, (self.outputs, self.inputs)),
        }
        if self.bias:
            leaves["bias"] = random(self.outputs)
        return {
            **{name: leaf.requires_grad_(requires_grad) for name, leaf in leaves.items()},
            **{name: getattr(self, name) for name in ("k", "per", "weight_grad", "bias_grad")},
        }

    def dy(self, seed: int = 1, device: torch.device | str = "cpu") -> Tensor:
        random = random_tensors(self.dtype, device, seed)
        return X_LAYOUTS[self.x_layout](random, (*self.batch, self.outputs))


def _variations(per: Per) -> tuple[Case, ...]:
    base = Case(per, (7,), 13, 11, 4, per)
    changes: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"dtype": torch.bfloat16},
        "fp64": {"dtype": torch.float64},
        "no-bias": {"bias": False},
        "bias-topk": {"bias_grad": "topk"},
        "k-1": {"k": 1},
        "k-12": {"k": 12},
        "k-13": {"k": 13},
        "k-99": {"k": 99},
        "vector": {"batch": ()},
        "no-token": {"batch": (0,)},
        "batch-3d": {"batch": (2, 3)},
        "many": {"batch": (130,), "outputs": 150, "inputs": 137},
        "many-bf16": {"batch": (130,), "outputs": 150, "inputs": 137, "dtype": torch.bfloat16},
        "narrow": {"batch": (40,), "outputs": 300, "inputs": 3},
        "x-permuted-3d": {"batch": (2, 3), "x_layout": "permuted"},
        "x-sliced": {"x_layout": "sliced", "dtype": torch.bfloat16},
        "x-expanded": {"batch": (2, 3), "x_layout": "expanded"},
        "weight-permuted": {"weight_layout": "permuted"},
        "weight-sliced": {"weight_layout": "sliced", "dtype": torch.float64},
    }
    return tuple(replace(base, name=f"{per}-{key}", **change) for key, change in changes.items())


CASES = (
    *_variations("row"),
    *_variations("batch"),
    # Long sums, and lists of more than a kernel takes at a time.
    Case("row-many-kept", (1,), 3000, 8, 2500),
    Case("row-many-tokens", (2500,), 3, 8, 2),
    Case("batch-rows", (7,), 13, 11, 4, "batch", "rows"),
    Case("batch-rows-bf16", (7,), 13, 11, 4, "batch", "rows", dtype=torch.bfloat16),
)

_BENCHED: tuple[tuple[Per, WeightGrad], ...] = (
    ("batch", "rows"),
    ("batch", "full"),
    ("row", "full"),
)
BENCH_CASES = tuple(
    Case(
        f"{per}-{weight_grad}-{width}",
        (1024,),
        width,
        width,
        round(0.05 * width),
        per,
        weight_grad,
        bias=False,
    )
    for per, weight_grad in _BENCHED
    for width in (2048, 4096, 8192)
)


def flops(case: Case) -> dict[str, int]:
    """FLOPs of each pass, 2 per multiply-add."""
    product = 2 * case.tokens * case.inputs
    kept = product * min(case.k, case.outputs)
    return {"forward": product * case.outputs, "dx": kept, "dweight": kept}


def bytes_moved(case: Case) -> dict[str, int]:
    """Bytes of each pass if every operand moves once: by batch, k rows of the weight."""
    T, O, I, size = case.tokens, case.outputs, case.inputs, case.dtype.itemsize
    rows = min(case.k, O) if case.per == "batch" else O
    dweight = rows if case.weight_grad == "rows" else O
    return {
        "forward": size * (T * (I + O) + O * I + O * case.bias),
        "dx": size * (T * (I + O) + rows * I),
        "dweight": size * (T * I + dweight * I),
    }


# By k, how many times as fast as the dense backward one by batch must be: as in the paper from 64
# on.
_BY_BATCH = {64: 21.4, 512: 4.4, 128: 14.5, 256: 8.0, 8: 20.0, 32: 20.0, 16: 20.0}


def gpu_cases(scale: int = 1) -> list[tuple[Case, Bars]]:
    """What is timed on a GPU, sizes divided by ``scale``, and what is promised there; more elements
    a row show where the dense backward becomes faster.
    """
    width = 8192 // scale

    def case(per: Per, weight_grad: WeightGrad, k: int) -> Case:
        few = min(k, width // 2)
        return Case(
            f"{per}-k{k}",
            (1024 // scale,),
            width,
            width,
            few,
            per,
            weight_grad,
            dtype=torch.bfloat16,
            bias=False,
        )

    by_batch = [(case("batch", "rows", k), {"F.linear": 1 / x}) for k, x in _BY_BATCH.items()]
    by_row = [
        (case("row", "full", k), {"F.linear": 1.0} if k <= 16 else {}) for k in (16, 4, 8, 32, 64)
    ]
    return [*by_batch, *by_row]


def contest(
    case: Case, *, device: torch.device | str = "cpu", impl: str = "auto", seed: int = 0
) -> Contest:
    """The backward against a dense layer's."""
    arguments = case.make(seed, device, requires_grad=True)
    x, weight = arguments["x"], arguments["weight"]
    dy, y = case.dy(seed + 1, device), topk_linear(**arguments, impl=impl)
    plain = F.linear(x, weight, arguments.get("bias"))

    def ours() -> object:
        dx, dweight = torch.autograd.grad(y, [x, weight], dy, retain_graph=True)
        return dx, dweight.values() if dweight.is_sparse else dweight

    def baseline() -> object:
        return torch.autograd.grad(plain, [x, weight], dy, retain_graph=True)

    costs = backward(flops(case)), backward(bytes_moved(case))
    bar = 1 / 12 if case.per == "batch" else 1 / 6
    return Contest(ours, {"F.linear": baseline}, *costs, bar)


def crossings(device: str, scale: int = 1) -> list[Crossing]:
    """Where the dense products become faster, by row, by dtype; sizes divided by ``scale``."""
    gpu = device == "cuda"
    backend = "cuda" if gpu else "native"
    tokens, width = 1024 // scale, (8192 if gpu else 1024) // scale
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64) if gpu else None

    def steps(dtype: torch.dtype, density: float) -> tuple[Step, Step]:
        k = max(1, round(density * width))
        case = Case("", (tokens,), width, width, k, dtype=dtype, bias=False)
        made, dy = case.make(0, device), case.dy(1, device)
        index = topk_select(dy, k)

        def step(impl: str) -> object:
            dx = ROW_DX(dy, index, made["weight"], impl)
            return dx, ROW_DWEIGHT(dy, index, made["x"], impl)

        return partial(step, backend), partial(step, "reference")

    return [
        Crossing(
            f"topk {backend} {dtype_name(dtype)}",
            (1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0),
            partial(steps, dtype),
        )
        for dtype in dtypes or (torch.float32,)
    ]


def kept_mask(case: Case, dy: Tensor) -> Tensor:
    """Where dy counts, found in plain Python."""
    index = selected(dy, min(case.k, case.outputs), case.per)
    mask = torch.zeros(dy.shape, dtype=torch.bool)
    return mask.scatter(-1, index.expand(*dy.shape[:-1], index.shape[-1]), True).to(dy.device)


def call(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> Call:
    """``topk_linear`` and its gradients."""
    arguments = case.make(seed, device)
    return call_with_gradients(topk_linear, arguments, case.dy(seed + 1, device), impl)


def check(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> None:
    """Raise AssertionError unless y, dx, dW and db are right, and rows without a kept element 0."""
    arguments, dy = case.make(seed, device), case.dy(seed + 1, device)
    with poisoned():
        actual = results(topk_linear, {**arguments, "impl": impl}, dy)
    mask = kept_mask(case, dy)

    def plain_topk(**given: Any) -> Tensor:
        return _Plain.apply(given["x"], given["weight"], given.get("bias"), mask, case.bias_grad)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    plain = results(plain_topk, arguments, dy)
    exact = results(plain_topk, doubled(arguments), dy.double())
    assert actual.keys() == exact.keys()
    dweight = actual["dweight"]
    if dweight.is_sparse != (case.weight_grad == "rows"):
        raise AssertionError(f"{case.name}: dweight is {dweight.layout}")
    actual["dweight"] = dweight.to_dense()
    for name, result in actual.items():
        what = f"{case.name}: {name}"
        assert_within_budget(result, plain[name], exact[name], what=what)
    has_rows = mask.reshape(-1, case.outputs).any(0)[:, None].expand(dweight.shape)
    assert_zero_outside(actual["dweight"], has_rows, what=f"{case.name}: dweight")


class _Plain(torch.autograd.Function):
    """What ``topk_linear`` must equal, with what is kept given."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, bias_grad: BiasGrad
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mask, ctx.bias_grad = mask, bias_grad
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        kept = torch.where(ctx.mask, dy, 0)
        some = dy if ctx.bias_grad == "full" else kept
        dweight = torch.einsum("...o,...i->oi", kept, x)
        dbias = some.reshape(-1, some.shape[-1]).sum(0)
        return kept @ weight, dweight, dbias if ctx.needs_input_grad[2] else None, None, None

"""``masked_sgd_`` and ``masked_adamw_`` with every mask, dtype and layout; and what is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from partial_kernels._core.contest import FLOOR, Bars, Contest
from partial_kernels._core.region_cases import arranged, masks
from partial_kernels._core.testing import Call, assert_within_budget, normal, poisoned
from partial_kernels.masks import Block, Element, Full, Index, Mask, Packed, Prefix
from partial_kernels.optim.function import masked_adamw_, masked_sgd_
from partial_kernels.optim.reference import state_dtype

__all__ = [
    "BENCH_CASES",
    "CASES",
    "Case",
    "bytes_moved",
    "call",
    "check",
    "contest",
    "flops",
    "gpu_cases",
]


@dataclass(frozen=True)
class Case:
    """One step on ``tensors`` parameters of one shape."""

    name: str
    rule: str
    """"sgd" or "adamw"."""
    shape: tuple[int, ...]
    mask: Mask
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    """One of ``_core.region_cases.LAYOUTS``, of parameters, gradients and states."""
    tensors: int = 1
    momentum: float = 0.9
    """SGD only."""
    nesterov: bool = True
    """SGD only."""
    weight_decay: float = 0.1
    packed: bool = False
    """Gradients and states hold the mask's elements alone; with ``Packed`` masks."""

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the lists of states."""
        if self.rule == "adamw":
            return "exp_avgs", "exp_avg_sqs"
        return ("momentum_buffers",) if self.momentum else ()

    @property
    def options(self) -> dict[str, Any]:
        """Options by the names that torch.optim gives them, too."""
        options: dict[str, Any] = {"lr": 0.01, "weight_decay": self.weight_decay}
        if self.rule == "adamw":
            return {**options, "betas": (0.9, 0.99), "eps": 1e-8}
        return {**options, "momentum": self.momentum, "nesterov": self.nesterov}

    def make(self, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keyword arguments for the function; the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)

        def tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> list[Tensor]:
            values = normal((self.tensors, *shape), generator, device)
            one = len(shape) == 1 and self.layout == "channels_last"
            layout = "sliced" if one else self.layout
            return [arranged(value.to(dtype), layout) for value in values]

        shape = (self.mask.numel(self.shape),) if self.packed else self.shape
        lists: dict[str, Any] = {
            "params": tensors(self.dtype, self.shape),
            "grads": tensors(self.dtype, shape),
        }
        for name in self.states:
            lists[name] = tensors(state_dtype(self.dtype), shape)
        for squares in lists.get("exp_avg_sqs", ()):
            squares.abs_()
        lists["masks"] = [self.mask] * self.tensors
        if self.rule == "adamw":
            lists["steps"] = list(range(3, 3 + self.tensors))
        elif not self.momentum:
            lists["momentum_buffers"] = None
        return {**lists, **self.options}

    def run(self, arguments: dict[str, Any]) -> None:
        """Call the function."""
        (masked_adamw_ if self.rule == "adamw" else masked_sgd_)(**arguments)


def picked(tensor: Tensor, inside: Tensor) -> Tensor:
    """A copy of the elements inside; a tensor of another shape holds no others."""
    return tensor[inside] if tensor.shape == inside.shape else tensor.clone()


def torch_optim(
    case: Case, arguments: dict[str, Any], dtype: torch.dtype
) -> dict[str, list[Tensor]]:
    """What the elements inside the mask must become: torch.optim's step on them alone.

    Computed in this dtype; 1-D tensors by the names of the lists, in row-major order.
    """
    inside = case.mask.dense(case.shape, arguments["params"][0].device)
    results: dict[str, list[Tensor]] = {name: [] for name in ("params", *case.states)}
    for i in range(case.tensors):
        p, g, *states = (
            picked(arguments[name][i], inside).to(dtype)
            for name in ("params", "grads", *case.states)
        )
        p.grad = g
        rule = torch.optim.AdamW if case.rule == "adamw" else torch.optim.SGD
        optimizer = rule([p], **case.options, foreach=False)
        for name, state in zip(case.states, states, strict=True):
            optimizer.state[p][name.removesuffix("s")] = state
        if case.rule == "adamw":
            optimizer.state[p]["step"] = torch.tensor(arguments["steps"][i] - 1.0)
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        for name, result in zip(results, (p, *states), strict=True):
            results[name].append(result)
    return results


def call(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> Call:
    """Steps with the learning rate and the counts of updates on the device."""
    made = case.make(seed, device)
    made["lr"] = torch.tensor(made["lr"], dtype=torch.float64, device=device)
    inputs = [made["lr"], *(t for name in ("grads", "params", *case.states) for t in made[name])]
    if "steps" in made:
        made["steps"] = torch.tensor(made["steps"], device=device)
        inputs.append(made["steps"])

    def run() -> list[Tensor]:
        if "steps" in made:
            made["steps"] += 1
        case.run({**made, "impl": impl})
        return [tensor for name in ("params", *case.states) for tensor in made[name]]

    return Call(inputs, run)


def check(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> None:
    """Raise AssertionError unless the step is right inside the mask and changes nothing outside.

    Gradients hold NaN outside, so that whatever they touch there shows.
    """
    arguments, before = case.make(seed, device), case.make(seed, device)
    inside = case.mask.dense(case.shape, device)
    for grad in arguments["grads"]:
        if not case.packed:
            grad[~inside] = math.nan
    plain = torch_optim(case, before, state_dtype(case.dtype))
    exact = torch_optim(case, before, torch.float64)
    with poisoned():
        case.run({**arguments, "impl": impl})
    for name in ("params", *case.states):
        for i, tensor in enumerate(arguments[name]):
            what = f"{case.name}: {name}[{i}]"
            expected = plain[name][i].to(tensor.dtype)
            assert_within_budget(picked(tensor, inside), expected, exact[name][i], what=what)
            if tensor.shape != inside.shape:
                continue
            if not torch.equal(tensor[~inside], before[name][i][~inside]):
                raise AssertionError(f"{what} has changed outside the mask")


def flops(case: Case) -> int:
    """FLOPs of one step, counting a square root or a division as one."""
    if case.rule == "adamw":
        count = 13 + (case.weight_decay != 0)
    else:
        momentum = case.momentum != 0
        count = 2 + 2 * momentum + 2 * (momentum and case.nesterov) + 2 * (case.weight_decay != 0)
    return count * case.tensors * case.mask.numel(case.shape)


def bytes_moved(case: Case) -> int:
    """Bytes of one step if what is inside the mask moves once; the mask itself does not count."""
    state = len(case.states) * state_dtype(case.dtype).itemsize
    read_write = 2 * (case.dtype.itemsize + state)
    return (case.dtype.itemsize + read_write) * case.tensors * case.mask.numel(case.shape)


def gpu_cases(scale: int = 1) -> list[tuple[Case, Bars]]:
    """What is timed on a GPU, sizes divided by ``scale``, and what is promised there: of the
    bandwidth where numbers lie side by side, of torch's time where all are updated.
    """
    bandwidth = {FLOOR: 1 / 0.85}
    promised: dict[str, Bars] = {
        "adamw-full": {"fused AdamW": 1.0, **bandwidth},
        "adamw-prefix-half": bandwidth,
        "adamw-index-half": {},
        "adamw-packed-0.5%": {},
        "adamw-element-5%": {},
        "adamw-block-quarter": {},
        "sgd-full": {},
    }
    # Blocks are of 32.
    made = _bench_cases(max(1024 // scale, 64), max(160 // scale, 1))
    cases = {case.name: case for case in made}
    return [(cases[name], bars) for name, bars in promised.items()]


def contest(
    case: Case, *, device: torch.device | str = "cpu", impl: str = "auto", seed: int = 0
) -> Contest:
    """A step inside the mask against one of everything, ours or torch's fused one."""
    arguments = {**case.make(seed, device), "impl": impl}
    everything = replace(case, mask=Full(), packed=False).make(seed, device)
    params = everything["params"]
    for param, grad in zip(params, everything["grads"], strict=True):
        param.grad = grad
    rule = torch.optim.AdamW if case.rule == "adamw" else torch.optim.SGD
    options: dict[str, Any] = {**case.options, "fused": True}
    if case.rule == "adamw" and torch.device(device).type == "cuda":
        # Its counts of steps are on the device then, as a CUDA graph needs them.
        options["capturable"] = True
    optimizer = rule(params, **options)

    def step(arguments: dict[str, Any]) -> Callable[[], object]:
        def run() -> object:
            case.run(arguments)
            return arguments["params"]

        return run

    def fused() -> object:
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        return params

    baselines = {f"fused {rule.__name__}": fused}
    if case.mask != Full():
        baselines["all of it"] = step(everything)
    bar = _BARS.get(case.name.removeprefix("adamw-"))
    return Contest(step(arguments), baselines, flops(case), bytes_moved(case), bar)


_SHAPES = ((7,), (6, 5), (5, 4, 3, 3))


def _cases(rule: str) -> tuple[Case, ...]:
    every_mask = [
        Case(f"{rule}-{name}-{len(shape)}d", rule, shape, mask)
        for shape in _SHAPES
        for name, mask in masks(shape).items()
    ]
    kinds = [replace(case, tensors=3) for case in every_mask if len(case.shape) == 4]
    layouts = [
        replace(case, name=f"{case.name}-{layout}", layout=layout)
        for case in kinds
        for layout in ("permuted", "sliced", "channels_last")
    ]
    dtypes = [
        replace(case, name=f"{case.name}-{str(dtype)[6:]}", dtype=dtype)
        for case in kinds
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    ]
    edges = [
        Case(f"{rule}-scalar", rule, (), Full()),
        Case(f"{rule}-scalar-element", rule, (), Element(torch.tensor(True))),
        Case(f"{rule}-empty", rule, (0, 3), Full()),
        Case(f"{rule}-nothing", rule, (4, 3), Prefix(0, 2)),
        Case(f"{rule}-no-element", rule, (4, 3), Element(torch.zeros(4, 3, dtype=torch.bool))),
        Case(f"{rule}-no-decay", rule, (6, 5), Prefix(2, 3), weight_decay=0.0),
        # Longer than a vector register, a cache line and a thread's share.
        Case(f"{rule}-long", rule, (300, 257), Prefix(129, 133)),
        *(
            replace(case, name=f"{case.name}-state", packed=True)
            for case in (*every_mask, *layouts, *dtypes)
            if isinstance(case.mask, Packed)
        ),
        Case(f"{rule}-packed-nothing", rule, (4, 3), Packed([]), packed=True),
        Case(f"{rule}-packed-long", rule, (300, 257), Packed(range(3, 77000, 7)), packed=True),
    ]
    return (*every_mask, *layouts, *dtypes, *edges)


CASES = (
    *_cases("sgd"),
    *_cases("adamw"),
    *(
        Case(f"sgd-{name}-{kind}", "sgd", (6, 5), mask, momentum=momentum, nesterov=False)
        for name, mask in (("prefix", Prefix(4, 3)), ("full", Full()))
        for kind, momentum in (("momentum", 0.9), ("plain", 0.0))
    ),
)


def _bench_masks(width: int) -> dict[str, Mask]:
    generator = torch.Generator().manual_seed(width)
    half, quarter = width // 2, width // 4
    scattered = torch.randperm(width, generator=generator)[:half].sort().values
    random = torch.rand(width, width, generator=generator)
    return {
        "full": Full(),
        "prefix-half": Prefix(half, half),
        "prefix-quarter": Prefix(quarter, quarter),
        "index-half": Index(scattered, scattered),
        "block-quarter": Block(random[: width // 32, : width // 32] < 0.25, 32),
        **{
            f"{kind}-{share:g}%": make(random < share / 100)
            for share in (5, 2, 0.5)
            for kind, make in (("element", Element), ("packed", _packed))
        },
    }


def _packed(inside: Tensor) -> Packed:
    return Packed(inside.flatten().nonzero().flatten())


def _bench_cases(width: int, tensors: int) -> tuple[Case, ...]:
    return tuple(
        Case(f"{rule}-{name}", rule, (width, width), mask, tensors=tensors, packed=packed)
        for rule in ("sgd", "adamw")
        for name, mask in _bench_masks(width).items()
        for packed in [isinstance(mask, Packed)]
    )


BENCH_CASES = _bench_cases(1024, 40)

# AdamW's time as a share of that of a step of everything. Bytes are not all: the parts of rows,
# single lines and single elements move more slowly than what is read in order.
_BARS = {
    "full": 1.03,
    "prefix-half": 0.42,
    "prefix-quarter": 0.14,
    "index-half": 0.7,
    "element-5%": 1.1,
    "element-2%": 0.7,
    "element-0.5%": 0.25,
    "packed-5%": 0.42,
    "packed-0.5%": 0.07,
}

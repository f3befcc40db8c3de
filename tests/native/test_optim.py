"""Optimizer steps in C++ against the reference: bit for bit, every selection, layout and ISA."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import partial_kernels as pk
from partial_kernels._core import region_cases
from partial_kernels._core.region_cases import LAYOUTS, arranged
from partial_kernels._core.regions import EVERYTHING
from partial_kernels._native import native_status
from partial_kernels.masks import Difference, Mask
from partial_kernels.optim.cases import CASES, Case, check
from partial_kernels.optim.reference import ADAMW, SGD, state_dtype

status = native_status()
pytestmark = [
    pytest.mark.skipif(not status.available, reason=f"no compiled library: {status.reason}"),
    pytest.mark.usefixtures("correct_roots"),
]

RULES = ("sgd", "adamw")
both_rules = pytest.mark.parametrize("rule", RULES)


def lists_of(case: Case) -> tuple[str, ...]:
    return ("params", "grads", *case.states)


def storages(case: Case, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """All memory that belongs to the tensors, what lies between their elements included."""
    return {
        f"{name}[{i}]": torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
        for name in lists_of(case)
        for i, tensor in enumerate(arguments[name])
    }


def assert_same_memory(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal bit for bit, but for what kind of NaN something is."""
    for (name, mine), other in zip(
        storages(case, ours).items(), storages(case, theirs).values(), strict=True
    ):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[mine.element_size()]
        same = (mine.view(bits) == other.view(bits)) | (mine.isnan() & other.isnan())
        wrong = int((~same).sum())
        assert wrong == 0, f"{case.name}: {wrong} of {same.numel()} elements of {name} differ"


def assert_is_reference(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Three steps of native on ``ours`` and of the reference on ``theirs``: the same memory."""
    for _ in range(3):
        case.run({**ours, "impl": "native"})
        case.run({**theirs, "impl": "reference"})
    assert_same_memory(case, ours, theirs)


@pytest.fixture
def fused(isa: str) -> None:
    """Kernels with torch's fused multiply-adds, which portable ones have where torch does."""
    if isa == "portable" and platform.machine() in ("x86_64", "AMD64"):
        pytest.skip("this ISA has no fused multiply-add")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("isa")
def test_case(case: Case) -> None:
    check(case, impl="native")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("fused")
def test_it_is_the_reference_bit_for_bit(case: Case) -> None:
    assert_is_reference(case, case.make(), case.make())


_UNFUSED = """
import torch
import conftest
import test_optim as t
torch.Tensor.sqrt = conftest.ieee_sqrt
for case in t.CASES:
    t.assert_is_reference(case, case.make(), case.make())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="has no such torch")
def test_portable_kernels_are_torch_without_fused_multiply_adds_bit_for_bit() -> None:
    settings = {"ATEN_CPU_CAPABILITY": "default", "PARTIAL_KERNELS_ISA": "portable"}
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", _UNFUSED],
        env={**os.environ, **settings, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def half(size: int, seed: int = 0) -> list[int]:
    """Half of the indices below size, at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[: size // 2].sort().values.tolist()


def random(shape: tuple[int, ...], density: float) -> pk.Element:
    return pk.Element(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density)


def packed(shape: tuple[int, ...], density: float) -> pk.Packed:
    return pk.Packed(random(shape, density).mask.flatten().nonzero().flatten())


# Longer than one chunk of work, in each of the ways to select, in one and in many rows.
LARGE: dict[str, tuple[tuple[int, ...], Mask]] = {
    "full": ((70_003,), pk.Full()),
    "many rows": ((401, 163), pk.Prefix(390, 101)),
    "nearly whole rows": ((130, 163), pk.Prefix(None, 141)),
    "short rows": ((9001, 5), pk.Prefix(None, 3)),
    "long rows": ((3, 40_001), pk.Prefix(2, 33_333)),
    "index of rows": ((300, 257), pk.Index(half(300))),
    "index of columns": ((300, 257), pk.Index(None, half(257))),
    "index": ((300, 257), pk.Index(half(300, 1), half(257, 2))),
    "index of a few": ((300, 257), pk.Index([5, 299], [0, 255, 256])),
    "index of one": ((300, 257), pk.Index([7], [200])),
    "index of many columns": ((2, 60_001), pk.Index(None, half(60_001))),
    "index of kernels": ((40, 60, 3, 3), pk.Index(half(40), half(60))),
    "index of wide kernels": ((40, 60, 9, 9), pk.Index(half(40), half(60))),
    "sparse": ((500, 401), random((500, 401), 0.01)),
    "half": ((500, 401), random((500, 401), 0.5)),
    "vector": ((200_005,), random((200_005,), 0.3)),
    "packed": ((500, 401), packed((500, 401), 0.05)),
    "packed kernels": ((50, 40, 7, 7), packed((50, 40, 7, 7), 0.1)),
    "block": ((300, 257), pk.Block(random((10, 9), 0.4).mask, 32)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LARGE)
@both_rules
@pytest.mark.usefixtures("fused")
def test_chunks_and_threads(
    name: str, rule: str, dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    shape, mask = LARGE[name]
    case = Case(name, rule, shape, mask, dtype, tensors=2)
    ours = case.make()
    set_threads(2)
    assert_is_reference(case, ours, case.make())
    single = case.make()
    set_threads(1)
    for _ in range(3):
        case.run({**single, "impl": "native"})
    assert_same_memory(case, ours, single)


@pytest.mark.parametrize("layout", ["permuted", "sliced"])
@pytest.mark.parametrize("name", ["many rows", "index", "index of kernels", "half", "packed"])
@both_rules
def test_chunks_of_other_layouts(name: str, rule: str, layout: str) -> None:
    shape, mask = LARGE[name]
    case = Case(name, rule, shape, mask, layout=layout)
    assert_is_reference(case, case.make(), case.make())


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_any_shape_and_any_strides(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(2, 21), min_size=1, max_size=4)))
    kinds = region_cases.masks(shape)
    mask = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    case = Case("", data.draw(st.sampled_from(RULES)), shape, mask, dtype)
    layouts = [name for name in LAYOUTS if name != "channels_last" or len(shape) == 4]
    chosen = {name: data.draw(st.sampled_from(layouts)) for name in lists_of(case)}

    def made() -> dict[str, Any]:
        arguments = case.make()
        for name, layout in chosen.items():
            arguments[name] = [arranged(tensor, layout) for tensor in arguments[name]]
        return arguments

    assert_is_reference(case, made(), made())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["full", "index", "element", "packed"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@both_rules
@pytest.mark.usefixtures("fused")
def test_zeros_infinities_nans_and_denormals(
    name: str, rule: str, dtype: torch.dtype, decay: float
) -> None:
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    special = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]
    special += [tiny, -tiny / 4, tiny * torch.finfo(dtype).eps, huge, -huge]
    values = torch.tensor(special, dtype=torch.float64)
    combinations = torch.cartesian_prod(values, values, values)
    shape = (len(combinations) // 12, 12)
    mask = region_cases.masks(shape)[name]
    case = Case(name, rule, shape, mask, dtype, weight_decay=decay)

    def made() -> dict[str, Any]:
        arguments = case.make()
        columns = {"params": 0, "grads": 1, "exp_avgs": 2, "exp_avg_sqs": 0}
        for key in lists_of(case):
            column = combinations[:, columns.get(key, 2)].reshape(shape)
            arguments[key] = [column.to(arguments[key][0].dtype)]
        return arguments

    assert_is_reference(case, made(), made())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("grad_dtype", ["params'", "states'"])
@both_rules
@pytest.mark.usefixtures("fused")
def test_half_precision_is_rounded_once(rule: str, dtype: torch.dtype, grad_dtype: str) -> None:
    # Every number that there is, each moved by up to a few units in the last place.
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    moved = torch.randn(len(every), generator=generator) * every.float().abs() * 2**-8
    case = Case("every", rule, (len(every),), pk.Full(), dtype)

    def made() -> dict[str, Any]:
        arguments = case.make()
        grad = moved if grad_dtype == "states'" else moved.to(dtype)
        return {**arguments, "params": [every.clone()], "grads": [grad], "lr": 1.0}

    assert_is_reference(case, made(), made())


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.3, 0.5), "weight_decay": 0.0},
        {"betas": (0.5, 0.999), "lr": 0.3},
        {"betas": (0.0, 0.0), "eps": 0.0},
        {"betas": (0.9, 0.999), "lr": torch.tensor(0.02), "steps": [10**6, 1, 7]},
    ],
)
@pytest.mark.usefixtures("fused")
def test_options_of_adamw(options: dict[str, Any]) -> None:
    case = Case("options", "adamw", (70, 33), pk.Prefix(65, 31), tensors=3)
    assert_is_reference(case, {**case.make(), **options}, {**case.make(), **options})


@both_rules
def test_gradients_may_be_expanded(rule: str) -> None:
    case = Case("expanded", rule, (70, 33), pk.Prefix(65, 31))
    ours, theirs = case.make(), case.make()
    for arguments in (ours, theirs):
        arguments["grads"] = [torch.tensor(0.5).expand(70, 33)]
    assert_is_reference(case, ours, theirs)


@both_rules
def test_regions_of_one_tensor_beside_each_other_in_two_threads(
    rule: str, set_threads: Callable[[int], None]
) -> None:
    core, columns = pk.Prefix(301, 203), pk.Index(None, list(range(203, 403, 2)))
    regions: list[Mask] = [core, Difference(pk.Prefix(None, 203), core), columns]
    case = Case("regions", rule, (401, 403), pk.Full())

    def made() -> dict[str, Any]:
        arguments = case.make()
        return {
            name: value * 3 if isinstance(value, list) else value
            for name, value in arguments.items()
        } | {"masks": regions}

    set_threads(2)
    assert_is_reference(case, made(), made())


def direct(case: Case, arguments: dict[str, Any]) -> list[Any]:
    """Arguments of the op that does not know masks; element 0 of the list is right."""
    count = len(arguments["params"])
    lists = [list(arguments[name]) for name in lists_of(case)]
    where = [[EVERYTHING[k]] * count for k in range(3)]
    lr = torch.tensor(0.01)
    if case.rule == "sgd":
        return [*lists, *where, lr, 0.9, True, 0.1, "native"]
    steps = list(range(1, 1 + count)), None
    return [*lists, *where, *steps, lr, 0.9, 0.99, 1e-8, 0.1, "native"]


FAULTS: dict[str, tuple[int, Any]] = {
    "rows": (0, torch.tensor([0, 6])),
    "negative rows": (0, torch.tensor([-1, 2])),
    "rows of int32": (0, torch.tensor([0, 1], dtype=torch.int32)),
    "cols": (1, torch.tensor([0, 5])),
    "positions": (2, torch.tensor([0, 30])),
    "mask of another shape": (2, torch.ones(5, 6, dtype=torch.bool)),
}


@pytest.mark.parametrize("fault", [*FAULTS, "gradient", "state", "dtype", "short list"])
@both_rules
def test_errors_leave_everything_as_it_was(rule: str, fault: str) -> None:
    case = Case(fault, rule, (6, 5), pk.Full(), tensors=2)
    arguments = case.make()
    args = direct(case, arguments)
    first = len(lists_of(case))
    if fault in FAULTS:
        position, selection = FAULTS[fault]
        args[first + position] = [None, selection]
    elif fault == "gradient":
        args[1][1] = args[1][1][:3]
    elif fault == "state":
        args[2][1] = args[2][1].bfloat16()
    elif fault == "dtype":
        args[1][1] = args[1][1].double()
    else:
        args[2].pop()
    with pytest.raises(RuntimeError), torch.no_grad():
        (SGD if rule == "sgd" else ADAMW)(*args)
    assert_same_memory(case, arguments, case.make())


@both_rules
def test_it_is_preferred_and_says_what_it_cannot_do(rule: str) -> None:
    case = Case("choice", rule, (6, 5), pk.Prefix(3, 2))
    choice = pk.explain("masked_adamw_" if rule == "adamw" else "masked_sgd_", **case.make())
    assert choice.backend == "native"
    arguments = case.make(device="meta")
    _, choice = (SGD if rule == "sgd" else ADAMW).choose(*direct(case, arguments))
    assert choice.reasons["native"] == "it runs on the CPU, got meta"


def test_states_have_the_dtype_of_the_arithmetic() -> None:
    assert {state_dtype(case.dtype) for case in CASES} == {torch.float32, torch.float64}

"""Registration, choice of backend, ``explain``, discovery, and the helpers that judge results."""

from __future__ import annotations

import ast
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from partial_kernels._core import discovery
from partial_kernels._core.ops import IMPL_VARIABLE, Backend, Choice, Explained, Op, explaining
from partial_kernels._core.testing import (
    assert_within_budget,
    assert_zero_outside,
    max_error,
    poisoned,
)

# Ops are registered once a process: these three serve every test, with backends set by fixtures.
DOUBLE = Op(
    "test_core_double(Tensor x, str impl) -> Tensor",
    fake=lambda x, impl: x.new_empty(x.shape),
    flops=lambda x_shape, *_, **__: 10 * math.prod(x_shape),
)
SCALE_ = Op(
    "test_core_scale_(Tensor(a!) x, float by, str impl) -> ()", fake=lambda x, by, impl: None
)
ZERO_LIST_ = Op("test_core_zero_(Tensor(a!)[] xs, Tensor y, str impl) -> ()", fake=lambda *_: None)


@SCALE_.backend("reference")
def _scale(x: Tensor, by: float) -> None:
    # Through numpy, autograd's version counter sees nothing, as with a kernel of our own.
    x.detach().numpy()[...] *= by


@ZERO_LIST_.backend("reference")
def _zero(xs: list[Tensor], y: Tensor) -> None:
    for x in xs:
        x.detach().numpy()[...] = 0


@pytest.fixture
def double() -> Iterator[Op]:
    """DOUBLE with "slow", which takes anything, and "fast", added later, which wants 4 elements."""
    DOUBLE.backends.clear()
    DOUBLE.backend("slow")(lambda x: x + x)
    DOUBLE.backend(
        "fast", lambda x: None if x.numel() == 4 else f"needs 4 elements, got {x.numel()}"
    )(lambda x: 2 * x + 1000)
    yield DOUBLE
    DOUBLE.backends.clear()


class Recorder(TorchDispatchMode):
    """Names of the operators that ran within it."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_auto_takes_the_latest_backend_that_can(double: Op) -> None:
    assert double(torch.ones(4), "auto").tolist() == [1002.0] * 4
    assert double(torch.ones(3), "auto").tolist() == [2.0] * 3
    assert double(torch.ones(4), "slow").tolist() == [2.0] * 4


def test_choice_names_every_other_backend_and_why_not(double: Op) -> None:
    chosen, choice = double.choose(torch.ones(4), "auto")
    assert isinstance(chosen, Backend) and chosen.name == "fast"
    assert choice == Choice("test_core_double", "fast", {"slow": "fast is preferred"})
    _, choice = double.choose(torch.ones(3), "auto")
    assert choice == Choice("test_core_double", "slow", {"fast": "needs 4 elements, got 3"})
    _, choice = double.choose(torch.ones(4), "slow")
    assert choice.reasons == {"fast": "impl='slow' was asked for"}
    assert str(choice) == "test_core_double: slow\n  not fast: impl='slow' was asked for"


def test_explicit_impl_never_falls_back(double: Op) -> None:
    with pytest.raises(RuntimeError, match=r"not fast: needs 4 elements, got 3"):
        double(torch.ones(3), "fast")
    with pytest.raises(RuntimeError, match=r"not cuda: test_core_double has no such backend"):
        double(torch.ones(4), "cuda")


def test_no_backend_at_all_is_an_error(double: Op) -> None:
    double.backends.pop()
    with pytest.raises(RuntimeError, match=r"no backend can run this\n  not fast: needs 4"):
        double(torch.ones(3), "auto")


def test_environment_overrides_auto_only(double: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IMPL_VARIABLE, "slow")
    assert IMPL_VARIABLE == "PARTIAL_KERNELS_IMPL"
    assert double(torch.ones(4), "auto").tolist() == [2.0] * 4
    assert double(torch.ones(4), "fast").tolist() == [1002.0] * 4
    monkeypatch.setenv(IMPL_VARIABLE, "fast")
    with pytest.raises(RuntimeError, match="needs 4 elements, got 3"):
        double(torch.ones(3), "auto")


def test_environment_reaches_public_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IMPL_VARIABLE, "missing")
    call: dict[str, Any] = {"mask": pk.Prefix(1)}
    with pytest.raises(RuntimeError, match="submatrix_forward has no such backend"):
        pk.masked_linear(torch.ones(1, 2), torch.ones(2, 2), **call)
    choice = pk.explain("masked_linear", torch.ones(1, 2), torch.ones(2, 2), **call)
    assert choice.backend is None
    assert choice.reasons["missing"] == "submatrix_forward has no such backend"


class Sub(torch.Tensor):
    """A subclass that asks for nothing."""


def _observers() -> dict[str, tuple[AbstractContextManager[Any], Any]]:
    """Contexts and arguments that only the dispatcher treats rightly."""
    ones = torch.ones(4)
    return {
        "autograd": (torch.enable_grad(), ones),
        "mode": (Recorder(), ones),
        "profiler": (torch.profiler.profile(), ones),
        "meta": (nullcontext(), ones.to("meta")),
        "subclass": (nullcontext(), ones.as_subclass(Sub)),
    }


@pytest.mark.parametrize("observer", [None, "vmap", *_observers()])
@torch.no_grad()
def test_the_dispatcher_is_passed_by_where_nobody_looks_on(
    double: Op, monkeypatch: pytest.MonkeyPatch, observer: str | None
) -> None:
    dispatched: list[str] = []
    dispatch = double._call
    monkeypatch.setattr(
        double, "_call", lambda *args: (dispatched.append(double.name), dispatch(*args))[1]
    )
    context, x = _observers().get(observer or "", (nullcontext(), torch.ones(4)))
    transform = torch.vmap if observer == "vmap" else lambda call: call
    with context:
        found = transform(lambda x: double(x, "auto"))(x)
    assert found.shape == x.shape
    assert dispatched == ([double.name] if observer else [])


def test_ops_are_traced_by_their_fakes(double: Op) -> None:
    double.backends.clear()
    assert double(torch.ones(2, 3, device="meta"), "auto").shape == (2, 3)
    torch.library.opcheck(
        torch.ops.partial_kernels.test_core_scale_.default, (torch.ones(3), 2.0, "auto")
    )


def test_flop_formula_counts_once(double: Op) -> None:
    counter = FlopCounterMode(display=False)
    with counter:
        double(torch.ones(2, 3), "auto")
    assert counter.get_total_flops() == 60


def test_in_place_ops_bump_versions() -> None:
    x, other = torch.ones(3), torch.ones(3)
    before = x._version
    SCALE_(x, 3.0, "auto")
    assert x.tolist() == [3.0] * 3
    assert x._version > before
    before = x._version
    ZERO_LIST_([x, other], y := torch.ones(2), "auto")
    assert x._version > before and other._version > 0 and y._version == 0


def test_autograd_refuses_stale_tensors_after_an_in_place_op() -> None:
    x = torch.ones(3, requires_grad=True)
    saved = x * 1
    y = saved.square()
    with torch.no_grad():
        SCALE_(saved, 3.0, "auto")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_explaining_an_in_place_op_changes_nothing() -> None:
    x = torch.ones(3)
    with pytest.raises(Explained) as explained, explaining():
        SCALE_(x, 3.0, "auto")
    assert explained.value.choice == Choice("test_core_scale_", "reference", {})
    assert x.tolist() == [1.0] * 3 and x._version == 0
    SCALE_(x, 3.0, "auto")
    assert x.tolist() == [3.0] * 3


@pytest.mark.usefixtures("small_layers_use_ops")
def test_explain_names_the_backend_and_computes_nothing(
    mask: pk.Mask, make: Callable[..., dict[str, Any]]
) -> None:
    made = make()
    impl = "auto" if isinstance(mask, pk.Full) else "reference"
    with Recorder() as recorder:
        choice = pk.explain("masked_linear", **made, impl=impl)
    if isinstance(mask, pk.Full):
        assert (choice.op, choice.backend) == ("masked_linear", "torch")
        return
    assert choice.backend == "reference"
    assert choice.op.endswith("_forward") and choice.op in str(choice)
    assert set(choice.reasons) >= set(discovery.unavailable())
    # The op is reached, and before it only views are made; a Packed mask is laid out first.
    *before, last = recorder.ran
    assert last == f"partial_kernels::{choice.op}"
    views = {"aten::view", "aten::detach", "aten::alias"}
    assert set(before) <= views or isinstance(mask, pk.Packed)
    assert not {"aten::mm", "aten::addmm", "aten::linear"} & set(before)
    with Recorder() as recorder:
        pk.masked_linear(**made)
    assert last in recorder.ran


def test_a_small_prefix_is_left_to_plain_pytorch() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 6)
    choice = pk.explain("masked_linear", x, weight, mask=pk.Prefix(2, 3))
    assert choice.backend == "torch" and "65536 weights" in choice.reasons["partial_kernels"]
    for mask, wide in (
        (pk.Index([0, 1], [0, 1, 2]), weight),
        (pk.Prefix(2, 3), weight.repeat(256, 64)),
    ):
        assert pk.explain("masked_linear", x, wide, mask=mask).backend != "torch"
    named = pk.explain("masked_linear", x, weight, mask=pk.Prefix(2, 3), impl="reference")
    assert named.backend == "reference"


def test_explain_says_why_a_named_backend_cannot_run() -> None:
    choice = pk.explain(
        "masked_linear", torch.ones(1, 2), torch.ones(2, 2), mask=pk.Prefix(1), impl="cuda"
    )
    assert choice.backend is None
    assert choice.reasons["cuda"] == "submatrix_forward has no such backend"
    assert choice.reasons["reference"] == "impl='cuda' was asked for"


def test_explain_checks_arguments_as_the_call_does() -> None:
    with pytest.raises(ValueError, match=r"partial_kernels has no function 'no_such'"):
        pk.explain("no_such")
    with pytest.raises(ValueError, match=r"partial_kernels has no function '__version__'"):
        pk.explain("__version__")
    with pytest.raises(ValueError, match="x must have 2 features"):
        pk.explain("masked_linear", torch.ones(1, 3), torch.ones(2, 2), mask=pk.Prefix(1))
    # The failure left nothing behind: calls compute again.
    assert pk.masked_linear(torch.ones(1, 2), torch.ones(2, 2), mask=pk.Prefix(1)).tolist() == [[2]]


def test_explain_says_why_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        call = torch.ones(1, 2), torch.ones(2, 2)
        return pk.explain("masked_linear", *call, mask=pk.Prefix(1)).reasons["triton"]

    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(discovery.importlib.util, "find_spec", lambda name: None)
    assert reason() == "triton is not installed"


def test_families_are_found_by_their_folders() -> None:
    root = Path(discovery.__file__).parents[1]
    found = discovery.families()
    assert {"submatrix", "element", "blocksparse"} <= set(found)
    for family in found:
        present = {path.stem for path in (root / family).glob("*.py")}
        assert {"__init__", "function", "reference", "cases"} <= present, family


def test_type_checkers_see_the_names_that_discovery_finds() -> None:
    assert pk.__file__ is not None
    tree = ast.parse(Path(pk.__file__).read_text(encoding="utf-8"))
    (guarded,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    declared = {
        (node.module, alias.asname or alias.name)
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = {
        (f"partial_kernels.{family}", name)
        for family in discovery.families()
        for name in getattr(discovery.load(family), "__all__", ())
    }
    assert declared == found
    assert {name for _, name in found} <= set(pk.__all__)
    assert pk.__all__ == sorted(pk.__all__)
    assert all(hasattr(pk, name) for name in pk.__all__)


def total(count: int | dict[str, int]) -> int:
    """Of a family that counts by pass, all passes."""
    return sum(count.values()) if isinstance(count, dict) else count


@pytest.mark.parametrize("family", discovery.families())
def test_cases_are_named_and_costed(family: str) -> None:
    module = importlib.import_module(f"{discovery.PACKAGE}.{family}.cases")
    for cases in (module.CASES, module.BENCH_CASES):
        names = [case.name for case in cases]
        assert names
        assert len(set(names)) == len(names)
    for count in (module.flops, module.bytes_moved):
        assert all(total(count(case)) >= 0 for case in module.CASES)
        assert all(total(count(case)) > 0 for case in module.BENCH_CASES)


EXACT = torch.tensor([4.0, -2.0, 1.0], dtype=torch.float64)


def test_budget_is_twice_the_plain_error_plus_one_unit() -> None:
    plain = EXACT.float() + torch.tensor([0.0, 0.25, 0.0])
    assert_within_budget(plain, plain, EXACT)
    assert_within_budget(EXACT.float() - 0.5, plain, EXACT)
    with pytest.raises(
        AssertionError,
        match=r"y: error 0\.501 exceeds the budget of 0\.5 \(plain PyTorch's error 0\.25",
    ):
        assert_within_budget(EXACT.float() + 0.501, plain, EXACT, what="y")
    unit = 4 * torch.finfo(torch.float32).eps
    assert_within_budget(EXACT.float() + torch.tensor([unit, 0, 0]), EXACT.float(), EXACT)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(EXACT.float() + torch.tensor([0, 0, 2 * unit]), EXACT.float(), EXACT)


@pytest.mark.parametrize(
    ("actual", "plain"),
    [
        (torch.tensor([4.0, math.nan, 1.0]), EXACT.float()),
        (EXACT.float(), torch.tensor([4.0, math.inf, 1.0])),
        (EXACT.float(), torch.tensor([4.0, math.nan, 1.0])),
        (EXACT.float()[:2], EXACT.float()),
        (EXACT.float()[None], EXACT.float()),
        (EXACT, EXACT.float()),
    ],
    ids=["nan", "plain-inf", "plain-nan", "shorter", "broadcast", "dtype"],
)
def test_budget_cannot_be_evaded(actual: Tensor, plain: Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_within_budget(actual, plain, EXACT)


def test_budget_needs_fp64_truth() -> None:
    with pytest.raises(TypeError, match=r"exact must be float64, got torch\.float32"):
        assert_within_budget(EXACT.float(), EXACT.float(), EXACT.float())
    assert max_error(torch.ones(0), torch.ones(0)) == 0


def test_zero_outside() -> None:
    mask = torch.tensor([True, True, False])
    assert_zero_outside(torch.tensor([0.0, 2.0, 0.0]), mask)
    assert_zero_outside(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    for outside in (1e-30, math.nan):
        with pytest.raises(AssertionError, match="dw: 1 of 1 elements off the mask are not 0"):
            assert_zero_outside(torch.tensor([1.0, 2.0, outside]), mask, what="dw")
    with pytest.raises(AssertionError, match="all 2 elements on the mask are 0"):
        assert_zero_outside(torch.zeros(3), mask)


def test_poisoned_memory_is_nan_and_settings_return() -> None:
    torch.use_deterministic_algorithms(False)
    with poisoned():
        assert torch.empty(64).isnan().all()
        assert torch.empty(8, dtype=torch.int64).unique().tolist() == [2**63 - 1]
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="boom"), poisoned():
        raise RuntimeError("boom")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_full_mask_is_explained_and_run_by_torch_alone(monkeypatch):
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.functional.linear", None)
        choice = pk.explain("masked_linear", x, weight, mask=pk.Full())
    assert choice.backend == "torch"
    with pytest.raises(RuntimeError, match="impl='reference' cannot run it"):
        pk.masked_linear(x, weight, mask=pk.Full(), impl="reference")


def test_a_mask_of_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of \['Block', .*got 'ByContent'"):
        pk.Mask.from_state({"kind": "ByContent"})

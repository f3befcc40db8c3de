"""``masked_linear`` as torch's compilers see it: opcheck, torch.compile, torch.export."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

import partial_kernels as pk

# Dynamo makes instances of autograd.Function and inductor uses torch.jit, against torch's advice.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("small_layers_use_ops"),
]

Make = Callable[..., dict[str, Any]]


def results(function: Callable[..., Tensor], made: dict[str, Any]) -> list[Tensor]:
    """y and every gradient there is."""
    y = function(**made)
    leaves = [v for v in made.values() if isinstance(v, Tensor) and v.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y).cumsum(0))]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Calls(TorchDispatchMode):
    """Calls of our operators made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "partial_kernels":
            detached = (a.detach() if isinstance(a, Tensor) else a for a in args)
            self.made.append((func, tuple(detached)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("changes", "autocast"),
    [
        ({}, True),
        ({"batch": (0,), "bias": False}, False),
        ({"x_layout": "permuted", "weight_layout": "permuted", "dtype": torch.bfloat16}, False),
    ],
    ids=["autocast", "no-token", "permuted"],
)
def test_opcheck(make: Make, mask: pk.Mask, changes: dict[str, Any], autocast: bool) -> None:
    with Calls() as calls, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        results(pk.masked_linear, make(**changes))
    steps = [str(func).rsplit("_", 1)[1] for func, _ in calls.made]
    full = isinstance(mask, pk.Full)
    assert steps == ([] if full else ["forward.default", "dx.default", "dweight.default"])
    for func, args in calls.made:
        torch.library.opcheck(func, args)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> dict[str, list[GraphModule]]:
    return {"forward": [], "backward": []}


@pytest.fixture
def recording(graphs: dict[str, list[GraphModule]]) -> Any:
    """A backend like "aot_eager" that keeps the graphs it compiled."""

    def keep(kind: str) -> Callable[..., Any]:
        def compile_graph(graph: GraphModule, inputs: Any) -> Any:
            graphs[kind].append(graph)
            return make_boxed_func(graph.forward)

        return compile_graph

    return aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))


def called(graphs: list[GraphModule]) -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.graph.nodes}


def test_compiles_once_for_every_batch_size(
    make: Make, mask: pk.Mask, recording: Any, graphs: dict[str, list[GraphModule]]
) -> None:
    compiled = torch.compile(pk.masked_linear, backend=recording, fullgraph=True, dynamic=True)
    # No size equals another: dynamo takes equal ones for the same.
    for count, batch in enumerate([(11, 17), (13, 19), (31, 23)]):
        made = make(batch=batch)
        with torch.compiler.set_stance("fail_on_recompile" if count else "default"):
            ours = results(compiled, made)
        assert equal(ours, results(pk.masked_linear, made))
    assert [len(kind) for kind in graphs.values()] == [1, 1]
    if not isinstance(mask, pk.Full):
        # The graph holds our calls, so that a backend is chosen when it runs; no product is traced.
        forward, backward = called(graphs["forward"]), called(graphs["backward"])
        assert sum("_forward.default" in name for name in forward) == 1
        assert sum(name.endswith(("_dx.default", "_dweight.default")) for name in backward) == 2
        assert not {"aten.mm.default", "aten.addmm.default"} & (forward | backward)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
@pytest.mark.parametrize("mask", [pk.Prefix(5, 4), pk.Packed([3, 20])], ids=repr)
def test_compiles_with_frozen_arguments(make: Make, frozen: str) -> None:
    compiled = torch.compile(pk.masked_linear, backend="aot_eager", fullgraph=True)
    made = make()
    made[frozen].requires_grad_(False)
    assert equal(results(compiled, made), results(pk.masked_linear, made))


def test_compiles_under_autocast(make: Make) -> None:
    def step(**made: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return pk.masked_linear(**made)

    made = make()
    ours = results(torch.compile(step, backend="aot_eager", fullgraph=True), made)
    assert ours[0].dtype == torch.bfloat16
    assert equal(ours, results(step, made))


class Layer(nn.Module):
    def __init__(self, mask: pk.Mask) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return pk.masked_linear(x, self.linear.weight, self.linear.bias, mask=self.mask)


def test_alternating_sub_networks_recompile_only_once_each() -> None:
    layer = Layer(pk.Full())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for step in range(8):
        layer.mask = (pk.Full(), pk.Prefix(5, 4))[step % 2]
        x = torch.randn(3 + step, layer.mask.restricted_shape((8, 6))[1])
        with torch.compiler.set_stance("default" if step < 2 else "fail_on_recompile"):
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("mask", [pk.Prefix(5, 4), pk.Packed([3, 20])], ids=repr)
def test_inductor(make: Make) -> None:
    def step(**made: Any) -> Tensor:
        return 2 * pk.masked_linear(**made).relu()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    made = make(dtype=torch.float64)
    assert equal(results(compiled, made), results(step, made))


def test_exports_with_a_dynamic_batch(mask: pk.Mask) -> None:
    layer = Layer(mask)
    features = mask.restricted_shape((8, 6))[1]
    example = torch.randn(5, features)
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    stored = io.BytesIO()
    torch.export.save(torch.export.export(layer, (example,), dynamic_shapes=dynamic), stored)
    stored.seek(0)
    program = torch.export.load(stored).module()
    for batch in (5, 1, 9):
        x = torch.randn(batch, features)
        assert torch.equal(program(x), layer(x))

"""How often ``lfc_linear`` forms W', and that what it keeps is never another matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from partial_kernels.lfc.cases import plain_lfc
from partial_kernels.lfc.reference import MERGE
from tests.ops.lfc_toolbox import SUPER, saved, tensors


class Merges:
    """Counts how often W' is formed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        backend = MERGE.backends[-1]
        monkeypatch.setattr(MERGE, "backends", [replace(backend, run=self.run)])
        self._run = backend.run

    def run(self, *args: Any) -> Tensor:
        self.count += 1
        return self._run(*args)


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> Merges:
    return Merges(monkeypatch)


def test_reused_until_something_changes(merges: Merges):
    cache = pk.MergeCache()
    made = SUPER.make(requires_grad=True)

    def same() -> None:
        y = pk.lfc_linear(**made, cache=cache)
        torch.testing.assert_close(y, plain_lfc(**made))
        y.sum().backward()

    for _ in range(3):
        same()
    assert merges.count == 1
    for count, name in enumerate(("weight", "u", "v"), start=2):
        with torch.no_grad():
            made[name].add_(1)
        same()
        same()
        assert merges.count == count
    # Another tensor that holds the same is another.
    made["u"] = made["u"].detach().clone().requires_grad_()
    same()
    assert merges.count == 5


@torch.no_grad()
def test_small_batches_use_what_there_is(merges: Merges):
    cache = pk.MergeCache()
    made = SUPER.make()
    few = made["x"][:2]
    pk.lfc_linear(**{**made, "x": few}, cache=cache)
    assert merges.count == 0
    pk.lfc_linear(**made, cache=cache)
    with FlopCounterMode(display=False) as counter:
        pk.lfc_linear(**{**made, "x": few}, cache=cache)
    assert merges.count == 1 and counter.get_total_flops() == 2 * 2 * 13 * 11


def test_what_is_trained_takes_its_form_whatever_was_kept_before():
    made = SUPER.make(requires_grad=True)
    few = {**made, "x": made["x"][:2]}
    cache = pk.MergeCache()
    fresh = pk.lfc_linear(**few, cache=cache)
    pk.lfc_linear(**made, cache=cache)
    assert cache._held is not None
    assert torch.equal(pk.lfc_linear(**few, cache=cache), fresh)
    assert [t.shape for t in saved({**few, "cache": cache})] == [(2, 3)]


def test_checkpoints_are_recomputed_as_they_were():
    cache = pk.MergeCache()
    made = SUPER.make(requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return pk.lfc_linear(**{**made, "x": x}, cache=cache)

    leaves = tensors(made)
    results = []
    for call in (lambda x: checkpoint(layer, x, use_reentrant=False), layer):
        # Few tokens, then many, whose W' is there when the few are computed again.
        cache.clear()
        loss = sum(call(made["x"][:tokens]).square().sum() for tokens in (2, 23))
        results.append(torch.autograd.grad(loss, leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_that_is_used_again_is_not_taken_for_the_old():
    cache = pk.MergeCache()
    for _ in range(50):
        made = SUPER.make()
        pk.lfc_linear(**made, cache=cache)
        address = made["v"].data_ptr()
        # Tensor.data leaves the version as it is; an allocator likes to give memory out again.
        for _ in range(2):
            made["v"].data = made["v"].data + 1
        assert made["v"].data_ptr() != address
        torch.testing.assert_close(pk.lfc_linear(**made, cache=cache), plain_lfc(**made))


def test_dtypes_have_their_own(merges: Merges):
    cache = pk.MergeCache()
    made = SUPER.make()
    for _ in range(2):
        pk.lfc_linear(**made, cache=cache)
        with torch.autocast("cpu", torch.bfloat16):
            assert pk.lfc_linear(**made, cache=cache).dtype == torch.bfloat16
    assert merges.count == 4


def test_what_inference_mode_made_can_be_trained_with(merges: Merges):
    cache = pk.MergeCache()
    made = SUPER.make(requires_grad=True)
    with torch.inference_mode():
        expected = pk.lfc_linear(**made, cache=cache).clone()
    y = pk.lfc_linear(**made, cache=cache)
    y.sum().backward()
    assert torch.equal(y, expected) and merges.count == 1
    with torch.inference_mode():
        made = SUPER.make()
        for _ in range(2):
            pk.lfc_linear(**made, cache=cache)
    assert merges.count == 3


def test_one_matrix_at_most_is_held(monkeypatch: pytest.MonkeyPatch):
    cache = pk.MergeCache()
    made = SUPER.make()
    held: list[bool] = []
    backend = MERGE.backends[-1]

    def run(*args: Any) -> Tensor:
        held.append(cache._held is not None)
        return backend.run(*args)

    monkeypatch.setattr(MERGE, "backends", [replace(backend, run=run)])
    pk.lfc_linear(**made, cache=cache)
    made["weight"].add_(1)
    pk.lfc_linear(**made, cache=cache)
    assert held == [False, False] and cache._held is not None
    cache.clear()
    assert cache._held is None


def test_a_changed_parameter_is_noticed_before_the_backward():
    made = SUPER.make(requires_grad=True)
    y = pk.lfc_linear(**made, cache=pk.MergeCache())
    with torch.no_grad():
        made["u"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_calls_go_past_it():
    torch._dynamo.reset()
    cache = pk.MergeCache()
    made = SUPER.make()

    def step(x: Tensor) -> Tensor:
        return pk.lfc_linear(**{**made, "x": x}, cache=cache)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    compiled(made["x"])
    made["weight"].add_(1)
    torch.testing.assert_close(compiled(made["x"]), plain_lfc(**made))
    assert cache._held is None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_auto_changes_its_form(merges: Merges):
    torch._dynamo.reset()
    compiled = torch.compile(pk.lfc_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens, count in ((23, 1), (3, 1), (29, 2), (4, 2)):
        made = replace(SUPER, batch=(tokens,)).make(requires_grad=True)
        compiled(**made).sum().backward()
        assert merges.count == count

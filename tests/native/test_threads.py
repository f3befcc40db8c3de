"""Every family's kernels at once in several threads, each of which uses several: no races."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

import partial_kernels as pk
from partial_kernels._native import native_status
from partial_kernels.optim.cases import Case as OptimCase
from partial_kernels.packed.cases import Case as PackedCase
from partial_kernels.stats.cases import Case as StatsCase
from partial_kernels.topk.cases import Case as TopKCase

status = native_status()
pytestmark = pytest.mark.skipif(
    not status.available, reason=f"no compiled library: {status.reason}"
)

# Enough work for several threads, not so much that products are split up in another way.
TOKENS, OUTPUTS, INPUTS = 96, 160, 130


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _linear(function: Callable[..., Tensor], made: dict[str, Any]) -> list[Tensor]:
    named = {k: v for k, v in made.items() if isinstance(v, Tensor) and v.is_floating_point()}
    leaves = {name: leaf.clone() for name, leaf in named.items()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != "weight" or function is not pk.packed_linear)
    y = function(**{**made, **leaves})
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return [y, *torch.autograd.grad(y, trained, _random(*y.shape))]


def _masked(mask: pk.Mask) -> list[Tensor]:
    columns = mask.restricted_shape((OUTPUTS, INPUTS))[1]
    made = {"x": _random(TOKENS, columns), "weight": _random(OUTPUTS, INPUTS), "mask": mask}
    # By name: for so small a Prefix "auto" takes plain PyTorch.
    return _linear(pk.masked_linear, {**made, "impl": "native"})


def _optim(case: OptimCase) -> list[Tensor]:
    made = case.make()
    case.run({**made, "impl": "native"})
    return [tensor for name in ("params", *case.states) for tensor in made[name]]


_BITMAP = _random(20, 17) > 0
_ELEMENT = _random(300, 257) > 1
STEPS: dict[str, Callable[[], list[Tensor]]] = {
    "prefix": lambda: _masked(pk.Prefix(70, 60)),
    "index": lambda: _masked(pk.Index(list(range(1, 160, 2)), list(range(0, 130, 3)))),
    "block": lambda: _masked(pk.Block(_BITMAP, 8)),
    "select": lambda: [pk.topk_select(_random(300, 257), 20)],
    "select-columns": lambda: [pk.topk_select(_random(300, 257), 20, per="batch")],
    "topk": lambda: _linear(pk.topk_linear, TopKCase("", (TOKENS,), OUTPUTS, INPUTS, 9).make()),
    "packed": lambda: _linear(
        pk.packed_linear, PackedCase("", (300,), OUTPUTS, INPUTS, 0.05).make()
    ),
    "stats": lambda: list(
        pk.masked_stats(**StatsCase("", (300, 257), pk.Element(_ELEMENT), tensors=3).make())
    ),
    **{
        f"{rule}-{kind}": lambda rule=rule, mask=mask: _optim(
            OptimCase("", rule, (300, 257), mask, tensors=3)
        )
        for rule in ("sgd", "adamw")
        for kind, mask in {
            "full": pk.Full(),
            "index": pk.Index(list(range(0, 300, 2)), list(range(1, 257, 2))),
            "element": pk.Element(_ELEMENT),
        }.items()
    },
    "adamw-packed": lambda: _optim(
        replace(
            OptimCase("", "adamw", (300, 257), pk.Packed(_ELEMENT.flatten().nonzero().flatten())),
            packed=True,
        )
    ),
}


def test_threads_do_not_disturb_each_other(isa: str, set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    callers, rounds = 4, 5
    expected = {name: step() for name, step in STEPS.items()}
    together = Barrier(callers)

    def run(caller: int) -> list[str]:
        torch.set_num_threads(2)
        names = list(STEPS)
        wrong: list[str] = []
        together.wait()
        for turn in range(rounds * len(names)):
            # Half of them do the same thing at the same time, half do something else.
            name = names[(turn + caller // 2 * 5) % len(names)]
            found = STEPS[name]()
            if not all(map(torch.equal, found, expected[name])):
                wrong.append(name)
        return wrong

    with ThreadPoolExecutor(callers) as pool:
        assert [wrong for wrong in pool.map(run, range(callers)) if wrong] == []

"""Calls in CUDA graphs, and calls that do not wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import SubNetwork
from maskedtrain.optim import MaskedAdamW
from tests.gpu.toolbox import (
    DEVICE,
    OWN,
    assert_same,
    call_of,
    captured,
    copies,
    no_waiting,
    own_cases,
    refusal,
    set_to,
    side_stream,
)

pytestmark = [
    pytest.mark.gpu,
    # Some cases have nothing to do.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]

CASES = own_cases(24)


@pytest.mark.parametrize("name", CASES)
def test_a_captured_call_reads_its_inputs_anew(name: str) -> None:
    """Two replays equal two calls, of optimizers two steps."""
    family, case = CASES[name]
    if (why := refusal(family, case, OWN[family])) is not None:
        pytest.skip(why)
    with side_stream() as stream:
        given = call_of(family, case, OWN[family], seed=10).inputs
        eager, call = (call_of(family, case, OWN[family]) for _ in range(2))
        set_to(eager, given)
        expected = [copies(eager.run()) for _ in range(2)]
        replay = captured(call.run, stream)
        set_to(call, given)
        for wanted in expected:
            assert_same(copies(replay()), wanted)


@pytest.mark.parametrize("name", CASES)
def test_a_second_call_does_not_wait_for_the_device(name: str) -> None:
    family, case = CASES[name]
    if (why := refusal(family, case, OWN[family])) is not None:
        pytest.skip(why)
    call = call_of(family, case, OWN[family])
    call.run()
    with no_waiting():
        call.run()


def test_a_captured_training_step_goes_on_counting() -> None:
    """A graph of ``MaskedAdamW(capturable=True)`` takes the steps that eager ones would."""

    def steps(capturable: bool) -> tuple[Callable[[], list[Tensor]], nn.Linear]:
        torch.manual_seed(0)
        layer = nn.Linear(24, 16).to(DEVICE)
        optimizer = MaskedAdamW(layer.parameters(), lr=0.1, capturable=capturable)
        core = SubNetwork(layer, {"weight": pk.Prefix(8, 16), "bias": pk.Prefix(8)}, name="core")
        x = torch.randn(5, 24, device=DEVICE)

        def step() -> list[Tensor]:
            for subnet in (core, None):
                optimizer.zero_grad()
                layer(x).square().sum().backward()
                optimizer.step(subnet)
            return list(layer.parameters())

        return step, layer

    with side_stream() as stream:
        eager, expected = steps(capturable=False)
        for _ in range(4):
            eager()
        step, layer = steps(capturable=True)
        replay = captured(step, stream)
        for _ in range(3):
            replay()
    for mine, theirs in zip(layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)

"""``MaskedAdamW(capturable=True)``: counts on the device are the counts on the host."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import partial_kernels as pk
from maskedtrain.optim import MaskedAdamW, MaskedSGD

SHAPES = ((4, 3), (5,))


class Masks:
    """A sub-network of the parameters: the mask of each, None outside."""

    def __init__(self, params: Sequence[Parameter], masks: Sequence[pk.Mask | None]) -> None:
        self._masks = dict(zip(params, masks, strict=True))

    def mask_of(self, parameter: Parameter) -> pk.Mask | None:
        return self._masks[parameter]


MASKS: tuple[tuple[pk.Mask | None, pk.Mask | None], ...] = (
    (pk.Prefix(2, 2), pk.Prefix(3)),
    (pk.Full(), pk.Full()),
    (pk.Prefix(3, 2), None),
    (pk.Index([0, 3]), pk.Prefix(2)),
)


def networks(params: list[Parameter]) -> list[Masks | None]:
    return [*(Masks(params, masks) for masks in MASKS), None]


def trained(order: Sequence[int], *, capturable: bool, save: int | None = None) -> list[Tensor]:
    """Parameters after these steps, with the state saved and loaded on the way."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = MaskedAdamW(params, capturable=capturable)
    subnets = networks(params)
    for step, pick in enumerate(order):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step(subnets[pick])
        if step == save:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer = MaskedAdamW(params, capturable=capturable)
            optimizer.load_state_dict(torch.load(saved, weights_only=True))
    return [param.detach() for param in params]


@given(st.lists(st.integers(0, 4), max_size=8), st.integers(0, 8))
def test_counts_on_the_device_are_those_on_the_host(order: list[int], save: int) -> None:
    """Nested, equal and crossing sub-networks, in any order, with a checkpoint anywhere."""
    expected = trained(order, capturable=False)
    for found in (trained(order, capturable=True), trained(order, capturable=True, save=save)):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def optimizer_with_steps(capturable: bool, steps: int) -> tuple[MaskedAdamW, list[Parameter]]:
    params = [Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = MaskedAdamW(params, capturable=capturable)
    core = networks(params)[0]
    for step in range(steps):
        for param in params:
            param.grad = torch.full_like(param, 0.1)
        optimizer.step(core if step % 2 else None)
    return optimizer, params


def test_states_are_those_of_the_other_kind() -> None:
    """A run can go on with the other kind of counts."""
    kinds = [optimizer_with_steps(capturable, 5)[0].state_dict() for capturable in (False, True)]
    for a, b in zip(*(kind["state"].values() for kind in kinds), strict=True):
        assert a["regions"] == b["regions"]
    optimizer = MaskedAdamW([Parameter(torch.ones(shape)) for shape in SHAPES], capturable=True)
    optimizer.load_state_dict(kinds[0])
    assert not optimizer.param_groups[0]["capturable"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_counting(copied) -> None:
    optimizer, _ = optimizer_with_steps(True, 3)
    other = copied(optimizer)
    for one in (optimizer, other):
        for group in one.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, 0.2)
        one.step()
    for a, b in zip(*(one.param_groups[0]["params"] for one in (optimizer, other)), strict=True):
        assert torch.equal(a, b)


def test_saving_needs_no_new_step_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = optimizer_with_steps(True, 2)
    optimizer.state_dict()
    for module in ("adamw", "base"):
        monkeypatch.setattr(f"maskedtrain.optim.{module}.capturing", lambda _: True)
    optimizer.step()
    # Another sub-network's regions would have to be counted apart.
    with pytest.raises(RuntimeError, match="must have been taken once before"):
        optimizer.step(Masks(params, MASKS[2]))


def test_what_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = optimizer_with_steps(False, 1)
    before = [param.detach().clone() for param in params]
    for module in ("adamw", "base"):
        monkeypatch.setattr(f"maskedtrain.optim.{module}.capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="needs capturable=True"):
        optimizer.step()
    for fresh in (MaskedAdamW(params, capturable=True), MaskedSGD(params, lr=0.1, momentum=0.9)):
        with pytest.raises(RuntimeError, match="must have been taken once before"):
            fresh.step()
    for param, was in zip(params, before, strict=True):
        assert torch.equal(param, was)

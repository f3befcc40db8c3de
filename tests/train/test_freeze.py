"""Layer-wise training: what is frozen stays, and costs no backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskedtrain import SubNetwork, Trainer
from maskedtrain.methods import LayerFreeze
from maskedtrain.methods.freeze import Config
from maskedtrain.optim import MaskedAdamW


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


STAGES = [["0.*"], ["2.*"], ["4.*"]]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)


def flops(plan: Any, model: nn.Module) -> int:
    x, y = batch()
    with FlopCounterMode(display=False) as counter:
        plan.backward(lambda: F.cross_entropy(model(x), y))
    model.zero_grad()
    return counter.get_total_flops()


def test_a_stage_trains_its_layers_alone() -> None:
    model = network()
    method = LayerFreeze(model, STAGES, [2, 1])
    trainer = Trainer(model, method, MaskedAdamW(model.parameters(), lr=0.1), F.cross_entropy)
    for trained in ("0", "0", "2", "4", "4"):
        before = copy.deepcopy(model.state_dict())
        trainer.train_step(iter([batch()]))
        changed = {
            name.partition(".")[0]
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor, before[name])
        }
        assert changed == {trained}
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_layers_cost_no_backward() -> None:
    """2 T O I FLOPs a product: the weight's, and the input's of every layer above the lowest."""
    model = network()
    method = LayerFreeze(model, STAGES, [1, 1])
    sizes = [2 * 5 * 6 * 8, 2 * 5 * 8 * 8, 2 * 5 * 8 * 3]
    forward = sum(sizes)
    expected = [
        forward + sizes[0] + sizes[1] + sizes[2],
        forward + sizes[1] + sizes[2],
        forward + sizes[2],
    ]
    assert [flops(method.plan(step), model) for step in range(3)] == expected


def test_it_is_the_gradient_of_the_whole() -> None:
    model, x_y = network(), batch()
    LayerFreeze(model, STAGES, [1, 1]).plan(1).backward(
        lambda: F.cross_entropy(model(x_y[0]), x_y[1])
    )
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(x_y[0]), x_y[1]).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("2."):
            assert torch.equal(found[name], parameter.grad)
        else:
            assert found[name] is None


def test_what_the_user_froze_stays_frozen() -> None:
    model = network()
    model[2].bias.requires_grad = False
    plan = LayerFreeze(model, STAGES, [1, 1]).plan(1)
    x, y = batch()
    plan.backward(lambda: F.cross_entropy(model(x), y))
    assert not model[2].bias.requires_grad
    assert [p.requires_grad for p in model[0].parameters()] == [True, True]


def test_stages_come_again() -> None:
    method = LayerFreeze(network(), STAGES, [1, 2, 1], cycle=True)
    names = [method.plan(step).update.name for step in range(9)]
    assert names == ["0.*", "2.*", "2.*", "4.*", "0.*", "2.*", "2.*", "4.*", "0.*"]


def test_the_command_line_builds_it() -> None:
    config = Config(stages=("0.weight,0.bias", "*"), steps=(3,))
    method = config.build(network())
    first, last = (method.plan(step).update for step in (2, 3))
    assert isinstance(first, SubNetwork)
    assert first.numel() == 56
    assert last.numel() == sum(p.numel() for p in network().parameters())


@pytest.mark.parametrize(
    ("stages", "steps", "cycle", "message"),
    [
        ([["9.*"]], [], False, r"'9\.\*' matches no parameter"),
        (STAGES, [1], False, r"each of the 2 stages that end, got \[1\]"),
        (STAGES, [1, 0], False, r"got \[1, 0\]"),
        (STAGES, [1, 1], True, r"each of the 3 stages that end"),
        ([], [], False, "got"),
    ],
)
def test_bad_schedules(stages: Any, steps: Any, cycle: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerFreeze(network(), stages, steps, cycle=cycle)

"""``MLP``: what it computes, its names and widths, runs of it on images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import partial_kernels as pk
from maskedtrain import MaskedLinear, SubNetwork, models
from maskedtrain.config import TrainConfig
from maskedtrain.data.digits import Config as DigitsConfig
from maskedtrain.methods import Pass, Plan
from maskedtrain.models import MLP
from maskedtrain.models.mlp import Config
from maskedtrain.tasks import make_task
from tests.train.toolbox import noise


def test_it_is_linear_layers_with_relu_between() -> None:
    torch.manual_seed(0)
    model = MLP(12, (8, 6), 3)
    torch.manual_seed(0)
    layers = [nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
    plain = nn.Sequential(nn.Flatten(), *layers)
    for x in (noise(5, 12), noise(5, 3, 2, 2)):
        assert torch.equal(model(x), plain(x))
    names = [
        f"{layer}.{p}" for layer in ("hidden.0", "hidden.1", "output") for p in ("weight", "bias")
    ]
    assert list(model.state_dict()) == names
    assert MLP(12, (), 3)(noise(5, 12)).shape == (5, 3)
    with pytest.raises(ValueError, match=r"must be >= 1, got \[12, 0, 3\]"):
        MLP(12, (0,), 3)


def test_dropout_is_of_hidden_neurons_in_training() -> None:
    model, x = MLP(12, (8, 6), 3, dropout=0.5), noise(5, 12)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_narrow_networks() -> None:
    model = MLP(12, (32, 64), 3)
    core = SubNetwork.width(model, 0.5)
    assert core.masks["hidden.0.weight"] == pk.Prefix(16, None)
    assert core.masks["hidden.1.weight"] == pk.Prefix(32, 16)
    assert core.masks["output.weight"] == pk.Prefix(None, 32)
    x = noise(5, 12)
    extracted = core.extract()
    assert not any(isinstance(module, MaskedLinear) for module in extracted.modules())
    with core.activate():
        assert torch.equal(model(x), extracted(x))
    assert core.flops(x) == 2 * 5 * (12 * 16 + 16 * 32 + 32 * 3)
    first = SubNetwork.width(model, {"hidden.0": 0.25, "*": 1.0}, name="first", round_to=1)
    assert first.masks["hidden.1.weight"] == pk.Prefix(64, 8)


def test_options_and_sizes_of_the_data() -> None:
    assert models.configs()["mlp"] is Config
    pytest.importorskip("sklearn")
    config = TrainConfig(DigitsConfig(image_size=10), Config(hidden=(7,), dropout=0.25))
    task = make_task(config, torch.device("cpu"))
    model = config.model.build(**task.model_arguments())
    assert isinstance(model, MLP) and model.dropout.p == 0.25
    assert [p.shape for p in model.parameters()] == [(7, 100), (7,), (10, 7), (10,)]
    full = SubNetwork.full(model.eval())
    products = 100 * 7 + 7 * 10
    assert task.unit_flops(full) == 2 * products
    # Of the first layer there is no dx; the model comes back in its mode.
    flops = task.batch_flops(Plan((Pass(full),), update=full))
    assert flops(torch.empty(6, 1, 10, 10)) == 6 * 2 * (3 * products - 700)
    assert not model.training

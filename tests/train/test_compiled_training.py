"""Compiled training: a graph for each network and shape of batches, and none after them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import partial_kernels as pk
from maskedtrain import SubNetwork, Trainer
from maskedtrain.data.token_batches import TokenBatches
from maskedtrain.data.translation import Ragged, TranslationSplit
from maskedtrain.methods import ATS
from maskedtrain.methods.cores import CoreKind, core_chain
from maskedtrain.models import resnet8
from maskedtrain.models.transformer import Transformer
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.training.losses import cross_entropy
from tests.train.toolbox import mlp

pytestmark = [
    # Dynamo makes instances of autograd.Function against torch's own advice.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

# Dynamo by itself: it is what decides what is compiled anew.
BACKEND = "eager"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts what is compiled; no graph may be a part of a model's pass alone."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend(BACKEND)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    assert not counters["graph_break"]
    torch._dynamo.reset()


def each_repeated(batches: Iterable[Any], times: int) -> Iterator[Any]:
    """Every batch so many times: once for each network."""
    return (batch for batch in batches for _ in range(times))


@pytest.mark.parametrize("core", ["lowrank", "width"])
def test_a_transformer_compiles_once_for_each_network_and_bucket(
    core: CoreKind, graphs: CompileCounterWithBackend
) -> None:
    rng = np.random.default_rng(0)
    sides = (Ragged.of([rng.integers(4, 60, n) for n in rng.integers(1, 20, 60)]) for _ in "st")
    batches = TokenBatches(TranslationSplit(*sides, [""] * 60, [""] * 60), 120, buckets=3)
    sizes: Any = {"d_model": 16, "heads": 2, "ffn": 32, "encoder_layers": 1, "decoder_layers": 1}
    losses: list[list[float]] = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = Transformer(60, 60, dropout=0.0, **sizes)
        subnets = core_chain(model, core, (0.25,), round_to=1)
        optimizer = MaskedAdamW(model.parameters(), lr=1e-2)
        training = Trainer(model, ATS(subnets), optimizer, cross_entropy, compile=compile, shapes=3)
        found: list[float] = []
        for stance in ("default", "fail_on_recompile"):
            stream = each_repeated(batches, len(subnets))
            with torch.compiler.set_stance(stance):
                for _ in range(len(subnets) * len(batches)):
                    found += map(float, training.train_step(stream).losses.values())
        losses.append(found)
    assert graphs.frame_count == 3 * 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def narrow(model: nn.Module) -> list[SubNetwork]:
    """Five nested networks."""
    masks = ({"0.weight": pk.Prefix(n), "2.weight": pk.Prefix(None, n)} for n in (8, 6, 4, 3, 2))
    return [SubNetwork(model, mask, name=f"core{i}") for i, mask in enumerate(masks)]


@pytest.mark.parametrize(("shapes", "each"), [(None, 2), (3, 3)])
def test_no_network_is_left_as_it_is(
    shapes: int | None, each: int, graphs: CompileCounterWithBackend
) -> None:
    """More graphs than the 8 that dynamo allows by itself; of any shapes two for each network."""
    subnets = narrow(mlp())
    model = subnets[0].model
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    training = Trainer(model, ATS(subnets), optimizer, cross_entropy, compile=True, shapes=shapes)
    batches = [(torch.randn(n, 6), torch.arange(n) % 3) for n in (4, 5, 7)]
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            for _ in training.steps(each_repeated(batches, 5), until=training.step + 15):
                pass
    assert graphs.frame_count == 5 * each
    assert torch._dynamo.config.recompile_limit == 8


def test_a_resnet_compiles_once_for_each_network(graphs: CompileCounterWithBackend) -> None:
    torch.manual_seed(0)
    model = resnet8(width=8)
    subnets = core_chain(model, "width", (0.5,), round_to=1)
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
    training = Trainer(model, ATS(subnets), optimizer, cross_entropy, compile=True)
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    for step in range(6):
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            training.train_step(iter([batch]))
    assert graphs.frame_count == 2


@pytest.mark.usefixtures("graphs")
def test_what_is_measured_of_compiled_training_is_the_same() -> None:
    """The Hessian, too, though what is compiled cannot be differentiated twice."""
    found: list[list[float]] = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = resnet8(width=8)
        subnets = core_chain(model, "width", (0.5,), round_to=1)
        optimizer = MaskedSGD(model.parameters(), lr=0.01)
        options: Any = {"measure_every": 1, "measure_smoothness": True, "compile": compile}
        training = Trainer(model, ATS(subnets), optimizer, cross_entropy, **options)
        batch = torch.randn(4, 3, 8, 8), torch.arange(4)
        report = list(training.steps(itertools.repeat(batch), until=2))[1]
        assert report.smoothness is not None
        found.append([report.smoothness.L, *report.criteria["core"].whole.quantities().values()])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_no_shapes_are_refused() -> None:
    model = mlp()
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="shapes must be >= 1, got 0"):
        Trainer(model, ATS(narrow(model)), optimizer, cross_entropy, compile=True, shapes=0)

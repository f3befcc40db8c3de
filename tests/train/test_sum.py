"""``Sum``: branches that a sub-network computes, or leaves out; layer-wise sums."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from maskedtrain import MaskedLinear, SubNetwork, Sum, Trainer, layerwise_sum, lowrank
from maskedtrain.layers import MaskedModule
from maskedtrain.methods import ATS
from maskedtrain.models import MLP, resnet8
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from tests.train.surgery_toolbox import torch_encoder
from tests.train.toolbox import assert_equal, gradients, mlp, narrow_mlp, noise, snapshot

CLASSES = 4


def linear(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, CLASSES))


class Recurrent(nn.Module):
    """An LSTM, whose weights cannot be masked, over the rows of images."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.output = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(x[:, 0])[0][:, -1])


def convolution() -> nn.Sequential:
    layers = nn.Conv2d(3, CLASSES, 3), nn.BatchNorm2d(CLASSES), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten())


PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "mlp-linear": lambda: (MLP(192, (16,), CLASSES), linear(192)),
    "resnet-convolution": lambda: (resnet8(width=8, num_classes=CLASSES), convolution()),
    "linear-lstm": lambda: (linear(192), Recurrent()),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Sum:
    torch.manual_seed(0)
    core, other = PAIRS[request.param]()
    return Sum(core=core, other=other)


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    return noise(8, 3, 8, 8, seed=seed), torch.arange(8) % CLASSES


def core_of(model: nn.Module, name: str = "core") -> SubNetwork:
    return SubNetwork.full(model).without(["other.*"], name=name)


# What it computes


def test_it_is_the_sum_of_its_branches() -> None:
    model = Sum(nn.Linear(3, 2), nn.Linear(3, 2, bias=False), third=nn.Tanh())
    x = noise(5, 2)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight"]
    assert list(model.branches) == ["0", "1", "third"]
    square = Sum(nn.Linear(2, 2), third=nn.Tanh())
    assert torch.equal(square(x), square.branches["0"](x) + torch.tanh(x))
    shared = nn.Linear(2, 2)
    assert torch.equal(Sum(shared, shared)(x), shared(x) + shared(x))
    two = Sum(nn.Bilinear(2, 3, 4), nn.Bilinear(2, 3, 4))
    inputs = noise(5, 2), noise(5, 3)
    assert torch.equal(two(*inputs), sum(branch(*inputs) for branch in two.branches.values()))


def test_it_refuses_what_is_no_sum() -> None:
    with pytest.raises(ValueError, match="needs at least one branch"):
        Sum()
    with pytest.raises(ValueError, match=r"tensors of one shape, got \[5, 3\] and \[5, 1\]"):
        Sum(nn.Linear(2, 3), nn.Linear(2, 1))(noise(5, 2))
    with pytest.raises(KeyError, match="'forward' already exists"):
        Sum(forward=nn.Linear(2, 3))


def test_parameters_by_pattern() -> None:
    model = Sum(core=mlp(), other=nn.Linear(6, 3))
    full = SubNetwork.full(model)
    core = full.without(["other.*"])
    assert core.name == "core"
    outside = [name for name, mask in core.masks.items() if mask is None]
    assert outside == ["other.weight", "other.bias"]
    # What was outside stays so, and a bias follows its weight.
    less = core.without(["core.0.weight", "other.b*"], name="less")
    outside = [name for name, mask in less.masks.items() if mask is None]
    assert outside == ["core.0.weight", "core.0.bias", "other.weight", "other.bias"]
    for patterns in ("other.*", []):
        with pytest.raises(ValueError, match=r"must be a list of patterns, got ('other|\[\])"):
            full.without(patterns)
    with pytest.raises(ValueError, match=r"'wide' matches no parameter .* has core\.0\.weight"):
        full.without(["other.*", "wide"])
    deep = SubNetwork.full(nn.Sequential(*(nn.Linear(2, 2) for _ in range(20))))
    with pytest.raises(ValueError, match=r"'1\.weigh' matches no .*; did you mean 1\.weight\?"):
        deep.without(["1.weigh"])


# Branches that are left out


def test_a_core_is_the_branch_that_is_left(pair: Sum) -> None:
    pair.eval()
    core, x = core_of(pair), images()[0]
    branch = pair.branches["core"]
    calls: list[nn.Module] = []
    pair.branches["other"].register_forward_hook(lambda module, *_: calls.append(module))
    whole, expected = pair(x), branch(x)
    assert len(calls) == 1
    state = snapshot(pair)
    with core.activate(), FlopCounterMode(display=False) as counter:
        y = pair(x)
    assert torch.equal(y, expected) and len(calls) == 1
    with FlopCounterMode(display=False) as alone:
        branch(x)
    assert core.flops(x) == counter.get_total_flops() == alone.get_total_flops() > 0
    assert SubNetwork.full(pair).flops(x) > core.flops(x)
    calls.clear()
    assert torch.equal(pair(x), whole) and len(calls) == 1
    assert core.numel() == sum(p.numel() for p in branch.parameters())
    for share in (False, True):
        extracted = core.extract(share=share)
        assert type(extracted) is type(branch)
        assert torch.equal(extracted(x), expected)
        assert (
            extracted.state_dict().keys() == SubNetwork.full(branch).extract().state_dict().keys()
        )
        first, own = next(extracted.parameters()), next(branch.parameters())
        assert (first.data_ptr() == own.data_ptr()) == share
    assert_equal(snapshot(pair), state)


def test_the_whole_sum_is_extracted_as_one(pair: Sum) -> None:
    pair.eval()
    x = images()[0]
    extracted = SubNetwork.full(pair).extract()
    assert type(extracted) is Sum and not extracted.training and extracted.active is None
    inside = [module for branch in extracted.branches.values() for module in branch.modules()]
    assert not any(isinstance(module, MaskedModule) for module in inside)
    assert torch.equal(extracted(x), pair(x))
    assert list(extracted.state_dict()) == [n for n in pair.state_dict() if ".branches." not in n]


def test_one_of_three_branches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sum(mlp(), nn.Linear(6, 3), nn.Linear(6, 3)), nn.Tanh())
    part = SubNetwork.full(model).without(["0.1.*"], name="part")
    x = noise(5, 6)
    extracted = part.extract()
    kept = [name for name in model.state_dict() if not name.startswith("0.1.")]
    assert list(extracted.state_dict()) == kept
    first, _, last = model[0].branches.values()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    with part.activate():
        assert torch.equal(model(x), torch.tanh(first(x) + last(x)))
        assert torch.equal(model(x), extracted(x))


def test_a_branch_is_left_out_when_nothing_of_it_is_inside() -> None:
    model = Sum(core=mlp(), other=nn.Sequential(nn.Linear(6, 3), nn.Tanh()), third=nn.Dropout(0.0))
    x = noise(5, 6)
    # Without its weight it still has its bias.
    part = SubNetwork.full(model).without(["other.0.weight"], name="part")
    core, other = model.branches["core"], model.branches["other"]
    with part.activate(), pytest.raises(ValueError, match=r"one shape, got \[5, 3\] and \[5, 6\]"):
        # What has no parameters runs.
        model(x)
    del model.third
    with part.activate():
        bias = other.get_parameter("0.bias")
        torch.testing.assert_close(model(x), core(x) + torch.tanh(bias))
    nothing = SubNetwork.full(model).without(["*"], name="nothing")
    for use in (lambda: model(x), nothing.extract):
        with nothing.activate(), pytest.raises(ValueError, match=r"every branch: core, other$"):
            use()


def test_sums_within_branches() -> None:
    torch.manual_seed(0)
    inner = Sum(nn.Linear(6, 3), MaskedLinear(6, 3))
    model = Sum(core=nn.Sequential(inner, nn.Tanh()), other=Sum(nn.Linear(6, 3), nn.Linear(6, 3)))
    full, core = SubNetwork.full(model), core_of(model)
    small = core.without(["core.0.1.*"], name="small")
    assert small.issubset(core) and core.issubset(full) and not core.issubset(small)
    x = noise(5, 6)
    y = torch.tanh(inner.branches["0"](x))
    with small.activate():
        assert torch.equal(model(x), y)
    extracted: Any = small.extract()
    assert [type(module) for module in extracted] == [nn.Linear, nn.Tanh]
    assert torch.equal(extracted(x), y)
    assert small.flops(x) == 2 * 5 * 6 * 3
    assert core.flops(x) == 2 * small.flops(x) and full.flops(x) == 4 * small.flops(x)
    both = SubNetwork.union(small, full.without(["core.*"], name="other"))
    with both.activate():
        assert torch.equal(model(x), y + model.branches["other"](x))


def test_narrow_networks_within_a_branch() -> None:
    model = Sum(core=mlp(), other=nn.Linear(6, 3))
    alone = narrow_mlp(model.branches["core"], pk.Index([0, 2, 5]))  # pyright: ignore[reportArgumentType]
    masks = {f"core.{name}": mask for name, mask in alone.masks.items()}
    narrow = SubNetwork(model, {**masks, "other.weight": None, "other.bias": None}, name="narrow")
    wide = SubNetwork(model, masks, name="wide")
    assert narrow.issubset(wide) and narrow.issubset(core_of(model))
    x = noise(5, 6)
    with alone.activate():
        expected = model.branches["core"](x)
    for subnet, y in ((narrow, expected), (wide, expected + model.branches["other"](x))):
        with subnet.activate():
            assert torch.equal(model(x), y)
        assert torch.equal(subnet.extract()(x), y)
    assert narrow.flops(x) == alone.flops(x)
    assert type(narrow.extract()) is nn.Sequential


def test_what_branches_share_stays_shared() -> None:
    torch.manual_seed(0)
    shared, own = MaskedLinear(6, 6), nn.Linear(6, 6)
    branches = nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, own), nn.Linear(6, 6)
    model = Sum(*branches)
    part = SubNetwork.full(model).without(["2.*"], name="part")
    extracted: Any = part.extract()
    assert extracted.branches["0"][0] is extracted.branches["1"][0]
    x = noise(5, 6)
    with part.activate():
        assert torch.equal(extracted(x), model(x))
    for branch, other in ("01", "10"):
        with pytest.raises(ValueError, match=rf"{other}\.0\.weight is tied .* name both"):
            SubNetwork.full(model).without([f"{branch}.*"])
    # A module that is wholly outside counts as zero where it runs all the same.
    first = SubNetwork.full(model).without(["0.*", "1.0.*"], name="first")
    with first.activate():
        torch.testing.assert_close(model(x), own.bias.expand(5, 6) + model.branches["2"](x))


def test_activations_within_each_other() -> None:
    model = Sum(core=nn.Linear(6, 3), other=nn.Linear(6, 3))
    full, core = SubNetwork.full(model), core_of(model)
    other = full.without(["core.*"], name="other")
    x = noise(5, 6)
    first, second = model.branches["core"](x), model.branches["other"](x)
    with core.activate():
        with other.activate():
            assert torch.equal(model(x), second)
            with full.activate():
                assert torch.equal(model(x), first + second)
                assert torch.equal(core.extract()(x), first)
        with pytest.raises(RuntimeError), other.activate():
            model(noise(5, 7))
        assert torch.equal(model(x), first)
    assert torch.equal(model(x), first + second)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_sums_follow_the_activation() -> None:
    torch._dynamo.reset()
    model = Sum(core=mlp(), other=nn.Linear(6, 3))
    subnets = [SubNetwork.full(model), core_of(model)]
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = noise(5, 6)
    for _ in range(3):
        for subnet in subnets:
            with subnet.activate():
                assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 2
    torch._dynamo.reset()


# Training

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: MaskedSGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda m: MaskedAdamW(m.parameters(), lr=0.01, weight_decay=0.1),
}
optimizers = pytest.mark.parametrize("rule", OPTIMIZERS)


def trained(model: nn.Module, subnets: list[SubNetwork], rule: str) -> Trainer:
    return Trainer(model, ATS(subnets), OPTIMIZERS[rule](model), F.cross_entropy)


def batches(start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    yield from (images(seed) for seed in range(start, 1000))


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters, buffers and the optimizer's tensors, by name."""
    found = snapshot(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found[f"{name} {key}"] = value.clone()
    return found


@optimizers
def test_a_core_step_touches_nothing_else(pair: Sum, rule: str) -> None:
    full, core = SubNetwork.full(pair), core_of(pair)
    trainer = trained(pair, [full, core], rule)
    first = images()
    start = [trainer.evaluate([first], subnet).loss for subnet in (full, core)]
    # Momentum and moments are there from now on.
    trainer.train_step(iter([first]))
    for step in range(1, 30):
        before = everything(trainer)
        report = trainer.train_step(iter([first]))
        if step % 2 == 0:
            continue
        after = everything(trainer)
        assert list(report.losses) == ["core"] and after.keys() == before.keys()
        for name, tensor in after.items():
            if name.startswith("other."):
                assert torch.equal(tensor, before[name]), name
        moved = [n for n in after if not torch.equal(after[n], before[n])]
        assert {name.split()[0] for name in moved} >= {n for n, m in core.masks.items() if m}
    for subnet, loss in zip((full, core), start, strict=True):
        assert trainer.evaluate([first], subnet).loss < 0.5 * loss


def test_a_step_of_the_core_costs_the_cores_flops(pair: Sum) -> None:
    core, x = core_of(pair), images()[0]
    alone = SubNetwork.full(pair.branches["core"])
    plan = ATS([SubNetwork.full(pair), core]).plan(1)
    assert plan.update is core
    with FlopCounterMode(display=False) as counter:
        plan.backward(lambda: pair(x).sum())
    assert counter.get_total_flops() == alone.flops(x, training=True)
    assert all(p.grad is None for p in pair.branches["other"].parameters())


@optimizers
def test_a_hierarchy_of_three(rule: str) -> None:
    torch.manual_seed(0)
    deep = resnet8(width=16, num_classes=CLASSES)
    # With batch norms of its own, which the sub-network of the sum finds by its name.
    alone = SubNetwork.width(deep, 0.5, name="narrow")
    model = Sum(core=deep, other=convolution())
    full, core = SubNetwork.full(model), core_of(model)
    masks = {f"core.{name}": mask for name, mask in alone.masks.items()}
    narrow = SubNetwork(model, masks, name="narrow").without(["other.*"], name="narrow")
    assert narrow.issubset(core) and core.issubset(full)
    x = images()[0]
    assert narrow.flops(x) == alone.flops(x) < core.flops(x) < full.flops(x)
    trainer = trained(model, [full, core, narrow], rule)
    stream = batches()
    for step in range(9):
        before = everything(trainer)
        trainer.train_step(stream)
        update = [full, core, narrow][step % 3]
        for name, parameter in model.named_parameters():
            mask = update.mask_of(parameter)
            moved = parameter != before[name]
            inside = moved.new_zeros(()) if mask is None else mask.dense(moved.shape)
            assert not (moved & ~inside).any(), name
        moved = [n for n, b in model.named_buffers() if not torch.equal(b, before[n])]
        assert any(".branches.narrow." in name for name in moved) == (update is narrow)
        assert any(name.startswith("other.") for name in moved) == (update is full)
    with narrow.activate():
        assert torch.equal(narrow.extract()(x), model(x))


@optimizers
def test_training_resumes_bit_for_bit(
    rule: str, assert_identical: Callable[[object, object], None]
) -> None:
    torch.manual_seed(0)
    start = Sum(core=MLP(192, (16,), CLASSES, dropout=0.5), other=convolution())

    def made() -> Trainer:
        model = copy.deepcopy(start)
        return trained(model, [SubNetwork.full(model), core_of(model)], rule)

    whole, first, second = made(), made(), made()
    torch.manual_seed(1)
    list(whole.steps(batches(), until=11))
    torch.manual_seed(1)
    list(first.steps(batches(), until=4))
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    list(second.steps(batches(4), until=11))
    assert_identical(second.model.state_dict(), whole.model.state_dict())
    assert_identical(second.state_dict(), whole.state_dict())


# Layer-wise sums


def test_layers_become_sums_in_place() -> None:
    model = MLP(6, (8, 8), CLASSES).double()
    original, x = copy.deepcopy(model), noise(5, 6).double()
    parameters = set(model.parameters())
    extensions = {"hidden.0": nn.Linear(6, 8).double(), "hidden.1": nn.Linear(8, 8).double()}
    core = layerwise_sum(model, extensions)
    assert core.name == "core"
    names = {f"hidden.{i}.core.{p}" for i in (0, 1) for p in ("weight", "bias")}
    names |= {name.replace("core", "extension") for name in names}
    assert set(model.state_dict()) == names | {"output.weight", "output.bias"}
    assert {p for p in model.parameters() if core.mask_of(p) is not None} == parameters
    with core.activate():
        assert torch.equal(model(x), original(x))
    first, second = original.hidden
    y = F.relu(first(x) + extensions["hidden.0"](x))
    y = F.relu(second(y) + extensions["hidden.1"](y))
    assert torch.equal(model(x), original.output(y))
    assert core.flops(x) == SubNetwork.full(original).flops(x)
    extracted = core.extract()
    assert list(extracted.state_dict()) == list(original.state_dict())
    assert torch.equal(extracted(x), original(x))
    narrow = SubNetwork(
        model,
        {
            "hidden.0.core.weight": pk.Prefix(4),
            "hidden.1.core.weight": pk.Prefix(None, 4),
            **{name: None for name, mask in core.masks.items() if mask is None},
        },
        name="narrow",
    )
    assert narrow.issubset(core)
    assert narrow.extract().state_dict()["hidden.1.weight"].shape == (8, 4)


@optimizers
def test_ats_on_layerwise_sums(rule: str) -> None:
    torch.manual_seed(0)
    model = MLP(192, (16, 16), CLASSES)
    core = layerwise_sum(model, {f"hidden.{i}": nn.Linear(n, 16) for i, n in ((0, 192), (1, 16))})
    full = SubNetwork.full(model)
    trainer = trained(model, [full, core], rule)
    first = images()
    start = [trainer.evaluate([first], subnet).loss for subnet in (full, core)]
    for step in range(20):
        before = everything(trainer)
        trainer.train_step(iter([first]))
        after = everything(trainer)
        for name, tensor in after.items():
            if ".extension." in name and step % 2:
                assert torch.equal(tensor, before[name]), name
        assert not torch.equal(after["output.weight"], before["output.weight"])
    for subnet, loss in zip((full, core), start, strict=True):
        assert trainer.evaluate([first], subnet).loss < 0.5 * loss


def test_a_low_rank_layer_is_a_sum_computed_as_one() -> None:
    torch.manual_seed(0)
    fused = MLP(6, (8,), CLASSES).double()
    apart = copy.deepcopy(fused)
    cores = [lowrank(fused, ["hidden.0"], 0.5)]
    layer: Any = fused.hidden[0]
    thin = nn.Linear(6, 3, bias=False), nn.Linear(3, 8)
    low: Any = nn.Sequential(*thin).double()
    dense = nn.Linear(6, 8, bias=False).double()
    low[0].weight, low[1].weight, low[1].bias = layer.u, layer.v, layer.bias
    dense.weight, apart.output = layer.weight, fused.output
    apart.hidden[0] = low
    cores.append(layerwise_sum(apart, {"hidden.0": dense}))
    x = noise(5, 6).double()
    torch.testing.assert_close(fused(x), apart(x))
    values: list[Tensor] = []
    for core in cores:
        with core.activate():
            values.append(core.model(x))
    torch.testing.assert_close(*values)
    assert cores[0].numel() == cores[1].numel()
    assert cores[0].flops(x) == cores[1].flops(x)


def test_a_layer_in_two_places_and_layers_within_layers() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Sequential(layer, nn.Tanh()), nn.Linear(6, 3))
    original, x = copy.deepcopy(model), noise(5, 6)
    outer = nn.Linear(6, 6)
    core = layerwise_sum(model, {"0": nn.Linear(6, 6), "1": outer})
    assert model[0] is model[1].branches["core"][0]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue, reportIndexIssue]
    y = model[0](x)
    assert torch.equal(model(x), model[2](torch.tanh(model[0](y)) + outer(y)))
    with core.activate():
        assert torch.equal(model(x), original(x))
    assert_equal(snapshot(core.extract()), snapshot(original))


@torch.no_grad()
def test_layerwise_sums_in_torchs_encoder() -> None:
    model = torch_encoder().eval()
    original, x = copy.deepcopy(model), noise(2, 3, 8)
    extensions = {f"layers.{i}.linear1": nn.Linear(8, 32) for i in (0, 1)}
    core = layerwise_sum(model, extensions)
    with core.activate():
        torch.testing.assert_close(model(x), original(x))
    assert not torch.allclose(model(x), original(x), rtol=1e-3)


def test_layerwise_sums_refuse_before_anything_changes() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 3))
    state = list(model.state_dict())
    new, last = nn.Linear(6, 6), model[3]
    refusals: list[tuple[dict[str, nn.Module], str]] = [
        ({}, "must name at least one layer, got none"),
        ({"0": new, "4": new}, "the model has no module '4'"),
        ({"": new}, "the model has no module ''"),
        ({"0": new, "2": nn.Linear(6, 6)}, "the model has another extension for '2'"),
        ({"0": new, "1": nn.Tanh()}, "of 1 must have parameters, none of them the model's"),
        ({"0": nn.Sequential(last, nn.Linear(3, 6))}, "of 0 must have parameters, none of them"),
    ]
    for extensions, message in refusals:
        with pytest.raises(ValueError, match=message):
            layerwise_sum(model, extensions)
        assert list(model.state_dict()) == state
    assert gradients(model) == {}

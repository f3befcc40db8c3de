"""Plans, ATS, Slimmable, Standard, a method of one's own; what their steps touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import MaskedLinear, SubNetwork, methods
from maskedtrain.layers import MaskedModule
from maskedtrain.methods import ATS, Method, Pass, Plan, Slimmable, Standard
from maskedtrain.methods.ats import Config as ATSConfig
from maskedtrain.methods.slimmable import Config as SlimmableConfig
from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.models import resnet8
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.optim.base import MaskedOptimizer
from tests.train.toolbox import gradients, noise, snapshot

BATCH = 8


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(MaskedLinear(6, 8), nn.ReLU(), MaskedLinear(8, 4))


def neurons(model: nn.Module, mask: pk.Prefix | pk.Index, name: str) -> SubNetwork:
    """The sub-network of some hidden neurons."""
    kept = pk.Prefix(None, mask.rows) if isinstance(mask, pk.Prefix) else pk.Index(None, mask.rows)
    return SubNetwork(model, {"0.weight": mask, "2.weight": kept}, name=name)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet8(width=8, num_classes=4)


def batch(model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    shape = (6,) if isinstance(model, nn.Sequential) else (3, 8, 8)
    return noise(BATCH, *shape, seed=seed), torch.arange(BATCH) % 4


def loss_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    x, y = batch(model, seed)
    return lambda: F.cross_entropy(model(x), y)


def gradient_of(subnet: SubNetwork, seed: int = 0) -> dict[str, Tensor]:
    subnet.model.zero_grad()
    with subnet.activate():
        loss_of(subnet.model, seed)().backward()
    found = gradients(subnet.model)
    subnet.model.zero_grad()
    return found


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# The template


def test_backward_adds_up_weighted_passes() -> None:
    model = mlp()
    full, core = SubNetwork.full(model), neurons(model, pk.Prefix(3), "core")
    of_full, of_core = gradient_of(full), gradient_of(core)
    plan = Plan((Pass(full, loss_weight=0.5), Pass(core, loss_weight=2.0)), update=full)
    losses = plan.backward(loss_of(model), scale=0.25)
    # Powers of 2 scale without rounding.
    assert_equal(gradients(model), {n: of_full[n] / 8 + of_core[n] / 2 for n in of_full})
    for subnet in (full, core):
        with subnet.activate():
            assert torch.equal(losses[subnet.name], loss_of(model)())
        assert not losses[subnet.name].requires_grad
    assert model[0].active is None
    # Gradients accumulate over micro-batches.
    plan.backward(loss_of(model), scale=0.25)
    assert_equal(gradients(model), {n: 2 * (of_full[n] / 8 + of_core[n] / 2) for n in of_full})


@contextmanager
def moved(model: nn.Module, events: list[str]) -> Iterator[None]:
    """Every parameter twice as large."""
    events.append("enter")
    before = snapshot(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    try:
        yield
    finally:
        model.load_state_dict(before)
        events.append("exit")


def test_a_pass_is_run_within_its_perturbation() -> None:
    model, events = mlp(), []
    core = neurons(model, pk.Prefix(3), "core")
    state = snapshot(model)
    with moved(model, []):
        expected = gradient_of(core)
        with core.activate():
            value = loss_of(model)().detach()
    assert not torch.equal(expected["0.weight"], gradient_of(core)["0.weight"])
    plan = Plan((Pass(core, perturbed=lambda: moved(model, events)),), update=core)
    losses = plan.backward(loss_of(model))
    assert events == ["enter", "exit"]
    assert torch.equal(losses["core"], value)
    assert_equal(gradients(model), expected)
    assert_equal(snapshot(model), state)

    def fail() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        plan.backward(fail)
    assert events == ["enter", "exit"] * 2
    assert_equal(snapshot(model), state)
    assert model[0].active is None


def test_method_checks_its_networks() -> None:
    model = mlp()
    full = SubNetwork.full(model)
    with pytest.raises(ValueError, match="needs at least one sub-network"):
        Method([])
    with pytest.raises(ValueError, match=r"need different names, got \['full', 'full'\]"):
        Method([full, SubNetwork.full(model)])
    with pytest.raises(ValueError, match="belong to different models"):
        Method([full, SubNetwork.full(mlp(), name="other")])


def test_method_without_a_plan_or_a_state() -> None:
    method = Method([SubNetwork.full(mlp())])
    with pytest.raises(NotImplementedError):
        method.plan(0)
    plan = Plan((), update=method.subnets["full"])
    assert method.after_backward(3, plan) is plan
    assert method.state_dict() == {}
    method.load_state_dict({})
    with pytest.raises(ValueError, match=r"Method has no state, got \['drawn'\]"):
        method.load_state_dict({"drawn": 3})


class LargestRow(Method):
    """Update the row of the first layer with the largest gradient; count how often each was."""

    def __init__(self, full: SubNetwork) -> None:
        super().__init__([full])
        self.full = full
        self.counts = [0] * 8

    def plan(self, step: int) -> Plan:
        return Plan((Pass(self.full),), update=self.full)

    def after_backward(self, step: int, plan: Plan) -> Plan:
        gradient = self.full.model.get_parameter("0.weight").grad
        assert gradient is not None
        self.row = int(gradient.norm(dim=1).argmax())
        masks = dict.fromkeys(self.full.masks) | {"0.weight": pk.Index([self.row])}
        row = SubNetwork(self.full.model, masks, name="row")
        return replace(plan, update=row, lr_scale=0.5)

    def after_step(self, step: int, plan: Plan, optimizer: MaskedOptimizer) -> None:
        self.counts[self.row] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"counts": list(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = list(state["counts"])


def test_a_method_of_ones_own() -> None:
    model = mlp()
    method = LargestRow(SubNetwork.full(model))
    optimizer = MaskedSGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(5):
        before, decay = snapshot(model), 0.1
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        grad = gradients(model)["0.weight"]
        plan = method.after_backward(step, plan)
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        optimizer.zero_grad()
        method.after_step(step, plan, optimizer)
        row = int(grad.norm(dim=1).argmax())
        weight = before["0.weight"].clone()
        weight[row] -= 0.05 * (grad[row] + decay * weight[row])
        found = snapshot(model)
        torch.testing.assert_close(found["0.weight"], weight)
        weight[row] = found["0.weight"][row]
        assert_equal(found, {**before, "0.weight": weight})
    assert sum(method.counts) == 5
    again = LargestRow(SubNetwork.full(model))
    again.load_state_dict(method.state_dict())
    assert again.counts == method.counts


# ATS


def test_ats_alternates_one_pass_a_step() -> None:
    model = mlp()
    full, core = SubNetwork.full(model), neurons(model, pk.Prefix(3), "core")
    method = ATS([full, core])
    for step, subnet in enumerate([full, core, full, core]):
        plan = method.plan(step)
        assert plan.update is subnet and plan.lr_scale == 1.0
        assert [(item.subnet, item.loss_weight) for item in plan.passes] == [(subnet, 1.0)]
    assert list(method.subnets) == ["full", "core"]
    # A pure function of the step.
    assert method.plan(1_000_001) == method.plan(1)


def test_ats_of_a_hierarchy_in_any_order() -> None:
    model = mlp()
    sizes = {"tiny": 2, "mid": 5}
    tiny, mid = (neurons(model, pk.Prefix(rows), name) for name, rows in sizes.items())
    full = SubNetwork.full(model)
    method = ATS([mid, full, tiny], lr_scales={"tiny": 0.5, "full": 2.0})
    plans = [method.plan(step) for step in range(6)]
    assert [plan.update for plan in plans] == [mid, full, tiny] * 2
    assert [plan.lr_scale for plan in plans] == [1.0, 2.0, 0.5] * 2


def test_ats_refuses() -> None:
    model = mlp()
    full, core = SubNetwork.full(model), neurons(model, pk.Prefix(3), "core")
    crossing = neurons(model, pk.Index([2, 5]), "odd")
    with pytest.raises(ValueError, match="between at least 2 networks, got 1"):
        ATS([full])
    for networks in ([full, core, crossing], [core, crossing]):
        with pytest.raises(ValueError, match="needs nested networks; core and odd cross"):
            ATS(networks)
    with pytest.raises(ValueError, match=r"lr_scales names 'cor'; the networks are \['full', 'co"):
        ATS([full, core], lr_scales={"cor": 1.0})
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="the lr_scale of 'core' must be > 0, got"):
            ATS([full, core], lr_scales={"core": scale})


# Slimmable and Standard


@pytest.mark.parametrize("make", [mlp, resnet])
def test_slimmable_adds_up_the_gradients_of_its_networks(make: Callable[[], nn.Module]) -> None:
    model = make()
    if isinstance(model, nn.Sequential):
        cores = [neurons(model, pk.Prefix(3), "core"), neurons(model, pk.Index([1, 6]), "odd")]
    else:
        cores = [SubNetwork.width(model, 0.5), SubNetwork.width(model, 0.25, name="tiny")]
    subnets = [SubNetwork.full(model), *cores]
    total: dict[str, Tensor] = {}
    for subnet in subnets:
        for name, grad in gradient_of(subnet).items():
            total[name] = total[name] + grad if name in total else grad
    method = Slimmable(subnets)
    plan = method.plan(0)
    assert method.plan(7) is plan
    losses = plan.backward(loss_of(model))
    assert list(losses) == [subnet.name for subnet in subnets]
    assert_equal(gradients(model), total)
    for name, parameter in model.named_parameters():
        expected = torch.zeros(parameter.shape, dtype=torch.bool)
        for subnet in subnets:
            if (mask := subnet.mask_of(parameter)) is not None:
                expected |= mask.dense(parameter.shape)
        mask = plan.update.mask_of(parameter)
        assert mask is not None and torch.equal(mask.dense(parameter.shape), expected), name
        assert bool(expected.all())


def test_slimmable_without_the_super_network_updates_the_union() -> None:
    model = mlp()
    low, odd = neurons(model, pk.Prefix(3), "low"), neurons(model, pk.Index([1, 6]), "odd")
    update = Slimmable([low, odd]).plan(0).update
    mask = update.mask_of(model[0].bias)  # pyright: ignore[reportArgumentType]
    assert mask is not None
    assert mask.dense((8,)).nonzero().flatten().tolist() == [0, 1, 2, 6]


@pytest.mark.parametrize("name", ["full", "core"])
def test_standard_trains_its_network(name: str) -> None:
    model = mlp()
    subnet = SubNetwork.full(model) if name == "full" else neurons(model, pk.Prefix(3), "core")
    method = Standard(subnet)
    expected = gradient_of(subnet)
    plan = method.plan(0)
    assert method.plan(5) is plan and plan.update is subnet and plan.lr_scale == 1.0
    assert list(plan.backward(loss_of(model))) == [name]
    assert_equal(gradients(model), expected)


# Options


def test_configs_are_found_by_name() -> None:
    expected = {"ats": ATSConfig, "slimmable": SlimmableConfig, "standard": StandardConfig}
    assert methods.configs().items() >= expected.items()


@pytest.mark.parametrize("config", [ATSConfig, SlimmableConfig])
def test_chains_of_widths(config: Any) -> None:
    method = config(ratios=(0.5, 0.25), round_to=1).build(resnet())
    assert list(method.subnets) == ["full", "core", "core2"]
    full, core, core2 = method.subnets.values()
    assert core.masks["layer1.0.conv1.weight"] == pk.Prefix(4, 4)
    assert core2.masks["layer1.0.conv1.weight"] == pk.Prefix(2, 2)
    assert core2.issubset(core) and core.issubset(full)
    for round_to, width in ((1, 3), (16, 4)):
        rounded = config(ratios=(0.4,), round_to=round_to).build(resnet()).subnets["core"]
        assert rounded.masks["layer1.0.conv1.weight"] == pk.Prefix(width, width)
    for subnet in method.subnets.values():
        norm = "bn1" if subnet is full else f"bn1.branches.{subnet.name}"
        inside = [
            name
            for name, parameter in subnet.model.named_parameters()
            if name.startswith("bn1.") and subnet.mask_of(parameter) is not None
        ]
        assert inside == [f"{norm}.weight", f"{norm}.bias"]


def test_step_size_factor_of_the_cores() -> None:
    method = ATSConfig(ratios=(0.5, 0.25), core_lr_scale=0.3).build(resnet())
    assert [method.plan(step).lr_scale for step in range(3)] == [1.0, 0.3, 0.3]


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ((), "ratios must name at least one core"),
        ((0.5, 0.5), r"must be different numbers in \(0, 1\), got \[0.5, 0.5\]"),
        ((1.0,), r"got \[1.0\]"),
        ((0.5, 0.0), r"got \[0.5, 0.0\]"),
        ((float("nan"),), r"got \[nan\]"),
    ],
)
@pytest.mark.parametrize("config", [ATSConfig, SlimmableConfig])
def test_ratios_out_of_range(config: Any, ratios: tuple[float, ...], message: str) -> None:
    model = resnet()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        config(ratios=ratios).build(model)
    assert set(model.state_dict()) == names


def test_standard_config() -> None:
    full = StandardConfig().build(resnet())
    core = StandardConfig("core", ratio=0.4, round_to=1).build(resnet())
    assert list(full.subnets) == ["full"] and list(core.subnets) == ["core"]
    assert core.subnets["core"].masks["conv1.weight"] == pk.Prefix(3, None)


# What steps touch

OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    ),
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
optimizers = pytest.mark.parametrize("rule", OPTIMIZERS)


def train(method: Method, optimizer: Any, steps: range) -> None:
    """The stock loop of ``Method``'s docstring."""
    model = next(iter(method.subnets.values())).model
    for step in steps:
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        optimizer.zero_grad()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and the optimizer's state of their shape, by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[f"{name} {key}"] = value.clone()
    return found


@pytest.mark.parametrize("make", [mlp, resnet])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_core_steps_leave_all_else_bitwise_alone(rule: str, make: Callable[[], nn.Module]) -> None:
    ours, _, options = OPTIMIZERS[rule]
    model = make()
    is_mlp = isinstance(model, nn.Sequential)
    core = neurons(model, pk.Prefix(3), "core") if is_mlp else SubNetwork.width(model, 0.5)
    full = SubNetwork.full(model)
    optimizer = ours(model.parameters(), **options)
    # Momentum and moments everywhere, which could move what a core step must not.
    train(ATS([full, core]), optimizer, range(4))
    before, buffers = optimizer_tensors(model, optimizer), dict(model.named_buffers())
    before_buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    train(Standard(core), optimizer, range(4, 54))
    after = optimizer_tensors(model, optimizer)
    assert after.keys() == before.keys()
    states = {"sgd": 1, "adamw": 2}[rule]
    assert len(after) == (1 + states) * len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        mask = core.mask_of(parameter)
        inside = (
            torch.zeros(parameter.shape).bool() if mask is None else mask.dense(parameter.shape)
        )
        for key in (key for key in after if key.split()[0] == name):
            assert torch.equal(after[key][~inside], before[key][~inside]), key
            assert not inside.any() or not torch.equal(after[key][inside], before[key][inside]), key
    for name, buffer in buffers.items():
        moved = not torch.equal(buffer, before_buffers[name])
        assert moved == (".branches.core." in name), name


@pytest.mark.parametrize("make", [mlp, resnet])
@optimizers
@pytest.mark.usefixtures("correct_roots")
def test_standard_is_a_stock_loop_bit_for_bit(rule: str, make: Callable[[], nn.Module]) -> None:
    ours, theirs, options = OPTIMIZERS[rule]
    model = make()
    stock = SubNetwork.full(model).extract()
    assert not any(isinstance(module, MaskedModule) for module in stock.modules())
    masked_optimizer = ours(model.parameters(), **options)
    stock_optimizer = theirs(stock.parameters(), **options)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        for optimizer in (masked_optimizer, stock_optimizer)
    ]
    method = Standard(SubNetwork.full(model))
    for step in range(50):
        train(method, masked_optimizer, range(step, step + 1))
        loss_of(stock, step)().backward()
        stock_optimizer.step()
        stock_optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        if step in (0, 49):
            assert_equal(snapshot(model), snapshot(stock))


@optimizers
def test_a_core_alone_is_its_extract_in_a_stock_loop(rule: str) -> None:
    ours, theirs, options = OPTIMIZERS[rule]
    model = mlp().double()
    core = neurons(model, pk.Prefix(3), "core")
    stock = core.extract()
    start = snapshot(stock)
    method, optimizer = Standard(core), ours(model.parameters(), **options)
    stock_optimizer = theirs(stock.parameters(), **options)
    for step in range(50):
        x, y = batch(model, step)
        x = x.double()
        plan = method.plan(step)
        plan.backward(lambda x=x, y=y: F.cross_entropy(model(x), y))
        F.cross_entropy(stock(x), y).backward()
        optimizer.step(plan.update)
        stock_optimizer.step()
        optimizer.zero_grad()
        stock_optimizer.zero_grad()
    # Products with a view and with a copy of a weight may add up in another order.
    torch.testing.assert_close(
        core.extract().state_dict(), stock.state_dict(), rtol=1e-10, atol=1e-10
    )
    assert not torch.equal(snapshot(stock)["0.weight"], start["0.weight"])

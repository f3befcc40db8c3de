"""``MeProp``: which layers become sparse, what a step costs and touches, how it trains."""

from __future__ import annotations

import copy
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from maskedtrain import LFCLinear, MaskedLinear, SubNetwork, TopKLinear, Trainer, cli, methods
from maskedtrain.config import TrainConfig, from_dict, to_dict
from maskedtrain.methods import MeProp, Method, Standard
from maskedtrain.methods.meprop import Config
from maskedtrain.models import MLP, Transformer, resnet8
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from tests.train.toolbox import Tied, assert_equal, gradients, noise, snapshot

BATCH = 16


def mlp(hidden: tuple[int, ...] = (40, 20)) -> Any:
    torch.manual_seed(0)
    return MLP(12, hidden, 4)


def loss_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    x, y = noise(BATCH, 12, seed=seed), torch.arange(BATCH) % 4
    return lambda: F.cross_entropy(model(x), y)


def sparse_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, TopKLinear)]


# Layers


def test_layers_become_sparse_in_place() -> None:
    model = mlp()
    before = {name: (module, [*module.parameters()]) for name, module in model.named_modules()}
    state, calls = snapshot(model), []
    model.hidden[0].register_forward_hook(lambda *_: calls.append(1))
    early = SubNetwork(model, {"hidden.0.weight": pk.Prefix(16)}, name="early")
    method = MeProp(model, 0.1, per="batch", bias_grad="topk")
    assert sparse_layers(model) == ["hidden.0", "hidden.1"]
    assert type(model.output) is MaskedLinear
    for name, module in model.named_modules():
        held, parameters = before[name]
        assert module is held
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert_equal(snapshot(model), state)
    layer = model.hidden[0]
    assert (layer.k, layer.per, layer.weight_grad, layer.bias_grad) == (
        0.1,
        "batch",
        "full",
        "topk",
    )
    assert list(method.subnets) == ["full"]
    # Sub-networks that were there know the layer as it is now.
    with early.activate():
        assert model.hidden[0](noise(3, 12)).shape == (3, 16)
    assert len(calls) == 1


def test_the_last_one_counts() -> None:
    model = mlp()
    MeProp(model, 0.1, per="batch")
    MeProp(model, 3)
    assert (model.hidden[0].k, model.hidden[0].per) == (3, "row")


def test_the_output_layer_is_the_last_one() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    MeProp(plain)
    assert sparse_layers(plain) == ["0", "2"]
    for tied in (True, False):
        model = Transformer(20, 20, d_model=8, heads=2, ffn=16, tie_output=tied)
        MeProp(model)
        found = sparse_layers(model)
        linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
        assert found == linears[:-1] and linears[-1] == "decoder.output_projection"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"layers": ["hidden.1"]}, ["hidden.1"]),
        ({"layers": ["hidden.*", "hidden.0"]}, ["hidden.0", "hidden.1"]),
        ({"exclude": []}, ["hidden.0", "hidden.1", "output"]),
        ({"exclude": ["hidden.*"]}, ["output"]),
        ({"layers": ["output"], "exclude": ()}, ["output"]),
    ],
)
def test_layers_by_pattern(options: dict[str, Any], found: list[str]) -> None:
    model = mlp()
    MeProp(model, **options)
    assert sparse_layers(model) == found


def test_other_kinds_of_layers_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 8), LFCLinear(8, 8, rank=2), nn.Linear(8, 3))
    MeProp(model)
    assert sparse_layers(model) == ["0"]
    with pytest.raises(ValueError, match=r"\['1'\] must match .* got 1, a maskedtrain.*LFCLinear"):
        MeProp(model, layers=["1"])


def parametrized() -> nn.Module:
    model = mlp()
    torch.nn.utils.parametrizations.weight_norm(model.hidden[1])
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mlp, {"k": 0}, "k must be a count, an int >= 1, or a share"),
        (mlp, {"k": 1.5}, "k must be a count, an int >= 1, or a share"),
        (mlp, {"per": "token"}, "per must be"),
        (mlp, {"weight_grad": "rows"}, 'weight_grad="rows" needs per="batch"'),
        (mlp, {"variant": "false"}, 'variant must be "backward" or "true", got'),
        (mlp, {"layers": ["hiden.*"]}, r"'hiden.\*' matches no nn.Linear; near it are"),
        (mlp, {"exclude": ["outputs"]}, "'outputs' matches no nn.Linear; near it are 'output'"),
        (mlp, {"layers": "hidden.0"}, "layers must be a list of patterns, got 'hidden.0'"),
        (mlp, {"layers": ["output"]}, "got output, which is excluded"),
        (lambda: resnet8(width=4), {}, "got fc, which is excluded"),
        (mlp, {"variant": "true", "per": "batch"}, "it has no per"),
        (mlp, {"variant": "true", "layers": ["hidden.0"]}, "it has no layers"),
    ],
)
def test_refusals_change_nothing(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        MeProp(model, **options)
    assert sparse_layers(model) == []


def test_a_layer_with_a_forward_of_its_own() -> None:
    model = mlp()
    model.hidden[1].forward = lambda x: x
    with pytest.raises(TypeError, match=r"hidden\.1 has a forward of its own"):
        MeProp(model)
    assert sparse_layers(model) == []


def test_fast_paths_of_torch_are_left() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = noise(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
        MeProp(model, layers=["*.linear?"], exclude=())
        assert sparse_layers(model) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        # The fast path adds up in another order.
        torch.testing.assert_close(model(x), expected)
        core = SubNetwork(model, {"layers.0.linear1.weight": None}, name="core")
        with core.activate():
            assert not torch.allclose(model(x), expected)


# Steps


@pytest.mark.parametrize("per", ["row", "batch"])
def test_a_step_is_one_pass_of_sparse_back_propagation(per: str) -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    method = MeProp(model, 3, per=per)
    plan = method.plan(5)
    assert plan is method.plan(0) and plan.lr_scale == 1.0
    assert [item.subnet.name for item in plan.passes] == ["full"]
    losses = plan.backward(loss_of(model))
    loss_of(dense)().backward()
    assert torch.equal(losses["full"], loss_of(dense)().detach())
    found, exact = gradients(model), gradients(dense)
    assert_equal(
        {n: g for n, g in found.items() if n.startswith("output")},
        {n: g for n, g in exact.items() if n.startswith("output")},
    )
    for name, rows in (("hidden.0.weight", 40), ("hidden.1.weight", 20)):
        kept = int(found[name].any(1).sum())
        assert kept == 3 if per == "batch" else 3 <= kept < rows
    # The layer that comes last: of the same dy.
    some = found["hidden.1.weight"].any(1)
    if per == "batch":
        torch.testing.assert_close(found["hidden.1.weight"][some], exact["hidden.1.weight"][some])
    assert torch.equal(found["hidden.1.bias"], exact["hidden.1.bias"])
    assert method.after_backward(5, plan) is plan
    assert method.state_dict() == {}


@pytest.mark.parametrize("per", ["row", "batch"])
def test_a_backward_costs_the_share_it_keeps(per: str) -> None:
    model = mlp((200, 100))
    method = MeProp(model, 0.05, per=per)
    loss = loss_of(model)()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    # 2 T k I: dW of the first layer, dx and dW of the second; the output layer whole.
    T = BATCH
    expected = 2 * T * 10 * 12 + 2 * (2 * T * 5 * 200) + 2 * (2 * T * 4 * 100)
    assert counter.get_total_flops() == expected
    forward = 2 * T * (12 * 200 + 200 * 100 + 100 * 4)
    full = method.subnets["full"]
    assert full.flops(noise(BATCH, 12), training=True) == forward + expected
    assert full.flops(noise(BATCH, 12)) == forward


def stock_loop(model: nn.Module, method: Method, optimizer: Any, steps: int) -> list[float]:
    losses: list[float] = []
    for step in range(steps):
        plan = method.plan(step)
        found = plan.backward(loss_of(model, step % 3))
        plan = method.after_backward(step, plan)
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        optimizer.zero_grad()
        losses.append(found["full"].item())
    return losses


OPTIONS: list[dict[str, Any]] = [
    {"k": 0.2},
    {"k": 0.2, "per": "batch"},
    {"k": 0.2, "per": "batch", "weight_grad": "rows"},
    {"k": 0.2, "variant": "true"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stock_loop_is_the_trainer(options: dict[str, Any]) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    losses = stock_loop(
        model, MeProp(model, **options), MaskedSGD(model.parameters(), 0.1, momentum=0.9), 60
    )
    assert losses[-1] < 0.5 * losses[0]
    optimizer = MaskedSGD(twin.parameters(), 0.1, momentum=0.9)
    trainer = Trainer(twin, MeProp(twin, **options), optimizer, F.cross_entropy)
    batches = ((noise(BATCH, 12, seed=step % 3), torch.arange(BATCH) % 4) for step in range(60))
    for report in trainer.steps(batches, until=60):
        assert report.losses["full"].item() == losses[report.step - 1]
    assert_equal(snapshot(twin), snapshot(model))


def test_any_optimizer_of_torch_trains_sparse_layers() -> None:
    model = mlp()
    MeProp(model, 0.2, per="batch")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses: list[float] = []
    for step in range(60):
        loss = loss_of(model, step % 3)()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_all_outputs_are_back_propagation_bit_for_bit() -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    for net, method in ((model, MeProp(model, 1.0)), (dense, Standard(SubNetwork.full(dense)))):
        stock_loop(net, method, MaskedSGD(net.parameters(), 0.1, momentum=0.9), 20)
    assert_equal(snapshot(model), snapshot(dense))


# weight_grad="rows"


def test_row_sparse_gradients_update_the_kept_rows_alone() -> None:
    model, expected = mlp(), mlp()
    method = MeProp(model, 3, per="batch", weight_grad="rows")
    MeProp(expected, 3, per="batch")
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = MaskedSGD(model.parameters(), **options)
    # Momentum everywhere, which could move what a step must not.
    for parameter in model.parameters():
        parameter.grad = 0.1 * torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    expected.load_state_dict(snapshot(model))
    before = snapshot(model)
    plan = method.plan(0)
    # Gradients of micro-batches add up.
    for seed in (1, 2):
        plan.backward(loss_of(model, seed))
        loss_of(expected, seed)().backward()
    assert model.hidden[0].weight.grad.is_sparse
    with pytest.raises(ValueError, match="gradients must be dense"):
        optimizer.step(plan.update)
    plan = method.after_backward(0, plan)
    for name, grad in gradients(expected).items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)
    optimizer.step(plan.update)
    for name, value in snapshot(model).items():
        kept = torch.ones(value.shape).bool()
        if name in ("hidden.0.weight", "hidden.1.weight"):
            rows = expected.get_parameter(name).grad.any(1)
            assert 3 <= rows.sum() <= 6
            kept = rows[:, None].expand(value.shape)
        assert torch.equal(value[~kept], before[name][~kept]), name
        assert not torch.isclose(value[kept], before[name][kept], rtol=0, atol=0).any(), name


def test_row_sparse_gradients_in_torchs_optimizer() -> None:
    model, expected = mlp(), mlp()
    MeProp(model, 3, per="batch", weight_grad="rows")
    MeProp(expected, 3, per="batch")
    for net in (model, expected):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(10):
            loss_of(net, step)().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(snapshot(model), snapshot(expected))


# The variant that masks the exact gradient


def exact_gradient(model: nn.Module, seed: int) -> Tensor:
    twin = copy.deepcopy(model)
    loss_of(twin, seed)().backward()
    return torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])


@pytest.mark.parametrize("k", [1, 50, 0.05, 1.0])
def test_true_top_k_keeps_the_largest_of_all_parameters(k: float) -> None:
    model = mlp()
    method = MeProp(model, k, variant="true")
    assert sparse_layers(model) == []
    total = sum(p.numel() for p in model.parameters())
    count = k if isinstance(k, int) else round(k * total)
    for step in range(4):
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        update = method.after_backward(step, plan).update
        assert method.plan(step).update is method.subnets["full"]
        g = exact_gradient(model, step)
        masks = [update.mask_of(p) for p in model.parameters()]
        assert all(isinstance(mask, pk.Packed) for mask in masks)
        inside = torch.cat(
            [m.dense(p.shape).flatten() for m, p in zip(masks, model.parameters(), strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
        )
        assert inside.sum() == count == update.numel()
        if count < total:
            assert g[inside].abs().min() >= g[~inside].abs().max()
        # c_norm, in fp64: of equal magnitudes the bound is reached.
        c_norm = (g.double().norm() / (g * inside).double().norm()).item()
        assert 1 <= c_norm <= math.sqrt(total / count) * (1 + 1e-12)
        model.zero_grad()


def test_the_bound_is_reached_by_equal_gradients() -> None:
    model = nn.Linear(4, 3)
    method = MeProp(model, 5, variant="true")
    plan = method.plan(0)
    plan.backward(lambda: model(torch.ones(1, 4)).sum())
    update = method.after_backward(0, plan).update
    # Of equal ones the first: 5 of the weight's 12, none of the bias.
    assert update.mask_of(model.weight) == pk.Packed(range(5))
    assert update.mask_of(model.bias) == pk.Packed([])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: MaskedSGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: MaskedAdamW(p, 0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_true_top_k_leaves_all_else_bitwise_alone(make: Any) -> None:
    model = mlp()
    method, optimizer = MeProp(model, 0.05, variant="true"), make(model.parameters())
    # Momentum and moments everywhere, which could move what a step must not.
    stock_loop(model, Standard(SubNetwork.full(model)), optimizer, 3)

    def tensors() -> dict[str, Tensor]:
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            for key, value in optimizer.state[p].items():
                if isinstance(value, Tensor):
                    found[f"{name} {key}"] = value.clone()
        return found

    for step in range(5):
        before = tensors()
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        plan = method.after_backward(step, plan)
        optimizer.step(plan.update)
        optimizer.zero_grad()
        after = tensors()
        changed = 0
        for name, p in model.named_parameters():
            mask = plan.update.mask_of(p)
            assert mask is not None
            inside = mask.dense(p.shape)
            for key in (key for key in after if key.split()[0] == name):
                assert torch.equal(after[key][~inside], before[key][~inside]), key
            changed += int((after[name] != before[name]).sum())
        assert changed == plan.update.numel() == round(0.05 * (12 * 40 + 40 + 820 + 84))


def test_true_top_k_of_tied_frozen_and_unused_parameters() -> None:
    model = Tied()
    model.unused = nn.Linear(3, 3)
    model.scale = nn.Parameter(torch.ones(()), requires_grad=False)
    method = MeProp(model, 7, variant="true")
    plan = method.plan(0)
    plan.backward(lambda: model(torch.tensor([[0, 3]])).logsumexp(-1).sum())
    update = method.after_backward(0, plan).update
    assert update.numel() == 7 == update.mask_of(model.embedding.weight).numel((5, 4))  # pyright: ignore[reportOptionalMemberAccess]
    assert update.mask_of(model.unused.weight) is None and update.mask_of(model.scale) is None
    MaskedSGD(model.parameters(), 0.1).step(update)
    # Without a gradient nothing is updated.
    model.zero_grad()
    assert method.after_backward(0, plan).update.numel() == 0


# Options and runs


def test_it_is_found_by_its_name() -> None:
    assert methods.configs()["meprop"] is Config
    model = mlp()
    Config(ratio=0.1, per="batch").build(model)
    assert sparse_layers(model) == ["hidden.0", "hidden.1"]
    assert (model.hidden[0].k, model.hidden[0].per) == (0.1, "batch")
    model = mlp()
    Config(k=3, layers=("hidden.0",), exclude=(), bias_grad="topk").build(model)
    assert sparse_layers(model) == ["hidden.0"] and model.hidden[0].k == 3
    assert model.hidden[0].bias_grad == "topk"
    assert Config(variant="true").build(mlp()).variant == "true"
    for options in ({"ratio": 0.0}, {"ratio": 1.5}, {"k": 0}):
        with pytest.raises(ValueError, match="k must be a count"):
            Config(**options)


@pytest.mark.parametrize(
    "config", [Config(), Config(k=3, exclude=("a", "b*")), Config(ratio=1.0, exclude=())]
)
def test_there_and_back_through_json(config: Config) -> None:
    written = to_dict(TrainConfig(method=config))
    assert from_dict(json.loads(json.dumps(written))).method == config


@pytest.mark.parametrize(
    "arguments",
    [
        ["--per", "batch", "--ratio", "0.1"],
        ["--k", "3", "--layers", "hidden.0", "hidden.1", "--exclude", "output"],
        ["--per", "batch", "--weight-grad", "rows"],
        ["--variant", "true"],
    ],
    ids=" ".join,
)
def test_the_command_line(arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    run = tmp_path / "run"
    options = "--dataset digits --model mlp --hidden 40 20 --method meprop --epochs 2 --max-steps 6"
    cli.main(["train", *shlex.split(options), "--out", str(run), *arguments])
    cli.main(["train", "--resume", str(run), "--max-steps", "8"])
    cli.main(["eval", str(run)])
    assert "meprop" in capsys.readouterr().out
    flops = json.loads((run / "summary.json").read_text())["results"][0]["train_flops"]
    forward = 2 * (64 * 40 + 40 * 20 + 20 * 10)
    dense = 2 * (64 * 40 + 2 * 40 * 20 + 2 * 20 * 10)
    assert (flops == 8 * 128 * (forward + dense)) == ("true" in arguments)
    assert flops <= 8 * 128 * (forward + dense)


# How well it trains


def digits_accuracy(method_of: Callable[[nn.Module], Method], seed: int) -> float:
    """Per cent of the test images, of an MLP 64-500-500-10 after 20 epochs."""
    from maskedtrain.data import digits
    from maskedtrain.data.images import BatchLoader

    data = digits.load()
    torch.manual_seed(seed)
    model = MLP(64, (500, 500), 10)
    method = method_of(model)
    optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = Trainer(model, method, optimizer, F.cross_entropy)
    scale = {"mean": data.mean, "std": data.std}
    batches = BatchLoader(data.train, 64, seed=seed, shuffle=True, drop_last=True, **scale)
    for _ in trainer.steps(batches.stream(), until=20 * len(batches)):
        pass
    test = BatchLoader(data.test, 500, **scale)
    return 100 * trainer.evaluate(test, method.subnets["full"]).accuracy


METHODS: dict[str, Callable[[nn.Module], Method]] = {
    "row": lambda model: MeProp(model, 0.05),
    "batch": lambda model: MeProp(model, 0.05, per="batch"),
    "true": lambda model: MeProp(model, 0.05, variant="true"),
}


@pytest.mark.slow
def test_five_per_cent_train_as_well_as_all() -> None:
    pytest.importorskip("sklearn")
    means = {
        name: sum(digits_accuracy(method_of, seed) for seed in range(3)) / 3
        for name, method_of in {
            "dense": lambda model: Standard(SubNetwork.full(model)),
            **METHODS,
        }.items()
    }
    assert means["dense"] > 96
    # A third of a point is one image. Five seeds gave 97.2 (dense), 97.4, 97.4 and 96.9.
    for name, points in (("row", 0.5), ("batch", 0.5), ("true", 1.0)):
        assert means[name] >= means["dense"] - points, means

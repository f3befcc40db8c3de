"""``PruneWithFeedback``: gradients at p x against autograd's, masks, state, how well it trains."""

from __future__ import annotations

import copy
import io
import json
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
from maskedtrain import SubNetwork, Trainer, cli, methods
from maskedtrain.config import TrainConfig, from_dict, to_dict
from maskedtrain.methods import Method, PruneWithFeedback, Standard
from maskedtrain.methods.prune import Config
from maskedtrain.models import MLP, resnet8
from maskedtrain.optim import MaskedSGD
from maskedtrain.theory.criteria import measure_plan
from tests.train.toolbox import TOKENS, Tied, assert_equal, gradients, noise, snapshot

BATCH = 16
N = 12 * 20 + 20 * 10 + 10 * 4


def mlp() -> Any:
    torch.manual_seed(0)
    return MLP(12, (20, 10), 4)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return noise(BATCH, 12, seed=seed), torch.arange(BATCH) % 4


def loss_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    x, y = batch(seed)
    return lambda: F.cross_entropy(model(x), y)


def masks_of(method: PruneWithFeedback) -> dict[str, Tensor]:
    """Where the pruned network has weights, by the names of those that have a mask."""
    masks = method.subnets["pruned"].masks
    return {name: mask.mask for name, mask in masks.items() if isinstance(mask, pk.Element)}


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1}


def largest_magnitudes(weights: dict[str, Tensor], pruned: int) -> dict[str, Tensor]:
    """Masks without the ``pruned`` smallest magnitudes of all, of which no two are equal."""
    sizes = torch.cat([weight.flatten().abs() for weight in weights.values()]).sort().values
    return {name: weight.abs() >= sizes[pruned] for name, weight in weights.items()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Parameters as integers, to which -0.0 is not 0.0."""
    return {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}


def loop(model: nn.Module, method: Method, optimizer: Any, steps: range) -> None:
    """A stock loop without hooks."""
    for step in steps:
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        optimizer.zero_grad()


# A step


def test_the_gradient_is_that_of_the_pruned_weights_and_updates_all() -> None:
    model = mlp()
    method = PruneWithFeedback(model, 0.7, refresh_every=4)
    masks = largest_magnitudes(matrices(model), round(0.7 * N))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    point = {
        name: torch.where(masks[name], x, 0.0) if name in masks else x for name, x in before.items()
    }
    leaves = {name: x.clone().requires_grad_() for name, x in point.items()}
    x, y = batch(0)
    value = F.cross_entropy(torch.func.functional_call(model, leaves, (x,)), y)
    expected = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

    plan = method.plan(0)
    losses = plan.backward(loss_of(model))
    assert plan.update is method.subnets["full"] and plan.lr_scale == 1.0
    assert list(losses) == ["pruned"] and torch.equal(losses["pruned"], value.detach())
    found = gradients(model)
    assert_equal(found, expected)
    for name, mask in masks.items():
        assert found[name][~mask].count_nonzero() > 0.3 * (~mask).sum()
        # As if it were outside, a masked weight would have none.
    MaskedSGD(model.parameters(), lr=0.1).step(plan.update)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * expected[name])
        moved = (parameter != before[name]) == (expected[name] != 0)
        assert moved.float().mean() > 0.99  # an update may be rounded off


def test_parameters_come_back_bit_for_bit() -> None:
    model = mlp()
    with torch.no_grad():
        model.hidden[0].weight[0, :2] = torch.tensor([-0.0, 1e-42])
    method = PruneWithFeedback(model, 0.9, refresh_every=1)
    before, seen = bits(model), []

    def failing() -> Tensor:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        raise RuntimeError("out of memory")

    method.plan(0).backward(loss_of(model))
    assert_equal(bits(model), before)
    with pytest.raises(RuntimeError, match="out of memory"):
        method.plan(1).backward(failing)
    assert_equal(bits(model), before)
    masks = masks_of(method)
    for name, values in seen[0].items():
        if name in masks:
            assert torch.equal(values == 0, ~masks[name])
        else:
            assert torch.equal(values, model.get_parameter(name))


def test_a_pass_costs_a_dense_one() -> None:
    def flops(method: Method, model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            method.plan(0).backward(loss_of(model))
        return counter.get_total_flops()

    model = mlp()
    dense = flops(Standard(SubNetwork.full(model)), model)
    method = PruneWithFeedback(model, 0.9, refresh_every=1)
    assert flops(method, model) == dense
    # What a run is charged for.
    assert method.subnets["pruned"].flops(noise(BATCH, 12), training=True) == dense


def test_the_criteria_know_what_was_moved() -> None:
    model = mlp()
    method = PruneWithFeedback(model, 0.5, refresh_every=1)
    whole = measure_plan(model, method.plan(0), loss_of(model))["pruned"].whole
    masks = masks_of(method)
    away = sum(float(w[~masks[n]].double().square().sum()) for n, w in matrices(model).items())
    assert whole.displacement_sq == pytest.approx(away, rel=1e-6)
    assert whole.c_norm == 1 and whole.c_align > 1


# Masks


def test_the_sparsity_rises_by_the_cubic_schedule() -> None:
    ramp = PruneWithFeedback(mlp(), 0.8, refresh_every=1, ramp_steps=4)
    # 0.8 (1 - (3/4)^3), ...
    expected = [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    assert [ramp.sparsity_at(t) for t in range(6)] == pytest.approx(expected, rel=1e-15)
    assert ramp.sparsity_at(10**6) == 0.8
    plain = PruneWithFeedback(mlp(), 0.8, refresh_every=1)
    assert [plain.sparsity_at(t) for t in (0, 7)] == [0.8, 0.8]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_are_drawn_every_few_steps_from_the_weights(scope: Any) -> None:
    model = mlp()
    method = PruneWithFeedback(model, 0.83, refresh_every=3, ramp_steps=7, scope=scope)
    optimizer = MaskedSGD(model.parameters(), lr=1.0)
    pruned, expected, changes = method.subnets["pruned"], masks_of(method), 0
    for step in range(40):
        if step % 3 == 0:
            weights, share, before = matrices(model), method.sparsity_at(step), expected
            if scope == "global":
                expected = largest_magnitudes(weights, round(share * N))
                assert sum(int((~m).sum()) for m in expected.values()) == round(share * N)
            else:
                expected = {}
                for name, weight in weights.items():
                    one = largest_magnitudes({name: weight}, round(share * weight.numel()))
                    expected.update(one)
            changes += any(not torch.equal(expected[name], before[name]) for name in expected)
        loop(model, method, optimizer, range(step, step + 1))
        assert_equal(masks_of(method), expected)
        assert method.subnets["pruned"] is pruned
    # From step 9 on the sparsity is the same: weights came back.
    assert changes > 3


def test_a_plan_changes_nothing() -> None:
    model = mlp()
    method = PruneWithFeedback(model, 0.5, refresh_every=2)
    loop(model, method, MaskedSGD(model.parameters(), lr=0.5), range(2))
    before, state = masks_of(method), method.state_dict()
    method.plan(2)
    method.plan(100)
    assert_equal(masks_of(method), before)
    assert method.state_dict() == state


def test_the_first_step_draws_from_the_weights_it_finds() -> None:
    model = mlp()
    method = PruneWithFeedback(model, 0.5, refresh_every=100)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters(), start=3):
            parameter.copy_(noise(*parameter.shape, seed=seed))
    method.plan(0).backward(loss_of(model))
    assert_equal(masks_of(method), largest_magnitudes(matrices(model), N // 2))


def test_of_equal_magnitudes_the_first_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1.0)
    # round(0.75 * 14) = 10 of 14 go.
    masks = masks_of(PruneWithFeedback(model, 0.75, refresh_every=1))
    assert masks["0.weight"].tolist() == [[True] * 4, [False] * 4]
    assert not masks["1.weight"].any()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["hidden.0.weight", "hidden.1.weight", "output.weight"]),
        ({"exclude": ["output"]}, ["hidden.0.weight", "hidden.1.weight"]),
        ({"layers": ["hidden.*"], "exclude": ["*.0"]}, ["hidden.1.weight"]),
    ],
)
def test_what_is_pruned(options: dict[str, Any], names: list[str]) -> None:
    model = mlp()
    method = PruneWithFeedback(model, 0.5, refresh_every=1, **options)
    masks = masks_of(method)
    assert list(masks) == names
    pruned = method.subnets["full"].numel() - method.subnets["pruned"].numel()
    assert pruned == sum(mask.numel() for mask in masks.values()) // 2


def test_tied_and_frozen_weights() -> None:
    model = Tied()
    method = PruneWithFeedback(model, 0.5, refresh_every=1)
    method.plan(0).backward(lambda: model(TOKENS).logsumexp(-1).sum())
    masks = masks_of(method)
    assert list(masks) == ["embedding.weight", "output.weight"]
    assert torch.equal(masks["embedding.weight"], masks["output.weight"])
    assert masks["output.weight"].sum() == 10
    method.load_state_dict(method.state_dict())
    frozen = mlp()
    frozen.hidden[0].weight.requires_grad = False
    assert "hidden.0.weight" not in masks_of(PruneWithFeedback(frozen, 0.5, refresh_every=1))


def recurrent() -> nn.Module:
    return nn.Sequential(nn.LSTM(4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\), got nan"),
        ({"refresh_every": 0}, "refresh_every must be >= 1, got 0"),
        ({"ramp_steps": -1}, "ramp_steps must be >= 0, got -1"),
        ({"scope": "model"}, 'scope must be "global" or "layer", got \'model\''),
        ({"layers": "hidden.0"}, "layers must be a list of patterns, got 'hidden.0'"),
        (
            {"layers": ["hiden.*"]},
            r"layers: 'hiden.\*' matches no module .* which has hidden.0, hidden.1, output$",
        ),
        ({"exclude": ["dropout"]}, "exclude: 'dropout' matches no module"),
        ({"exclude": ["*"]}, r"layers \['\*'\] without \['\*'\] leave nothing to prune"),
        ({"layers": []}, r"layers must be a list of patterns, got \[\]"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneWithFeedback(mlp(), **{"sparsity": 0.5, "refresh_every": 1, **options})


def test_recurrent_weights_cannot_be_masked() -> None:
    with pytest.raises(TypeError, match="LSTM keeps its weights in a list"):
        PruneWithFeedback(recurrent(), 0.5, refresh_every=1)


# The pruned network


@pytest.mark.parametrize("make", [mlp, lambda: resnet8(width=8, num_classes=4)])
def test_what_is_extracted_has_zeros_and_the_same_outputs(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make()
    shape = (12,) if isinstance(model, MLP) else (3, 8, 8)
    method = PruneWithFeedback(model, 0.8, refresh_every=2)
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    total = sum(weight.numel() for weight in matrices(model).values())
    for step in range(5):
        x = noise(BATCH, *shape, seed=step)
        plan = method.plan(step)
        plan.backward(lambda x=x: F.cross_entropy(model(x), torch.arange(BATCH) % 4))
        optimizer.step(plan.update)
        optimizer.zero_grad()
    model.eval()
    x, pruned = noise(3, *shape, seed=9), method.subnets["pruned"]
    alone = pruned.extract()
    with pruned.activate():
        assert torch.equal(alone(x), model(x))
    assert not torch.equal(alone(x), model(x))
    zeros = {name: weight == 0 for name, weight in matrices(alone).items()}
    assert_equal(zeros, {name: ~mask for name, mask in masks_of(method).items()})
    assert sum(int(zero.sum()) for zero in zeros.values()) == round(0.8 * total)
    assert all(module.__class__.__module__.startswith("torch.nn") for module in leaves(alone))


def leaves(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not list(module.children())]


# Resuming


def trainer_of(model: nn.Module) -> Trainer:
    method = PruneWithFeedback(model, 0.7, refresh_every=4, ramp_steps=6)
    optimizer = MaskedSGD(model.parameters(), lr=0.3, momentum=0.9)
    return Trainer(model, method, optimizer, F.cross_entropy)


@pytest.mark.parametrize("cut", [0, 4, 6, 7])
def test_a_resumed_run_goes_on_bit_for_bit(cut: int) -> None:
    batches = [batch(step) for step in range(12)]
    whole, first, second = mlp(), mlp(), mlp()
    one = trainer_of(whole)
    for _ in one.steps(batches, until=12):
        pass
    before = trainer_of(first)
    for _ in before.steps(batches, until=cut):
        pass
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    second.load_state_dict(first.state_dict())
    after = trainer_of(second)
    after.load_state_dict(torch.load(file, weights_only=True))
    held = masks_of(after.method)  # pyright: ignore[reportArgumentType]
    assert_equal(held, masks_of(before.method))  # pyright: ignore[reportArgumentType]
    if cut == 6:
        # A mask drawn from the weights now would be another.
        drawn = largest_magnitudes(matrices(second), sum(int((~m).sum()) for m in held.values()))
        assert any(not torch.equal(drawn[name], held[name]) for name in held)
    for _ in after.steps(batches[cut:], until=12):
        pass
    assert_equal(snapshot(second), snapshot(whole))
    assert after.method.state_dict() == one.method.state_dict()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    method = PruneWithFeedback(mlp(), 0.5, refresh_every=1)
    other = PruneWithFeedback(nn.Sequential(nn.Linear(3, 3)), 0.5, refresh_every=1)
    wide = PruneWithFeedback(MLP(13, (20, 10), 4), 0.5, refresh_every=1)
    state = method.state_dict()
    for given, message in (
        ({}, r"must be a period and masks of \['hidden.0.weight', .* got \[\] with \[\]"),
        (other.state_dict(), r"got \['masks', 'period'\] with \['0.weight'\]"),
        (wide.state_dict(), r"hidden.0.weight: Element mask must have the parameter's shape"),
    ):
        with pytest.raises(ValueError, match=message):
            method.load_state_dict(given)
        assert method.state_dict() == state


# Options and runs


def test_it_is_found_by_its_name() -> None:
    assert methods.configs()["prune"] is Config
    made = Config(0.5, 3, 7, ("hidden.*",), ("*.1",), "layer").build(mlp())
    options = (made.sparsity, made.refresh_every, made.ramp_steps, made.scope)
    assert options == (0.5, 3, 7, "layer") and list(masks_of(made)) == ["hidden.0.weight"]
    assert list(made.subnets) == ["pruned", "full"]
    with pytest.raises(ValueError, match="sparsity must be in"):
        Config(sparsity=1.5)
    config = Config(ramp_steps=3, exclude=("output",))
    written = to_dict(TrainConfig(method=config))
    assert from_dict(json.loads(json.dumps(written))).method == config


def test_the_command_line(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    safetensors = pytest.importorskip("safetensors.torch")
    run, out = tmp_path / "run", tmp_path / "pruned.safetensors"
    options = "--dataset digits --model mlp --hidden 40 20 --method prune --refresh-every 3"
    cli.main(["train", *shlex.split(options), "--out", str(run), "--max-steps", "5"])
    cli.main(["train", "--resume", str(run), "--max-steps", "8"])
    cli.main(["eval", str(run)])
    assert "pruned" in capsys.readouterr().out
    cli.main(["extract", str(run), "--subnet", "pruned", "--out", str(out)])
    weights = {n: w for n, w in safetensors.load_file(out).items() if w.ndim > 1}
    total = sum(weight.numel() for weight in weights.values())
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros == round(0.9 * total)


# How well it trains


def digits_accuracy(method_of: Callable[[nn.Module], Method], seed: int) -> tuple[float, Any]:
    """Per cent of the test images, of an MLP 64-500-500-10 after 20 epochs, and the model."""
    from maskedtrain.data import digits
    from maskedtrain.data.images import BatchLoader

    data = digits.load()
    torch.manual_seed(seed)
    model = MLP(64, (500, 500), 10)
    method = method_of(model)
    scale = {"mean": data.mean, "std": data.std}
    batches = BatchLoader(data.train, 64, seed=seed, shuffle=True, drop_last=True, **scale)
    test = BatchLoader(data.test, 500, **scale)
    optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = 20 * len(batches)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trainer = Trainer(model, method, optimizer, F.cross_entropy, scheduler=scheduler)
    for _ in trainer.steps(batches.stream(), until=steps):
        pass

    def accuracy(subnet: SubNetwork) -> float:
        return 100 * trainer.evaluate(test, subnet).accuracy

    return accuracy(next(iter(method.subnets.values()))), accuracy


@pytest.mark.slow
def test_ninety_per_cent_of_the_weights_can_go() -> None:
    pytest.importorskip("sklearn")
    found: dict[Any, list[float]] = {}
    for seed in range(3):
        models: list[nn.Module] = []

        def dense(model: nn.Module, models: list[nn.Module] = models) -> Method:
            models.append(model)
            return Standard(SubNetwork.full(model))

        accuracy, accuracy_of = digits_accuracy(dense, seed)
        found.setdefault("dense", []).append(accuracy)
        for sparsity in (0.9, 0.95):
            # Magnitude pruning of what was trained densely, which is the same masks.
            once = PruneWithFeedback(copy.deepcopy(models[0]), sparsity, refresh_every=1)
            (alone,) = (once.subnets["pruned"].masks,)
            masks = {name: alone[name] for name in masks_of(once)}
            at_once = SubNetwork(models[0], masks, name="at once")
            found.setdefault(("once", sparsity), []).append(accuracy_of(at_once))
            accuracy, _ = digits_accuracy(
                lambda model, s=sparsity: PruneWithFeedback(
                    model, s, refresh_every=16, ramp_steps=100
                ),
                seed,
            )
            found.setdefault(("feedback", sparsity), []).append(accuracy)
    means = {name: sum(values) / 3 for name, values in found.items()}
    # A third of a point is one image. Five seeds gave 97.3 (dense); of 90 % pruned 97.5, at once
    # 96.4; of 95 % 96.6, at once 68.5.
    assert means["dense"] > 96
    assert means["feedback", 0.9] >= means["dense"] - 1, means
    assert means["feedback", 0.9] > means["once", 0.9], means
    assert means["feedback", 0.95] > means["once", 0.95] + 15, means

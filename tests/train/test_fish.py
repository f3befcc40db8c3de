"""``FishMask``: which elements, what is left alone, packed and unpacked, draws, resuming."""

from __future__ import annotations

import copy
import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from maskedtrain import SubNetwork, Trainer, cli
from maskedtrain.config import TrainConfig, from_dict, to_dict
from maskedtrain.methods import configs
from maskedtrain.methods.fish import Config, FishMask
from maskedtrain.methods.fisher import fisher_scores
from maskedtrain.models import MLP, resnet8
from maskedtrain.models.text_classifier import TextClassifier
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.training.checkpoint import Checkpoints
from tests.train.toolbox import Tied, assert_equal, noise, snapshot

I, H, C = 12, 20, 4
# Of MLP(12, (20, 10), 4): its head, its parameters.
HEAD, ALL = 10 * 4 + 4, 12 * 20 + 20 + 20 * 10 + 10 + 44


def mlp() -> Any:
    torch.manual_seed(0)
    return MLP(I, (H, 10), C)


def batches(
    size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    for number in itertools.count(1000 * seed):
        yield noise(size, I, seed=number).to(dtype), (torch.arange(size) * number) % C


def prepared(model: nn.Module, ratio: float = 0.2, **options: Any) -> FishMask:
    method = FishMask(model, ratio, **{"examples": 20, **options})
    method.prepare(batches(dtype=next(model.parameters()).dtype))
    return method


def inside(method: FishMask) -> dict[str, Tensor]:
    """Where the model is trained, by the names that the plain model's parameters have."""
    masks, update = {}, method.plan(0).update
    positions = method.state_dict()["positions"]
    for name, parameter in mlp().named_parameters():
        if name in positions:
            masks[name] = pk.Packed(positions[name].long()).dense(parameter.shape)
        else:
            assert update.masks[name] == pk.Full()
            masks[name] = torch.ones(parameter.shape, dtype=torch.bool)
    return masks


def plain_weights(method: FishMask) -> dict[str, Tensor]:
    """By the plain model's names."""
    return snapshot(method.full.extract())


def run(method: FishMask, optimizer: Any, steps: range) -> None:
    """A stock loop, with the hook that draws masks anew."""
    dtype = next(method.model.parameters()).dtype
    stream = itertools.islice(batches(seed=1, dtype=dtype), steps.start, None)
    for step in steps:
        x, y = next(stream)
        plan = method.plan(step)
        plan.backward(lambda: F.cross_entropy(method.model(x), y))  # noqa: B023
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        method.after_step(step, plan, optimizer)
        optimizer.zero_grad()


# Which elements


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_the_mask_is_the_largest_scores_and_the_head(kind: Any, packed: bool) -> None:
    method = prepared(mlp(), kind=kind, packed=packed)
    scores = fisher_scores(mlp(), batches(), examples=20, kind=kind)
    budget = round(0.2 * ALL)
    others = {name: s for name, s in scores.items() if not name.startswith("output")}
    cut = torch.cat([s.flatten() for s in others.values()]).sort().values[-(budget - HEAD)]
    expected = {
        n: s >= cut if n in others else torch.ones_like(s).bool() for n, s in scores.items()
    }
    assert_equal(inside(method), expected)
    assert method.budget == budget == method.plan(0).update.numel()
    assert sum(int(mask.sum()) for mask in expected.values()) == budget


@pytest.mark.parametrize("packed", [True, False])
def test_of_equal_scores_the_first_are_taken(packed: bool) -> None:
    """Equal features give the columns of the first layer equal scores."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False))
    x = torch.ones(6, 1).expand(6, 4)
    scores = fisher_scores(model, [(x, torch.arange(6) % 2)], examples=6)["0.weight"]
    assert (scores == scores[:, :1]).all() and scores[0, 0] != scores[1, 0]
    # The head's 4 and 2 of the 4 that are equal and largest.
    method = FishMask(model, 6 / 12, examples=6, packed=packed)
    method.prepare([(x, torch.arange(6) % 2)])
    row = int(scores[:, 0].argmax())
    assert method.state_dict()["positions"]["0.weight"].tolist() == [4 * row, 4 * row + 1]


def test_the_head_is_the_output_layer_or_what_is_named() -> None:
    def in_full(method: FishMask) -> set[str]:
        return {n for n, m in inside(method).items() if m.all()}

    assert in_full(prepared(mlp())) == {"output.weight", "output.bias"}
    method = prepared(mlp(), 0.6, head=["hidden.1", "out*"])
    assert in_full(method) >= {"hidden.1.weight", "hidden.1.bias", "output.weight", "output.bias"}
    assert method.plan(0).update.numel() == round(0.6 * ALL)


def test_a_head_may_be_all_that_is_trained() -> None:
    method = prepared(mlp(), HEAD / ALL)
    assert method.plan(0).update.numel() == HEAD
    start = snapshot(mlp())
    run(method, MaskedSGD(method.model.parameters(), lr=0.1), range(2))
    moved = {n for n, w in plain_weights(method).items() if not torch.equal(w, start[n])}
    assert moved == {"output.weight", "output.bias"}


def test_a_head_beyond_the_budget_is_refused_with_the_numbers() -> None:
    message = r"the head has 44 parameters, and ratio 0.05 of 514 keeps 26: it must be >= 0.086"
    with pytest.raises(ValueError, match=message):
        FishMask(mlp(), 0.05)


def test_frozen_parameters_are_no_part_of_it() -> None:
    model = mlp()
    model.hidden[0].requires_grad_(False)
    method = prepared(model)
    assert method.budget == round(0.2 * (ALL - 12 * 20 - 20))
    assert not any(name.startswith("hidden.0") for name in method.state_dict()["positions"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"examples": 0}, "examples must be >= 1, got 0"),
        ({"kind": "both"}, 'kind must be "empirical" or "true", got \'both\''),
        ({"redraw_every": 0}, "redraw_every must be >= 1 or None, got 0"),
        ({"head": "output"}, "head must be a list of patterns, got 'output'"),
        ({"head": ["fc"]}, "head: 'fc' matches no module with a trained parameter"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    model = mlp()
    before = list(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        FishMask(model, **options)
    assert all(a[1] is b[1] for a, b in zip(before, model.named_parameters(), strict=True))


def test_a_model_without_linear_layers_needs_a_head() -> None:
    with pytest.raises(ValueError, match="no linear layer to be its head; name one"):
        FishMask(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_it_needs_data_first_and_enough_of_them() -> None:
    method = FishMask(mlp(), 0.2, examples=20)
    with pytest.raises(RuntimeError, match=r"call prepare\(batches\) first"):
        method.plan(0)
    assert method.state_dict() == {"draws": 0, "positions": {}}
    with pytest.raises(ValueError, match="examples must be <= 16"):
        method.prepare(itertools.islice(batches(), 2))


# What is trained, what stays

OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (MaskedSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (MaskedSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adamw": (MaskedAdamW, {"lr": 0.01, "weight_decay": 0.3}),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outside_the_mask_nothing_moves_by_a_bit(name: str, packed: bool) -> None:
    """Where the gradient alone is masked, decay moves the rest; here decay and momentum act on the
    mask alone, also on elements whose gradient is 0 at a step.
    """
    make, options = OPTIMIZERS[name]
    method, start = prepared(mlp(), packed=packed), snapshot(mlp())
    masks = inside(method)
    run(method, make(method.model.parameters(), **options), range(5))
    for key, weight in plain_weights(method).items():
        assert torch.equal(weight[~masks[key]], start[key][~masks[key]]), key
        assert (weight[masks[key]] != start[key][masks[key]]).all(), key


def test_masking_the_gradient_alone_would_move_the_rest() -> None:
    """What the test above would find: the order of the authors' code."""
    model, masks = mlp(), inside(prepared(mlp()))
    start, (x, y) = snapshot(model), next(batches(seed=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    F.cross_entropy(model(x), y).backward()
    for key, parameter in model.named_parameters():
        parameter.grad *= masks[key]
    optimizer.step()
    key = "hidden.0.weight"
    assert not torch.equal(model.hidden[0].weight[~masks[key]], start[key][~masks[key]])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inside_it_is_torchs_optimizer(name: str, packed: bool) -> None:
    """Which sees the whole gradient and whose other elements are put back after every step."""
    _, options = OPTIMIZERS[name]
    make = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    method, model = prepared(mlp().double(), packed=packed), mlp().double()
    masks, start = inside(method), snapshot(model)
    optimizer = make(model.parameters(), **options)
    for x, y in itertools.islice(batches(seed=1, dtype=torch.float64), 5):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(torch.where(masks[key], parameter, start[key]))
    run(method, OPTIMIZERS[name][0](method.model.parameters(), **options), range(5))
    for key, weight in plain_weights(method).items():
        # fp64, sums in another order.
        torch.testing.assert_close(weight, snapshot(model)[key], rtol=1e-9, atol=1e-12)


def test_packed_and_unpacked_agree_exactly_where_sums_are_exact() -> None:
    """Small integers in fp64, SGD without decay."""
    found: list[dict[str, Tensor]] = []
    for packed in (True, False):
        model = mlp().double()
        method = prepared(model, 0.3, packed=packed)
        for parameter in [*model.parameters(), *model.buffers()]:
            if parameter.is_floating_point():
                parameter.data = (parameter.data * 4).round()
        optimizer = MaskedSGD(model.parameters(), lr=0.125)
        for step in range(2):
            x = noise(5, I, seed=step).mul(2).round().double()
            plan = method.plan(step)
            plan.backward(lambda: model(x).square().sum())  # noqa: B023
            optimizer.step(plan.update)
            optimizer.zero_grad()
        found.append(plain_weights(method))
    assert_equal(*found)
    assert not torch.equal(
        found[0]["hidden.0.weight"], (mlp().hidden[0].weight * 4).round().double()
    )


def test_gradients_and_states_have_as_many_elements_as_are_trained() -> None:
    method = prepared(mlp())
    optimizer = MaskedAdamW(method.model.parameters(), lr=0.01)
    plan = method.plan(0)
    x, y = next(batches())
    plan.backward(lambda: F.cross_entropy(method.model(x), y))
    optimizer.step(plan.update)
    grads = [p.grad for p in method.model.parameters() if p.grad is not None]
    assert sum(grad.numel() for grad in grads) == method.budget
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    assert sum(t.numel() for t in state) == 2 * method.budget


# What it costs


def test_a_step_costs_forward_dx_and_the_sampled_gradient() -> None:
    method = prepared(mlp())
    x, y = next(batches(16))
    first, second, head = 2 * 16 * 12 * 20, 2 * 16 * 20 * 10, 2 * 16 * 10 * 4
    positions = method.state_dict()["positions"]
    sampled = 2 * 16 * sum(len(positions[f"hidden.{i}.weight"]) for i in (0, 1))
    plan = method.plan(0)
    with FlopCounterMode(display=False) as counter:
        plan.backward(lambda: F.cross_entropy(method.model(x), y))
    # The first layer has no gradient of its inputs.
    expected = (first + second + head) + (second + head) + head + sampled
    assert counter.get_total_flops() == expected == plan.flops(x)


# Drawing anew


@pytest.mark.parametrize("packed", [True, False])
def test_a_mask_drawn_anew_is_that_of_a_run_begun_there(packed: bool) -> None:
    """With the examples that follow and an optimizer of its own."""
    options: Any = {"lr": 0.01, "weight_decay": 0.1}
    method = prepared(mlp(), packed=packed, redraw_every=3)
    first = inside(method)
    run(method, MaskedAdamW(method.model.parameters(), **options), range(5))

    other = prepared(mlp(), packed=packed)
    assert_equal(inside(other), first)
    run(other, MaskedAdamW(other.model.parameters(), **options), range(3))
    model: Any = other.full.extract()
    again = FishMask(model, 0.2, examples=20, packed=packed)
    later = (one for batch in batches() for one in zip(*batch, strict=True))
    again.prepare((x[None], y[None]) for x, y in itertools.islice(later, 20, None))
    run(again, MaskedAdamW(model.parameters(), **options), range(3, 5))
    assert_equal(inside(method), inside(again))
    assert any(not torch.equal(mask, first[name]) for name, mask in inside(method).items())
    assert_equal(plain_weights(method), plain_weights(again))


def test_masks_drawn_anew_keep_the_parameters_that_an_optimizer_holds() -> None:
    method = prepared(mlp(), redraw_every=2)
    optimizer = MaskedSGD(method.model.parameters(), lr=0.1, momentum=0.9)
    before, sizes = list(method.model.parameters()), [p.numel() for p in method.model.parameters()]
    full, pass_of = method.subnets["full"], method.plan(0).passes[0].subnet
    run(method, optimizer, range(7))
    after = list(method.model.parameters())
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert [p.numel() for p in after] != sizes and sum(p.numel() for p in after) == method.budget
    assert method.subnets["full"] is full is pass_of


# Saving and resuming


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("redraw_every", [None, 3])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    redraw_every: int | None, packed: bool
) -> None:
    def made() -> tuple[FishMask, Any]:
        model = mlp()
        method = FishMask(model, 0.2, examples=20, redraw_every=redraw_every, packed=packed)
        return method, model

    def trainer(method: FishMask, model: nn.Module) -> Trainer:
        method.prepare(batches())
        optimizer = MaskedAdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        return Trainer(model, method, optimizer, F.cross_entropy, accumulate=2, clip_grad_norm=0.5)

    method, model = made()
    whole = trainer(method, model)
    stream, saved = batches(seed=1), {}
    for report in whole.steps(stream, until=8):
        if report.step == 4:
            saved = copy.deepcopy({"trainer": whole.state_dict(), "weights": model.state_dict()})
    method, model = made()
    method.load_state_dict(saved["trainer"]["method"])
    model.load_state_dict(saved["weights"])
    resumed = trainer(method, model)
    resumed.load_state_dict(saved["trainer"])
    for _ in resumed.steps(itertools.islice(batches(seed=1), 8, None), until=8):
        pass
    assert_equal(snapshot(model), snapshot(whole.model))
    first, second = whole.state_dict(), resumed.state_dict()
    assert str(first["optimizer"]) == str(second["optimizer"])
    assert first["method"]["draws"] == second["method"]["draws"] == (3 if redraw_every else 1)
    assert_equal(first["method"]["positions"], second["method"]["positions"])


def test_a_state_is_loaded_into_a_model_that_goes_on() -> None:
    """As the best weights of a run are, after masks were drawn anew."""
    method = prepared(mlp(), redraw_every=2)
    optimizer = MaskedSGD(method.model.parameters(), lr=0.1)
    run(method, optimizer, range(1))
    state, weights = copy.deepcopy((method.state_dict(), method.model.state_dict()))
    best = plain_weights(method)
    run(method, optimizer, range(1, 3))
    method.load_state_dict(state)
    method.model.load_state_dict(weights)
    assert_equal(plain_weights(method), best)
    assert_equal(method.state_dict()["positions"], state["positions"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"draws": 1}, r"the state must hold draws and positions, got \['draws'\]"),
        ({"draws": 1, "positions": {"fc.weight": torch.arange(2)}}, r"got \['fc.weight'\]"),
    ],
)
def test_a_state_of_another_model_is_refused(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FishMask(mlp(), 0.2).load_state_dict(state)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "run", tmp_path / "plain.safetensors"
    options = (
        "--model mlp --hidden 16 --method fish --ratio 0.3 --examples 8 --redraw-every 4 "
        "--lr 0.05 --image-size 8 --batch-size 16 --device cpu"
    )
    run_options = ["--out", str(folder), "--max-steps", "6"]
    cli.main(["train", *shlex.split(options), *run_options])
    cli.main(["train", "--resume", str(folder), "--max-steps", "9"])
    cli.main(["eval", str(folder)])
    cli.main(["extract", str(folder), "--subnet", "full", "--out", str(out)])
    assert out.exists() and "fish" in capsys.readouterr().out
    whole = tmp_path / "whole"
    cli.main(["train", *shlex.split(options), "--out", str(whole), "--max-steps", "9"])
    first, second = (Checkpoints(path / "checkpoints").load() for path in (folder, whole))
    assert_equal(first.weights, second.weights)
    first, second = first.state["trainer"], second.state["trainer"]
    assert_equal(first["method"]["positions"], second["method"]["positions"])
    # Drawn at the start, after 4 and after 8 steps.
    assert first["method"]["draws"] == second["method"]["draws"] == 3
    assert str(first["optimizer"]) == str(second["optimizer"])


def test_its_configuration_survives_a_file() -> None:
    config = TrainConfig(method=Config(0.01, head=("output",), redraw_every=5))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert configs()["fish"] is Config
    built = Config(0.3, examples=7, kind="true", packed=False).build(mlp())
    assert (built.ratio, built.examples, built.kind) == (0.3, 7, "true")
    with pytest.raises(ValueError, match="ratio must be"):
        Config(ratio=2.0)


# Other models


@pytest.mark.parametrize("packed", [True, False])
def test_a_text_classifiers_embedding_is_tuned_too(packed: bool) -> None:
    torch.manual_seed(0)
    model = TextClassifier(30, 2, d_model=8, ffn=16, heads=2, encoder_layers=1, dropout=0.0)
    plain = copy.deepcopy(model)
    tokens = torch.randint(4, 30, (8, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 2
    method = FishMask(model, 0.5, examples=8, packed=packed)
    method.prepare([(tokens, labels)])
    assert len(method.state_dict()["positions"]["encoder.embed_tokens.weight"]) > 10
    optimizer = MaskedAdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(10):
        plan = method.plan(step)
        losses += plan.backward(lambda: F.cross_entropy(model(tokens), labels)).values()
        optimizer.step(plan.update)
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    extracted: Any = method.full.extract()
    assert not any("maskedtrain.layers" in type(m).__module__ for m in extracted.modules())
    assert torch.equal(extracted(tokens), model(tokens))
    start = plain.state_dict()
    changed = sum(int((w != start[n]).sum()) for n, w in extracted.state_dict().items())
    assert changed <= method.budget


def test_a_convolutional_network() -> None:
    torch.manual_seed(0)
    model = resnet8(width=4)
    start = snapshot(model)
    x, y = noise(4, 3, 8, 8), torch.arange(4)
    method = FishMask(model, 0.1, examples=4)
    method.prepare([(x, y)])
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(2):
        plan = method.plan(step)
        plan.backward(lambda: F.cross_entropy(model(x), y))
        optimizer.step(plan.update)
        optimizer.zero_grad()
    after = method.full.extract().state_dict()
    trained = [n for n, _ in resnet8(width=4).named_parameters()]
    assert 0 < sum(int((after[n] != start[n]).sum()) for n in trained) <= method.budget
    assert sum(p.numel() for p in model.parameters() if p.ndim == 1) < sum(
        map(Tensor.numel, start.values())
    )


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(Tied(), nn.Linear(5, 3))
    tokens, targets = torch.tensor([[0, 3, 2, 1]]), torch.tensor([[0, 1, 2, 1]])
    method = FishMask(model, 0.7, examples=1)
    method.prepare([(tokens, targets)])
    assert method.budget == round(0.7 * (5 * 4 + 5 * 3 + 3))
    assert list(method.state_dict()["positions"]) == ["0.embedding.weight"]
    assert SubNetwork.full(model).numel() == method.budget


@pytest.mark.parametrize("packed", [True, False])
def test_criteria_of_its_steps_can_be_measured(packed: bool) -> None:
    method = prepared(mlp(), packed=packed)
    optimizer = MaskedSGD(method.model.parameters(), lr=0.1)
    trainer = Trainer(method.model, method, optimizer, F.cross_entropy, measure_every=1)
    (report,) = trainer.steps(batches(), until=1)
    assert report.criteria["full"].whole.quantities()["c_norm"] >= 1

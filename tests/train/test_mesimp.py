"""``MeSimp``: what it counts, what it takes out and when, and that training goes on from there."""

from __future__ import annotations

import copy
import io
import itertools
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain import MaskedLinear, SubNetwork, TopKLinear, Trainer, cli, methods
from maskedtrain.config import TrainConfig, from_dict, to_dict
from maskedtrain.methods import MeProp, Method, Standard
from maskedtrain.methods.mesimp import Config, MeSimp
from maskedtrain.models import MLP, Transformer, resnet8
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.training.console import Console
from maskedtrain.training.run import Run
from tests.train.toolbox import assert_equal, noise, snapshot

BATCH = 16
both = pytest.mark.parametrize("per", ["row", "batch"])


def mlp(hidden: tuple[int, ...] = (40, 20)) -> Any:
    torch.manual_seed(0)
    return MLP(12, hidden, 4)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return noise(BATCH, 12, seed=seed), torch.arange(BATCH) % 4


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    return (batch(step % 5) for step in itertools.count())


def loss_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    x, y = batch(seed)
    return lambda: F.cross_entropy(model(x), y)


def trainer_of(model: nn.Module, method: Method, **options: Any) -> Trainer:
    optimizer = MaskedSGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    return Trainer(model, method, optimizer, F.cross_entropy, **options)


def trained(trainer: Trainer, until: int) -> list[float]:
    stream = itertools.islice(batches(), trainer.step * trainer.accumulate, None)
    return [report.losses["full"].item() for report in trainer.steps(stream, until=until)]


def widths(model: Any) -> list[int]:
    return [layer.out_features for layer in model.hidden]


# Counting


def brute_force(dy_TO: Tensor, k: int, per: str) -> tuple[Tensor, int]:
    """How often each output is kept with a gradient, and in how many selections."""
    size = dy_TO.abs() if per == "row" else dy_TO.abs().double().sum(0)[None]
    counts, selections = torch.zeros(dy_TO.shape[1]).long(), 0
    for row in size:
        first = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))[:k]
        kept = [i for i in first if row[i] != 0]
        counts[kept] += 1
        selections += bool(kept)
    return counts, selections


@both
@pytest.mark.parametrize("k", [3, 20, 40])
def test_counts_are_those_of_brute_force(per: str, k: int) -> None:
    model = mlp()
    method = MeSimp(model, k, per=per, cycle=100)
    seen: dict[str, list[Tensor]] = {"hidden.0": [], "hidden.1": []}
    for i, layer in enumerate(model.hidden):
        layer.register_forward_hook(
            lambda _, __, y, i=i: (
                y.requires_grad and y.register_hook(seen[f"hidden.{i}"].append) and None
            )
        )
    # The last of the neurons and of the examples have no gradient at all.
    with torch.no_grad():
        model.hidden[0].bias[-30:] = -100.0
    for step in range(3):
        x, y = batch(step)
        weights = (torch.arange(BATCH) < 12) / BATCH

        def loss() -> Tensor:
            return (F.cross_entropy(model(x), y, reduction="none") * weights).sum()  # noqa: B023 - called at once

        method.plan(step).backward(loss)
    for width, dys in seen.items():
        whole = [brute_force(dy, k, per) for dy in dys]
        counts, selections = torch.stack([c for c, _ in whole]).sum(0), sum(n for _, n in whole)
        # Rows without any gradient are no selections.
        assert len(dys) == 3 and (30 < selections <= 36 if per == "row" else selections == 3)
        entry = method.state_dict()[width]
        assert torch.equal(entry["counts"], counts) and entry["selections"] == selections
        assert torch.equal(method.activity()[width], counts.double() / selections)
    assert not method.activity()["hidden.0"][-30:].any()


@both
def test_nothing_but_training_counts(per: str) -> None:
    model = mlp()
    method = MeSimp(model, 3, per=per)
    loss_of(model)().backward()
    with torch.no_grad():
        model(batch(0)[0])
    method.subnets["full"].flops(batch(0)[0], training=True)
    assert not any(entry["selections"] for entry in method.state_dict().values())
    assert not any(activity.any() for activity in method.activity().values())
    plain, measured = (
        trainer_of(net, MeSimp(net, 3, per=per, share=0.05, cycle=4), **options)
        for net, options in ((mlp(), {}), (mlp(), {"measure_every": 1, "alpha": "auto"}))
    )
    trained(plain, 6)
    trained(measured, 6)
    assert_equal(snapshot(plain.model), snapshot(measured.model))
    # Trainer's micro-batches each count.
    accumulating = trainer_of(model, method, accumulate=3)
    trained(accumulating, 2)
    expected = 2 * 3 * (BATCH if per == "row" else 1)
    assert all(entry["selections"] == expected for entry in method.state_dict().values())


# Removal


@both
@pytest.mark.parametrize("share", [0.0, 0.06, 0.1, 1.0])
def test_the_rule(per: str, share: float) -> None:
    model = mlp()
    method = MeSimp(model, 4, share=share, cycle=5, per=per)
    trainer = trainer_of(model, method)
    trained(trainer, 4)
    assert widths(model) == [40, 20]
    # As the last step will leave them.
    last: Any = copy.deepcopy(trainer)
    last.method.cycle = 6
    trained(last, 5)
    activity = last.method.activity()
    trained(trainer, 5)
    for width, a in activity.items():
        most = sorted(range(len(a)), key=lambda i: (-float(a[i]), i))[:4]
        expected = [i for i in range(len(a)) if a[i] >= share or i in most]
        assert method.kept[width].tolist() == expected
        assert (len(expected) == len(a)) == (share == 0) and (share < 1 or len(expected) == 4)
        layer, other = model.get_submodule(width), last.model.get_submodule(width)
        assert layer.bias is not other.bias and torch.equal(layer.bias, other.bias[expected])
    assert not any(a.any() for a in method.activity().values())
    x = noise(7, 12, seed=9)
    for width, layer in (("hidden.0", last.model.hidden[1]), ("hidden.1", last.model.output)):
        gone = torch.ones(layer.in_features).bool()
        gone[method.kept[width]] = False
        with torch.no_grad():
            layer.weight[:, gone] = 0
    # The same terms, in sums of other lengths.
    torch.testing.assert_close(model(x), last.model(x), rtol=1e-5, atol=1e-6)


def test_cycles_and_their_end() -> None:
    model = mlp()
    method = MeSimp(model, 4, share=0.06, cycle=3, until=7)
    trainer, found = trainer_of(model, method), []
    for step in range(1, 13):
        trained(trainer, step)
        found.append(widths(model)[0])
    assert found[0] == found[1] == 40 > found[2] == found[3] == found[4] > found[5] >= 4
    assert found[5:] == [found[5]] * 7
    assert len(method.kept["hidden.0"]) == found[-1]


def test_before_the_first_removal_it_is_meprop() -> None:
    model, other = mlp(), mlp()
    first = trainer_of(model, MeSimp(model, 0.1, cycle=10))
    second = trainer_of(other, MeProp(other, 0.1))
    assert trained(first, 9) == trained(second, 9)
    assert_equal(snapshot(model), snapshot(other))


@both
def test_parameters_and_flops_fall(per: str) -> None:
    model = mlp((200, 100))
    method = MeSimp(model, 0.05, share=0.04, cycle=2, per=per)
    full = method.subnets["full"]
    before = full.numel()
    trainer, x = trainer_of(model, method), batch(0)[0]
    trained(trainer, 2)
    a, b = widths(model)
    assert 10 <= a < 200 and 5 <= b < 100
    assert method.subnets["full"] is full
    count = 13 * a + (a + 1) * b + (b + 1) * 4
    assert full.numel() == sum(p.numel() for p in model.parameters()) == count < before
    forward = 2 * BATCH * (12 * a + a * b + b * 4)
    # k stays 10 and 5: dW of the first layer, dx and dW of the others.
    backward = 2 * BATCH * (10 * 12 + 2 * 5 * a + 2 * 4 * b)
    assert full.flops(x) == forward
    assert method.plan(2).flops(x) == forward + backward
    held = [
        optimizer_state["momentum_buffer"] for optimizer_state in trainer.optimizer.state.values()
    ]
    assert [buffer.shape for buffer in held] == [p.shape for p in model.parameters()]


def test_k_is_a_number_from_the_start() -> None:
    model = mlp()
    MeSimp(model, 0.25)
    assert [layer.k for layer in model.hidden] == [10, 5]
    model = mlp()
    method = MeSimp(model, 30, share=0.05)
    assert [layer.k for layer in model.hidden] == [30, 20]
    # The second layer back-propagates all, and loses what never has a gradient... only down to k.
    trained(trainer_of(model, method), 100)
    assert widths(model)[0] >= 30 and widths(model)[1] == 20


def test_layers_that_make_no_width_are_sparse_and_stay() -> None:
    torch.manual_seed(0)
    model = Transformer(20, 20, d_model=8, heads=2, ffn=32, encoder_layers=1, decoder_layers=1)
    method = MeSimp(model, 4, share=0.2, cycle=1)
    assert [*method.kept] == ["encoder.layers.0.fc1", "decoder.layers.0.fc1"]
    attention = model.get_submodule("encoder.layers.0.self_attn.q_proj")
    assert isinstance(attention, TopKLinear)
    tokens = torch.tensor([[4, 5, 6, 2]]), torch.tensor([[1, 7, 8, 2]])
    optimizer = MaskedAdamW(model.parameters())

    def loss_fn(y: Tensor, _: Tensor) -> Tensor:
        return y.logsumexp(-1).mean()

    trainer = Trainer(model, method, optimizer, loss_fn)
    for _ in trainer.steps(itertools.repeat((tokens, torch.zeros(1, 4).long())), until=3):
        pass
    for name, kept in method.kept.items():
        layer = model.get_submodule(name)
        assert layer.out_features == len(kept) < 32
        assert model.get_submodule(name[:-1] + "2").in_features == len(kept)
    assert attention.weight.shape == (8, 8)


def test_the_rows_that_were_kept_alone() -> None:
    model = mlp()
    method = MeSimp(model, 6, share=0.3, cycle=4, per="batch", weight_grad="rows")
    optimizer = MaskedAdamW(model.parameters(), 0.01)
    trainer = Trainer(model, method, optimizer, F.cross_entropy)
    trained(trainer, 12)
    assert widths(model)[0] < 40
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_a_core_that_was_there_follows() -> None:
    model = mlp()
    core = SubNetwork.width(model, 0.5, round_to=1)
    trained(trainer_of(model, MeSimp(model, 3, share=0.1, cycle=5)), 10)
    first, x = widths(model)[0], batch(0)[0]
    with core.activate():
        assert model.hidden[0](x).shape[1] < min(20, first)
        assert torch.isfinite(model(x)).all()


# Going on


def stock_loop(model: nn.Module, method: MeSimp, optimizer: Any, steps: int) -> list[float]:
    losses: list[float] = []
    for step in range(steps):
        plan = method.plan(step)
        found = plan.backward(loss_of(model, step % 5))
        plan = method.after_backward(step, plan)
        if isinstance(optimizer, MaskedSGD):
            optimizer.step(plan.update, lr_scale=plan.lr_scale)
        else:
            optimizer.step()
        method.after_step(step, plan, optimizer)
        optimizer.zero_grad()
        losses.append(found["full"].item())
    return losses


def test_a_stock_loop_is_the_trainer() -> None:
    model, twin = mlp(), mlp()
    options = {"share": 0.1, "cycle": 6}
    trainer = trainer_of(twin, MeSimp(twin, 8, **options))
    optimizer = MaskedSGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    losses = stock_loop(model, MeSimp(model, 8, **options), optimizer, 60)
    assert losses == trained(trainer, 60)
    assert_equal(snapshot(model), snapshot(twin))
    assert widths(model)[0] < 40 and losses[-1] < 0.5 * losses[0]


def test_any_optimizer_of_torch_takes_part() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = stock_loop(model, MeSimp(model, 8, share=0.1, cycle=6), optimizer, 60)
    assert widths(model)[0] < 40 and losses[-1] < 0.5 * losses[0]
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


@both
@pytest.mark.parametrize("stop", [4, 6, 14])
@pytest.mark.parametrize("optimizer", [MaskedSGD, MaskedAdamW])
def test_a_trainer_resumes_bit_for_bit(
    per: str, stop: int, optimizer: Any, assert_identical: Any
) -> None:
    def made() -> Trainer:
        model = mlp()
        method = MeSimp(model, 4, share=0.15, cycle=6, per=per)
        return Trainer(model, method, optimizer(model.parameters(), lr=0.05), F.cross_entropy)

    whole, part, other = made(), made(), made()
    trained(whole, 20)
    assert widths(whole.model)[0] < 40
    trained(part, stop)
    file = io.BytesIO()
    torch.save({"weights": part.model.state_dict(), "trainer": part.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    # The structure comes first.
    other.method.load_state_dict(saved["trainer"]["method"])
    other.model.load_state_dict(saved["weights"])
    other.load_state_dict(saved["trainer"])
    trained(other, 20)
    assert_equal(snapshot(other.model), snapshot(whole.model))
    assert_identical(other.optimizer.state_dict(), whole.optimizer.state_dict())
    assert_identical(other.method.state_dict(), whole.method.state_dict())


def test_an_earlier_structure_comes_back() -> None:
    model = mlp()
    method = MeSimp(model, 4, share=0.06, cycle=5)
    trainer = trainer_of(model, method)
    states, x = [], noise(5, 12)
    for until in (2, 5, 12):
        trained(trainer, until)
        # What a checkpoint has of it.
        states.append((copy.deepcopy(method.state_dict()), snapshot(model), model(x)))
    assert len({state["hidden.0"]["kept"].shape for state, _, _ in states}) == 3
    for state, weights, y in (*states[:-1], *reversed(states)):
        before = model(x)
        larger = len(state["hidden.0"]["kept"]) > widths(model)[0]
        method.load_state_dict(state)
        if larger:
            # New neurons change nothing before their weights are loaded.
            torch.testing.assert_close(model(x), before)
        model.load_state_dict(weights)
        assert torch.equal(model(x), y)
        assert method.state_dict()["hidden.1"]["selections"] == state["hidden.1"]["selections"]


def test_states_of_other_networks_are_refused() -> None:
    small, other = mlp((8, 4)), mlp((40, 20))
    state = MeSimp(other, 2).state_dict()
    method = MeSimp(small, 2)
    with pytest.raises(ValueError, match="Index rows must be < 8, got 39"):
        method.load_state_dict(state)
    with pytest.raises(ValueError, match=r"of the widths \['hidden.0', 'hidden.1'\], got \[\]"):
        method.load_state_dict({})
    assert widths(small) == [8, 4]


def test_what_is_extracted_is_small_and_plain() -> None:
    model = mlp()
    method = MeSimp(model, 4, share=0.15, cycle=5)
    trained(trainer_of(model, method), 10)
    small: Any = method.subnets["full"].extract()
    assert all(type(layer) is nn.Linear for layer in [*small.hidden, small.output])
    assert [layer.out_features for layer in small.hidden] == widths(model)
    assert torch.equal(small(noise(3, 12)), model(noise(3, 12)))


# Options and runs


@pytest.mark.parametrize(
    ("make", "options", "kind", "message"),
    [
        (mlp, {"share": 1.1}, ValueError, r"share must be in \[0, 1\], got 1.1"),
        (mlp, {"share": -0.1}, ValueError, r"share must be in \[0, 1\], got -0.1"),
        (mlp, {"cycle": 0}, ValueError, "cycle must be >= 1, got 0"),
        (mlp, {"until": -1}, ValueError, "until must be >= 0, got -1"),
        (mlp, {"k": 0}, ValueError, "k must be a count"),
        (mlp, {"per": "token"}, ValueError, "per must be"),
        (mlp, {"layers": ["hiden.*"]}, ValueError, "matches no nn.Linear"),
        (mlp, {"layers": ["output"], "exclude": []}, ValueError, "make no width"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {}, TypeError, "no width_masks"),
        (lambda: resnet8(width=4), {}, ValueError, "got fc, which is excluded"),
    ],
)
def test_refusals_change_nothing(
    make: Callable[[], nn.Module], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = make()
    with pytest.raises(kind, match=message):
        MeSimp(model, **options)
    assert not any(isinstance(module, TopKLinear) for module in model.modules())


def test_it_is_found_by_its_name() -> None:
    assert methods.configs()["mesimp"] is Config
    model = mlp()
    method = Config(k=3, share=0.1, cycle=7, until=9, per="batch", layers=("hidden.0",)).build(
        model
    )
    assert (method.share, method.cycle, method.until) == (0.1, 7, 9)
    assert [*method.kept] == ["hidden.0"] and type(model.hidden[1]) is MaskedLinear
    assert (model.hidden[0].k, model.hidden[0].per) == (3, "batch")
    for options in ({"ratio": 0.0}, {"k": 0}, {"share": 2.0}, {"cycle": 0}, {"until": -1}):
        with pytest.raises(ValueError, match="must be"):
            Config(**options)
    written = to_dict(TrainConfig(method=Config(k=3, until=5, exclude=("a",))))
    assert from_dict(json.loads(json.dumps(written))).method == Config(k=3, until=5, exclude=("a",))


OPTIONS = (
    "--dataset digits --model mlp --hidden 40 20 --method mesimp --k 4 --share 0.1 --cycle 5 "
    "--epochs 2 --eval-every 4 --save-every 4 --select best --keep-last 9 --lr 0.05"
)


def test_runs_stop_resume_and_extract(tmp_path: Path, assert_identical: Any) -> None:
    pytest.importorskip("sklearn")
    for name, steps in (("whole", "16"), ("part", "8")):
        options = [*shlex.split(OPTIONS), "--max-steps", steps]
        cli.main(["train", *options, "--out", str(tmp_path / name)])
    cli.main(["train", "--resume", str(tmp_path / "part"), "--max-steps", "16"])
    found = []
    for name in ("whole", "part"):
        run = Run.restore(tmp_path / name, Console(io.StringIO()))
        checkpoint = run.load_weights()
        trainer = checkpoint.state["trainer"]
        found.append([checkpoint.weights, trainer["optimizer"], trainer["method"]])
    assert_identical(found[0], found[1])
    rows = [row_of(tmp_path / name) for name in ("whole", "part")]
    for key in ("accuracy", "params", "forward_flops", "train_flops"):
        assert rows[0][key] == rows[1][key], key
    # The row is of the best weights, with the structure that they had.
    run = Run.restore(tmp_path / "whole", Console(io.StringIO()))
    run.load_best("full")
    assert rows[0]["params"] == sum(p.numel() for p in run.model.parameters())
    assert run.load_weights(4).step == 4 and widths(run.model) == [40, 20]
    run.load_weights(16)
    first, second = widths(run.model)
    assert 4 <= first < 40 and 4 <= second < 20
    cli.main(["eval", str(tmp_path / "whole")])
    weights = tmp_path / "small.safetensors"
    cli.main(["extract", str(tmp_path / "part"), "--subnet", "full", "--out", str(weights)])
    small = safetensors.torch.load_file(weights)
    assert sum(tensor.numel() for tensor in small.values()) == rows[1]["params"]


def row_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())["results"][0]


# How well it trains


@pytest.mark.slow
def test_a_sixth_of_the_parameters_does_as_well_as_all() -> None:
    pytest.importorskip("sklearn")
    from maskedtrain.data import digits
    from maskedtrain.data.images import BatchLoader

    data = digits.load()
    scale = {"mean": data.mean, "std": data.std}

    def result(method_of: Callable[[nn.Module], Method], seed: int) -> tuple[float, int]:
        torch.manual_seed(seed)
        model = MLP(64, (500, 500), 10)
        method = method_of(model)
        optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9)
        trainer = Trainer(model, method, optimizer, F.cross_entropy)
        loader = BatchLoader(data.train, 64, seed=seed, shuffle=True, drop_last=True, **scale)
        for _ in trainer.steps(loader.stream(), until=20 * len(loader)):
            pass
        full = method.subnets["full"]
        return trainer.evaluate(BatchLoader(data.test, 500, **scale), full).accuracy, full.numel()

    dense = [result(lambda model: Standard(SubNetwork.full(model)), seed) for seed in range(2)]
    small = [result(lambda model: MeSimp(model, 0.05), seed) for seed in range(2)]
    assert max(size for _, size in small) < dense[0][1] / 6
    means = [sum(accuracy for accuracy, _ in found) / 2 for found in (dense, small)]
    # Three seeds gave 97.2 and 97.4 %; a third of a point is one image.
    assert means[0] > 0.96 and means[1] >= means[0] - 0.005, means

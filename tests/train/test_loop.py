"""The trainer is the loop one would write by hand, and stops before it spoils anything."""

from __future__ import annotations

import copy
import functools
import io
import random
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler

import partial_kernels as pk
from maskedtrain import MaskedConv2d, MaskedLinear, SubNetwork, Trainer
from maskedtrain.layers import SwitchNorm
from maskedtrain.methods import ATS, Slimmable, Standard
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.training.loop import NonFiniteError, evaluate
from maskedtrain.training.losses import cross_entropy

Batch = tuple[Tensor, Tensor]
Same = Callable[[object, object], None]

SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
ADAMW = {"lr": 1e-2, "weight_decay": 1e-1}


def image_batches(seed: int = 0) -> Iterator[Batch]:
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(8, 3, 6, 6, generator=rng), torch.randint(4, (8,), generator=rng)


def vector_batches(size: int = 8, dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
    rng = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(size, 12, generator=rng, dtype=dtype)
        yield x, torch.randint(4, (size,), generator=rng)


def conv_net(conv: type[nn.Conv2d], norm: type[nn.BatchNorm2d], linear: type[nn.Linear]):
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(),
        conv(8, 8, 3, stride=2), norm(8), nn.ReLU(),
        nn.Flatten(), linear(32, 4),
    )  # fmt: skip


def mlp(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = MaskedLinear(12, 16), nn.ReLU(), nn.Dropout(dropout), MaskedLinear(16, 4)
    return nn.Sequential(*layers)


def networks(model: nn.Module) -> list[SubNetwork]:
    masks = {"0.weight": pk.Prefix(8), "3.weight": pk.Prefix(None, 8)}
    return [SubNetwork.full(model), SubNetwork(model, masks, name="core")]


def schedule(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    rise = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, 45)
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], [5])


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.usefixtures("correct_roots")
def test_standard_training_is_the_stock_loop_bit_for_bit(kind: str, clip: float | None, steps: int):
    stock = conv_net(nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    if kind == "sgd":
        optimizer = torch.optim.SGD(stock.parameters(), **SGD)
    else:
        optimizer = torch.optim.AdamW(stock.parameters(), **ADAMW)
    scheduler = schedule(optimizer)
    expected: list[tuple[float, float, float | None]] = []
    for x, y in islice(image_batches(), steps):
        loss = F.cross_entropy(stock(x), y)
        loss.backward()
        norm = None if clip is None else nn.utils.clip_grad_norm_(stock.parameters(), clip).item()
        expected.append((loss.item(), scheduler.get_last_lr()[0], norm))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    model = conv_net(MaskedConv2d, SwitchNorm, MaskedLinear)
    masked = MaskedSGD(model.parameters(), **SGD) if kind == "sgd" else None
    masked = masked or MaskedAdamW(model.parameters(), **ADAMW)
    trainer = Trainer(
        model,
        Standard(SubNetwork.full(model)),
        masked,
        F.cross_entropy,
        scheduler=schedule(masked),
        clip_grad_norm=clip,
    )
    reports = list(trainer.steps(image_batches(), until=steps))

    norms = [None if r.grad_norm is None else r.grad_norm.item() for r in reports]
    losses = [r.losses["full"].item() for r in reports]
    assert list(zip(losses, [r.lr for r in reports], norms, strict=True)) == expected
    assert [r.step for r in reports] == list(range(1, steps + 1))
    trained, state = stock.state_dict(), model.state_dict()
    assert list(state) == list(trained)
    for name, tensor in state.items():
        assert torch.equal(tensor, trained[name]), name
    if clip is not None:
        # A bound that never bites would prove nothing.
        assert max(norm for norm in norms if norm is not None) > clip


@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulated_half_batches_are_one_whole_batch(clip: float | None):
    results = []
    for accumulate in (1, 2):
        model = mlp().double()
        optimizer = MaskedSGD(model.parameters(), **SGD)
        method = ATS(networks(model))
        trainer = Trainer(
            model, method, optimizer, F.cross_entropy, accumulate=accumulate, clip_grad_norm=clip
        )
        whole = vector_batches(size=8, dtype=torch.float64)
        halves = ((x[i : i + 4], y[i : i + 4]) for x, y in whole for i in (0, 4))
        stream = vector_batches(size=8, dtype=torch.float64) if accumulate == 1 else halves
        losses = [sum(r.losses.values()) for r in trainer.steps(stream, until=10)]
        results.append([torch.stack(losses), *model.parameters()])
    for whole, halved in zip(*results, strict=True):
        # fp64 sums in another order, over ten steps.
        assert torch.allclose(whole, halved, rtol=1e-11, atol=1e-13)


class TwoInputs(nn.Module):
    """Logits of each position of a padded sequence, from two tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = MaskedLinear(4, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.linear(first + second)


def padded_batches() -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Two batches, of 3 and 8 targets that count."""
    rng = torch.Generator().manual_seed(0)
    batches = []
    for lengths in ([1, 2], [3, 5]):
        inputs = torch.randn(2, 2, max(lengths), 4, generator=rng, dtype=torch.float64)
        targets = torch.randint(3, (2, max(lengths)), generator=rng)
        for row, length in zip(targets, lengths, strict=True):
            row[length:] = -100
        batches.append((tuple(inputs), targets))
    return batches


def test_accumulated_batches_count_by_their_targets():
    model = TwoInputs().double()
    expected = TwoInputs().double()
    optimizer = MaskedSGD(model.parameters(), lr=1.0)
    method = Standard(SubNetwork.full(model))
    trainer = Trainer(model, method, optimizer, cross_entropy, accumulate=2)
    batches = padded_batches()
    report = trainer.train_step(iter(batches))

    outputs = torch.cat([expected(*inputs).flatten(0, 1) for inputs, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    loss = F.cross_entropy(outputs, targets)
    loss.backward()
    assert report.losses["full"].item() == pytest.approx(loss.item(), rel=1e-12)
    for trained, parameter in zip(model.parameters(), expected.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(trained, parameter - parameter.grad, rtol=1e-12, atol=1e-14)


def test_evaluation_leaves_out_what_does_not_count():
    model = TwoInputs().double()
    batches = padded_batches()
    found = evaluate(model, SubNetwork.full(model), batches, cross_entropy)
    outputs = torch.cat([model(*inputs).flatten(0, 1) for inputs, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    counted = targets != -100
    assert found.count == 11
    assert found.accuracy == (outputs.argmax(-1) == targets)[counted].double().mean().item()
    assert found.loss == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-12)


def test_passes_in_bf16_leave_fp32_parameters():
    model = mlp()
    seen = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return F.cross_entropy(outputs, targets)

    optimizer = MaskedSGD(model.parameters(), **SGD)
    method = Slimmable(networks(model))
    trainer = Trainer(model, method, optimizer, loss_fn, autocast=torch.bfloat16)
    batch = next(vector_batches())
    reports = list(trainer.steps(iter([batch] * 20), until=20))
    trainer.evaluate([batch], method.subnets["core"])
    assert set(seen) == {torch.bfloat16}
    for name in ("full", "core"):
        losses = torch.stack([report.losses[name] for report in reports])
        assert losses.isfinite().all()
        assert losses[-1] < 0.5 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {s["momentum_buffer"].dtype for s in optimizer.state.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_training_makes_the_same_steps(monkeypatch: pytest.MonkeyPatch):
    # Without inductor, whose C++ compiler takes many seconds.
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    losses = []
    for compiled in (False, True):
        model = mlp()
        optimizer = MaskedSGD(model.parameters(), **SGD)
        method = ATS(networks(model))
        trainer = Trainer(model, method, optimizer, F.cross_entropy, compile=compiled)
        reports = trainer.steps(vector_batches(), until=8)
        losses.append(torch.stack([sum(report.losses.values()) for report in reports]))
    # Fused or not, a handful of fp32 roundings.
    assert torch.allclose(*losses, rtol=1e-5, atol=0)
    # One graph for each network, not one for each step.
    assert backend.frame_count == 2


def test_evaluation_leaves_everything_alone(assert_identical: Same):
    model = conv_net(MaskedConv2d, SwitchNorm, MaskedLinear)
    model.append(nn.Dropout(0.5))
    masks = {"7.weight": pk.Element(torch.rand(4, 32) < 0.5)}
    subnet = SubNetwork(model, masks, name="part")
    stream = image_batches()
    batches = [next(stream), next(stream)]
    # Batches of different sizes, so that a mean of means would be wrong.
    x, y = next(stream)
    batches.append((x[:3], y[:3]))
    model.train()
    model[1].eval()
    F.cross_entropy(model(x), y).backward()
    modes = [module.training for module in model.modules()]
    gradients = [p.grad for p in model.parameters()]
    before = copy.deepcopy([model.state_dict(), torch.get_rng_state(), gradients])

    found = evaluate(model, subnet, batches, F.cross_entropy)

    assert [module.training for module in model.modules()] == modes
    assert_identical([model.state_dict(), torch.get_rng_state(), gradients], before)
    small = subnet.extract().eval()
    inputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    with torch.no_grad():
        outputs = small(inputs)
    assert found.count == 19
    assert found.accuracy == pytest.approx((outputs.argmax(1) == targets).double().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-5)


def test_evaluation_counts_every_target_of_a_sequence():
    model = mlp()
    inputs, targets = torch.randn(2, 5, 12), torch.randint(4, (2, 5))
    # Sequences of different lengths: as many of them, but not as many targets.
    batches = [(inputs, targets), (inputs[:, :3], targets[:, :3])]

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    found = evaluate(model, SubNetwork.full(model), batches, loss_fn)
    x, y = (torch.cat([t.flatten(0, 1) for t in ts]) for ts in zip(*batches, strict=True))
    outputs = model(x)
    assert found.count == 16
    assert found.accuracy == (outputs.argmax(-1) == y).double().mean().item()
    assert found.loss == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-5)


def test_evaluation_on_nothing_is_an_error():
    model = mlp()
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate(model, SubNetwork.full(model), [], F.cross_entropy)


def broken_at(step: int, value: float) -> Iterator[Batch]:
    """Batches of which the one of ``step`` (the first is 1) makes the loss NaN or infinite."""
    for number, (x, y) in enumerate(vector_batches(), start=1):
        yield (x * value, y) if number == step else (x, y)


@pytest.mark.parametrize(("step", "name"), [(3, "full"), (4, "core")])
def test_a_nan_loss_stops_before_the_update(step: int, name: str, assert_identical: Same):
    model = mlp()
    optimizer = MaskedAdamW(model.parameters(), **ADAMW)
    trainer = Trainer(
        model, ATS(networks(model)), optimizer, F.cross_entropy, scheduler=schedule(optimizer)
    )
    batches = broken_at(step, float("nan"))
    for _ in range(step - 1):
        trainer.train_step(batches)
    before = copy.deepcopy([model.state_dict(), trainer.state_dict()])
    with pytest.raises(NonFiniteError, match=rf"the loss of {name} is nan at step {step}\b"):
        trainer.train_step(batches)
    assert_identical([model.state_dict(), trainer.state_dict()], before)
    # What came of it does not reach the next step either.
    assert all(p.grad is None for p in model.parameters())


def test_rarer_checks_still_find_a_nan_loss():
    model = mlp()
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    method = Standard(SubNetwork.full(model))
    trainer = Trainer(model, method, optimizer, F.cross_entropy, check_every=4)
    batches = broken_at(2, float("nan"))
    trainer.train_step(batches)
    trainer.train_step(batches)
    with pytest.raises(NonFiniteError, match="the loss of full is nan at step 2"):
        trainer.check()
    trainer.train_step(batches)
    trainer.train_step(batches)
    # Steps 1, 5, 9 ... are checked, and what is once NaN stays so.
    with pytest.raises(NonFiniteError, match="the loss of full is nan at step 5"):
        trainer.train_step(batches)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_check_finds_any_weight_that_is_not_finite(value: float):
    model = mlp()
    method = Standard(SubNetwork.full(model))
    trainer = Trainer(model, method, MaskedSGD(model.parameters(), lr=0.1), F.cross_entropy)
    trainer.check()
    with torch.no_grad():
        model.get_parameter("3.bias")[2] = value
    with pytest.raises(NonFiniteError, match=r"3\.bias is not finite after step 0"):
        trainer.check()


def test_a_check_finds_weights_that_a_finite_loss_has_spoilt():
    model = mlp()
    trainer = Trainer(
        model,
        Standard(SubNetwork.full(model)),
        MaskedSGD(model.parameters(), lr=0.1),
        # At 0 the square root is finite and its gradient is not.
        lambda outputs, targets: (outputs - outputs.detach()).square().sum().sqrt(),
    )
    trainer.train_step(vector_batches())
    with pytest.raises(NonFiniteError, match=r"0\.weight is not finite after step 1"):
        trainer.check()


def test_reports_name_the_step_size_of_the_update():
    model = mlp()
    method = ATS(networks(model), lr_scales={"core": 0.25})
    optimizer = MaskedSGD(model.parameters(), lr=0.4)
    halving = lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    trainer = Trainer(model, method, optimizer, F.cross_entropy, scheduler=halving)
    reports = list(trainer.steps(vector_batches(), until=4))
    assert [r.lr for r in reports] == [0.4, 0.1, 0.2, 0.05]
    assert [list(r.losses) for r in reports] == [["full"], ["core"]] * 2
    assert trainer.passes == {"full": 2, "core": 2}


def test_batches_that_run_out_are_an_error():
    model = mlp()
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    method = Standard(SubNetwork.full(model))
    trainer = Trainer(model, method, optimizer, F.cross_entropy, accumulate=2)
    three = [next(vector_batches())] * 3
    with pytest.raises(ValueError, match="the batches ended after 1 steps"):
        list(trainer.steps(three, until=2))
    assert trainer.step == 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("option", ["accumulate", "check_every"])
def test_counts_must_be_positive(option: str):
    model = mlp()
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    method = Standard(SubNetwork.full(model))
    with pytest.raises(ValueError, match=f"{option}.* must be >= 1, got .*0"):
        Trainer(model, method, optimizer, F.cross_entropy, **{option: 0})


@pytest.mark.parametrize("cut", [1, 4])
def test_a_new_trainer_goes_on_from_the_state_of_another(cut: int, assert_identical: Same):
    def make() -> tuple[nn.Module, Trainer]:
        model = mlp(dropout=0.5)
        optimizer = MaskedAdamW(model.parameters(), **ADAMW)
        method = ATS(networks(model))
        scheduler = schedule(optimizer)
        return model, Trainer(model, method, optimizer, F.cross_entropy, scheduler=scheduler)

    batches = list(islice(vector_batches(), 9))
    saved, draws = io.BytesIO(), []
    model, trainer = make()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what is saved
    for report in trainer.steps(batches, until=9):
        if report.step == cut:
            torch.save([model.state_dict(), trainer.state_dict()], saved)
        if report.step > cut:
            draws.append((random.random(), np.random.rand()))  # noqa: NPY002
    after = [model.state_dict(), trainer.state_dict()]

    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    model, trainer = make()
    model.load_state_dict(weights)
    trainer.load_state_dict(state)
    steps = trainer.steps(batches[cut:], until=9)
    assert [(random.random(), np.random.rand()) for _ in steps] == draws  # noqa: NPY002
    assert_identical([model.state_dict(), trainer.state_dict()], after)

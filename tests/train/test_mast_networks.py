"""``MAST`` of networks: sketches of elements and of neurons, and steps against autograd at
``v + S (x - v)``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskedtrain import Trainer
from maskedtrain.methods.mast import MAST, BernoulliSketch, NetworkSketch, RandKSketch
from maskedtrain.models import MLP, resnet8
from maskedtrain.optim import MaskedSGD
from tests.train.mast_toolbox import (
    REDUCED,
    SKETCHES,
    batch,
    bits,
    diagonals,
    loss_of,
    mlp,
    moved,
    zeros,
)
from tests.train.toolbox import TOKENS, Tied, assert_equal, gradients, noise, snapshot


def exact_gradient(
    method: MAST, step: int, v: dict[str, Tensor], value: Callable[[dict[str, Tensor]], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """f(v + S (x - v)) and its gradient, by autograd."""
    S = diagonals(method, step)
    leaves = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in method.model.named_parameters()
    }
    found = value({name: v[name] + S[name] * (x - v[name]) for name, x in leaves.items()})
    grads = torch.autograd.grad(found, list(leaves.values()))
    return found.detach(), dict(zip(leaves, grads, strict=True))


# Sketches


@pytest.mark.parametrize(
    "sketch", [BernoulliSketch(0.6, unit="neuron"), RandKSketch(1, unit="neuron")]
)
def test_the_mean_of_a_neuron_sketch_is_the_identity(sketch: NetworkSketch) -> None:
    """Over all draws of the 2 and 3 hidden neurons of a network, exactly; and what S is."""
    model = MLP(2, (2, 3), 2)
    method = MAST(model, sketch)
    bernoulli = isinstance(sketch, BernoulliSketch)
    seen: dict[tuple[bool, ...], dict[str, Tensor]] = {}
    for step in range(2000):
        S = diagonals(method, step)
        neurons = torch.cat([S["hidden.0.bias"], S["hidden.1.bias"]]) != 0
        seen.setdefault(tuple(neurons.tolist()), S)
        if len(seen) == (2**5 if bernoulli else 2 * 3):
            break
    else:
        raise AssertionError(f"{len(seen)} draws only")
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for kept, S in seen.items():
        chance = 0.6 ** sum(kept) * 0.4 ** (5 - sum(kept)) if bernoulli else 1 / 6
        for name, values in S.items():
            mean[name] += chance * values.detach()
    for values in mean.values():
        torch.testing.assert_close(values, torch.ones_like(values))
    first, second = (0.6, 0.6) if bernoulli else (1 / 2, 1 / 3)
    scales = {"hidden.0.weight": first, "hidden.0.bias": first, "hidden.1.weight": first * second}
    scales |= {"hidden.1.bias": second, "output.weight": second, "output.bias": 1.0}
    for name, chance in scales.items():
        for S in seen.values():
            a, b = S["hidden.0.bias"] != 0, S["hidden.1.bias"] != 0
            inside = {"hidden.1.weight": b[:, None] & a, "output.weight": b.expand(2, 3)}
            kept = inside.get(name, {"hidden.0": a[:, None], "hidden.1": b}.get(name[:8]))
            if name == "hidden.0.bias":
                kept = a
            expected = torch.as_tensor(1.0 if kept is None else kept) / chance
            torch.testing.assert_close(S[name], expected.float().expand_as(S[name]))


def test_elements_are_kept_as_asked() -> None:
    model = mlp()
    total = sum(p.numel() for p in model.parameters())
    k = MAST(model, RandKSketch(10))
    for step in range(5):
        flat = torch.cat([S.flatten() for S in diagonals(k, step).values()])
        assert flat.unique().tolist() == pytest.approx([0, total / 10])
        assert flat.count_nonzero() == 10
    some = MAST(model, BernoulliSketch(0.25, only=["*.weight"]))
    S = diagonals(some, 0)
    assert all((values == 1).all() for name, values in S.items() if name.endswith("bias"))
    weights = torch.cat([S[name].flatten() for name in S if name.endswith("weight")])
    assert set(weights.tolist()) == {0.0, 4.0}
    # Within four standard deviations.
    share, n = float((weights != 0).float().mean()), weights.numel()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
    assert all(
        parameter in some.draw(1).scales
        for n, parameter in model.named_parameters()
        if n.endswith("weight")
    )
    other = MAST(mlp(), BernoulliSketch(0.5, unit="neuron", only=["hidden.1"]))
    assert (diagonals(other, 0)["hidden.0.weight"] == 1).all()


def test_draws_are_of_the_seed_and_the_step_alone() -> None:
    first, second = MAST(mlp(), BernoulliSketch(0.5)), MAST(mlp(), BernoulliSketch(0.5))
    torch.manual_seed(5)
    late = diagonals(second, 9)
    assert_equal(diagonals(first, 9), late)
    other = MAST(mlp(), BernoulliSketch(0.5), seed=1)
    for S in (diagonals(first, 8), diagonals(other, 9)):
        assert any(not torch.equal(S[name], late[name]) for name in S)


# A step


@pytest.mark.parametrize("shift", ["zero", "zeros", "pretrained"])
@pytest.mark.parametrize("name", SKETCHES)
def test_the_gradient_is_autograds(name: str, shift: str) -> None:
    model = mlp().double()
    method = MAST(model, SKETCHES[name], shift=zeros(model) if shift == "zeros" else shift)  # pyright: ignore[reportArgumentType]
    v = {n: p.detach().clone() for n, p in model.named_parameters()}
    v = v if shift == "pretrained" else zeros(model)
    moved(model)
    x, y = batch()
    for step in range(4):
        value, expected = exact_gradient(
            method,
            step,
            v,
            lambda at: F.cross_entropy(torch.func.functional_call(model, at, (x.double(),)), y),
        )
        plan = method.plan(step)
        losses = plan.backward(lambda: F.cross_entropy(model(x.double()), y))
        assert list(losses) == ["mast"]
        torch.testing.assert_close(losses["mast"], value)
        found = gradients(model)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found.get(parameter, torch.zeros_like(gradient)), gradient)
            outside = diagonals(method, step)[parameter] == 0
            assert not gradient[outside].any()
            mask = plan.update.mask_of(model.get_parameter(parameter))
            assert mask is not None and torch.equal(mask.dense(gradient.shape), ~outside)
        assert sum(int(gradient.count_nonzero()) for gradient in found.values()) > 8
        model.zero_grad()


def test_convolutions_and_norms_are_scaled_as_their_weights_would_be() -> None:
    torch.manual_seed(0)
    model = resnet8(width=4, num_classes=3).double()
    method, whole = (
        MAST(model, RandKSketch(0.5, unit="neuron"), shift=v) for v in ("zero", zeros(model))
    )
    x, y = noise(4, 3, 8, 8).double(), torch.arange(4) % 3
    moved(model)
    before, found = snapshot(model), []
    for one in (method, whole):
        model.load_state_dict(before)
        losses = one.plan(3).backward(lambda: F.cross_entropy(model(x), y))
        found.append({**gradients(model), "loss": losses["mast"]})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, values in found[1].items():
        torch.testing.assert_close(found[0][name], values)
    assert method.plan(3).flops(x) < 0.4 * whole.plan(3).flops(x)


def test_a_draw_that_keeps_nothing_of_a_width() -> None:
    model = MLP(3, (1, 4), 2)
    method = MAST(model, BernoulliSketch(0.5, unit="neuron"))
    step = next(t for t in range(50) if not diagonals(method, t)["hidden.0.bias"].any())
    x, y = noise(4, 3), torch.arange(4) % 2
    value, expected = exact_gradient(
        method,
        step,
        zeros(model),
        lambda at: F.cross_entropy(torch.func.functional_call(model, at, (x,)), y),
    )
    losses = method.plan(step).backward(lambda: F.cross_entropy(model(x), y))
    torch.testing.assert_close(losses["mast"], value)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_tied_and_frozen_parameters() -> None:
    tied = Tied()
    method = MAST(tied, BernoulliSketch(0.5))
    S = method.draw(0).diagonal(tied.embedding.weight)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(tied.output.weight.detach().clone())
        return tied(TOKENS).logsumexp(-1).sum()

    before = tied.embedding.weight.detach().clone()
    method.plan(0).backward(loss)
    assert torch.equal(seen[0], before * S)
    assert tied.embedding.weight.grad is not None
    assert not tied.embedding.weight.grad[S == 0].any()
    frozen = mlp()
    frozen.hidden[0].weight.requires_grad = False
    method = MAST(frozen, BernoulliSketch(0.5))
    method.plan(0).backward(loss_of(frozen))
    # It is no less a part of the network that is sparsified.
    assert not (diagonals(method, 0)["hidden.0.weight"] == 1).all()
    assert frozen.hidden[0].weight.grad is None


@pytest.mark.parametrize("algorithm", REDUCED)
@pytest.mark.parametrize("shift", ["zero", "pretrained"])
@pytest.mark.parametrize("name", SKETCHES)
def test_parameters_come_back_bit_for_bit(name: str, shift: Any, algorithm: Any) -> None:
    model = mlp()
    with torch.no_grad():
        model.hidden[0].weight[0, :2] = torch.tensor([-0.0, 1e-42])
    method = MAST(model, SKETCHES[name], shift=shift, algorithm=algorithm, **REDUCED[algorithm])
    kinds = [type(module) for module in model.modules()]
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    for step in range(3):
        before, plan = bits(model), method.plan(step)
        plan.backward(*repeat(loss_of(model), plan.batches))
        assert_equal(bits(model), before)
        method.after_backward(step, plan)
        optimizer.step(plan.update)

    def failing() -> Tensor:
        raise RuntimeError("out of memory")

    before, plan = bits(model), method.plan(3)
    with pytest.raises(RuntimeError, match="out of memory"):
        plan.backward(*repeat(failing, plan.batches))
    assert_equal(bits(model), before)
    assert [type(module) for module in model.modules()] == kinds
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shift", ["zero", "pretrained"])
@pytest.mark.parametrize("name", SKETCHES)
def test_what_every_sketch_drops_is_left_alone(name: str, shift: Any, workers: int) -> None:
    """Bit for bit, momentum and decay included."""
    model = mlp()
    method = MAST(model, [SKETCHES[name]] * workers, shift=shift)
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    dropped = trained = 0
    for step in range(6):
        before, plan = bits(model), method.plan(step)
        plan.backward(*(loss_of(model, 10 * step + i) for i in range(plan.batches)))
        optimizer.step(method.after_backward(step, plan).update)
        optimizer.zero_grad()
        draws = [method.draw(step, worker) for worker in range(workers)]
        for n, parameter in model.named_parameters():
            inside = torch.stack([draw.diagonal(parameter) for draw in draws]).any(0)
            changed = bits(model)[n] != before[n]
            assert not changed[~inside].any()
            dropped += int((~inside).sum())
            trained += int(changed.sum())
    assert dropped and trained > 20


def test_measuring_and_alpha_leave_the_steps_as_they_are() -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        model = mlp()
        method = MAST(model, BernoulliSketch(0.9), algorithm="l-svrdsg", **REDUCED["l-svrdsg"])
        trainer = Trainer(
            model, method, MaskedSGD(model.parameters(), lr=0.1), F.cross_entropy, **options
        )
        reports = list(trainer.steps((batch(i) for i in range(99)), until=6))
        if options:
            assert all(0 < report.criteria["mast"].whole.alpha <= 1 for report in reports)
            assert all(report.criteria["mast"].whole.displacement_sq > 0 for report in reports)
        return snapshot(model)

    assert_equal(run(), run(measure_every=1))

"""Criteria of partial SGD: the papers' identities and bounds, and what measuring leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import SubNetwork, Trainer
from maskedtrain.layers import MaskedLinear
from maskedtrain.methods import ATS, Extragradient, Slimmable
from maskedtrain.methods.base import Method, Pass, Plan
from maskedtrain.models import resnet8
from maskedtrain.optim import MaskedSGD
from maskedtrain.theory.criteria import (
    Criteria,
    Loss,
    Measured,
    criteria,
    measure,
    measure_plan,
    measure_step,
)

SEEDS = st.integers(0, 2**31)


def of(p: Tensor, g: Tensor, other: Tensor, moved: float = 0.0) -> Criteria:
    (found,) = criteria([g], [other], [pk.Element(p)], [moved])
    return found


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_nothing_is_lost_without_mask_and_perturbation() -> None:
    g = random(0, 7)
    (found,) = criteria([g], [g], [pk.Full()])
    quantities = found.alpha, found.c_norm, found.c_sim, found.c_align, found.q
    assert quantities == pytest.approx([1.0] * 5, rel=1e-15)
    assert found.drift == 0 and found.assumption3(1e9)


@given(SEEDS)
def test_q_is_the_gradient_over_the_step(seed: int) -> None:
    """``q = |g| / (alpha |p g~|)``, wherever the gradients do not point apart."""
    g, other = random(seed, 6), random(seed + 1, 6)
    found = of(random(seed + 2, 6) > -0.5, g, other)
    if found.inner > 1e-9:
        expected = math.sqrt(found.sq) / (found.alpha * math.sqrt(found.other_masked_sq))
        assert found.q == pytest.approx(expected, rel=1e-9)


@given(SEEDS, st.floats(0.01, 0.999))
def test_lemma_2_on_quadratics(seed: int, share: float) -> None:
    """``|dx| < |p g~| / (2 L)`` holds both criteria; ``|dx| < max(...) / (2 L)`` one of them."""
    root, x = random(seed, 5, 5), random(seed + 1, 5)
    matrix = root @ root.T
    smoothness = float(torch.linalg.eigvalsh(matrix)[-1])
    p = random(seed + 2, 5) > -0.7
    direction = random(seed + 3, 5)
    direction /= direction.norm()

    def at(length: float) -> Criteria:
        return of(p, matrix @ x, matrix @ (x + length * direction), length**2)

    # Lengths for which the strict assumption holds; the longest of them may be none.
    for length in torch.logspace(-3, 1, 30, dtype=torch.float64).tolist():
        found = at(share * length)
        strict = share * length < math.sqrt(found.other_masked_sq) / (2 * smoothness)
        assert not strict or found.c_align <= math.sqrt(10) + 1e-9
        assert not strict or found.c_sim <= math.sqrt(10) / 2 + 1e-9
        assert not found.assumption3(smoothness) or found.c_sim <= 2 + 1e-9
        assert strict <= found.assumption3(smoothness)


@given(SEEDS, st.integers(1, 12))
def test_the_largest_elements_lose_least(seed: int, k: int) -> None:
    g = random(seed, 12)
    (index,) = (pk.topk_select(g[None], k)[0],)
    (found,) = criteria([g], [g], [pk.Packed(index)])
    assert 1 - 1e-12 <= found.c_norm <= math.sqrt(12 / k) + 1e-12
    # Equal magnitudes lose most.
    (worst,) = criteria([torch.ones(12)], [torch.ones(12)], [pk.Packed(index)])
    assert worst.c_norm == pytest.approx(math.sqrt(12 / k))


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_dropout_loses_at_least_what_it_drops(keep: float) -> None:
    """``E[c_norm^2] >= 1 / mu``, exactly over all masks but the empty one, which loses all."""
    g = random(0, 8)
    total, chance = 0.0, 0.0
    for kept in product([False, True], repeat=8):
        if any(kept):
            weight = keep ** sum(kept) * (1 - keep) ** (8 - sum(kept))
            total += weight * of(torch.tensor(kept), g, g).c_norm ** 2
            chance += weight
    assert total / chance >= chance / keep


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Criteria(0, 0, 0, 0), (1.0, 1.0, 1.0, 1.0)),
        (Criteria(0, 0, 0, 4), (1.0, math.inf, 1.0, 1.0)),
        (Criteria(4, 4, -1, 4), (0.0, 1.0, 1.0, math.inf)),
        (Criteria(4, 1, 3, 16), (1.0, 2.0, 2.0, 2 / 3)),
    ],
)
def test_extremes(given: Criteria, expected: tuple[float, ...]) -> None:
    found = given.alpha, given.c_norm, given.c_sim, given.c_align
    assert found == pytest.approx(expected)


def test_lists_must_fit() -> None:
    with pytest.raises(ValueError, match="one entry per gradient, 1, got 2"):
        criteria([torch.ones(2)], [torch.ones(2)], [pk.Full()], [0.0, 0.0])


# Of a model.


class Model(nn.Module):
    """Two layers with dropout and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = MaskedLinear(5, 8), MaskedLinear(8, 3)
        self.norm, self.dropout = nn.BatchNorm1d(5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.first(self.norm(x)).tanh()))


def made() -> tuple[Model, SubNetwork, Callable[[], Tensor]]:
    model = Model().double()
    masks = {"first.weight": pk.Prefix(4), "second.weight": pk.Prefix(None, 4)}
    x, y = random(1, 16, 5), random(2, 16, 3)
    return model, SubNetwork(model, masks, name="core"), lambda: (model(x) - y).square().mean()


def test_the_whole_network_is_measured_as_itself() -> None:
    """Dropout draws the same for both gradients."""
    model, _, loss = made()
    found = measure(model, Pass(SubNetwork.full(model)), loss)
    assert found.whole.q == pytest.approx(1.0, rel=1e-12)
    assert found.whole.drift == 0


def expected_of(model: Model, core: SubNetwork, loss: Callable[[], Tensor]) -> Criteria:
    def gradients(subnet: SubNetwork) -> dict[str, Tensor]:
        model.zero_grad()
        with subnet.activate():
            loss().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.dropout.p = 0.0
    g, other = gradients(SubNetwork.full(model)), gradients(core)
    model.zero_grad()
    total = Criteria(0, 0, 0, 0)
    for name, parameter in model.named_parameters():
        mask = core.mask_of(parameter)
        inside = mask.dense(parameter.shape) if mask is not None else torch.zeros(()).bool()
        pg, ph = g[name] * inside, other[name] * inside
        outside = (parameter.detach() * ~inside).square().sum()
        sums = ((pg * pg), (ph * ph), (pg * ph), g[name] ** 2)
        total += Criteria(*(float(s.sum()) for s in sums), float(outside))
    return total


def close(a: Criteria, b: Criteria) -> bool:
    return vars(a) == pytest.approx(vars(b), rel=1e-9)


def test_a_core_is_measured_against_the_whole() -> None:
    model, core, loss = made()
    expected = expected_of(model, core, loss)
    found = measure(model, Pass(core), loss)
    assert close(found.whole, expected)
    assert set(found.by_parameter) == {name for name, _ in model.named_parameters()}
    total = sum(found.by_parameter.values(), start=Criteria(0, 0, 0, 0))
    assert close(total, expected)
    # The update may be another than the network that ran.
    everything = measure(model, Pass(core), loss, update=SubNetwork.full(model))
    assert everything.whole.c_norm == pytest.approx(1.0)
    assert everything.whole.masked_sq > found.whole.masked_sq


def test_a_perturbation_moves_the_point() -> None:
    model, core, loss = made()
    model.dropout.p = 0.0

    @contextmanager
    def perturbed() -> Iterator[None]:
        with torch.no_grad():
            before = model.first.weight.clone()
            model.first.weight += 0.5
        yield
        with torch.no_grad():
            model.first.weight.copy_(before)

    full = SubNetwork.full(model)
    moved = measure(model, Pass(full, perturbed=perturbed), loss)
    assert moved.whole.displacement_sq == pytest.approx(0.25 * 40)
    assert moved.whole.c_align > 1
    both = measure(model, Pass(core, perturbed=perturbed), loss).whole.displacement_sq
    outside = measure(model, Pass(core), loss).by_parameter
    others = sum(c.displacement_sq for name, c in outside.items() if name != "first.weight")
    expected = 0.25 * 20 + float(model.first.weight.detach()[4:].square().sum()) + others
    assert both == pytest.approx(expected)


def test_measuring_changes_nothing() -> None:
    model, core, loss = made()
    loss().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: grad.clone() for name, grad in grads.items() if grad is not None}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = torch.get_rng_state()
    first, second = (measure(model, Pass(core), loss) for _ in range(2))
    assert first == second
    assert isinstance(first, Measured)
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        assert torch.equal(parameter.grad, copies[name])


def test_an_error_leaves_everything_as_it_was() -> None:
    model, core, loss = made()
    loss().backward()
    grads = [p.grad for p in model.parameters()]
    statistics = model.state_dict()["norm.running_mean"].clone()
    calls: list[int] = []

    def fails() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more")
        return loss()

    with pytest.raises(RuntimeError, match="no more"):
        measure(model, Pass(core), fails)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(model.state_dict()["norm.running_mean"], statistics)


def test_norms_of_its_own_do_not_count_as_moved() -> None:
    model = resnet8(width=16)
    core = SubNetwork.width(model, 0.5)
    images = torch.randn(4, 3, 8, 8)
    found = measure(model, Pass(core), lambda: model(images).square().sum())
    own = [name for name in found.by_parameter if "branches.core" in name or ".core." in name]
    assert own
    assert all(found.by_parameter[name].displacement_sq == 0 for name in own)
    assert found.whole.displacement_sq > 0


def test_layers_add_up_the_parameters_of_their_own() -> None:
    model, core, loss = made()
    found = measure(model, Pass(core), loss)
    layers = found.by_layer()
    assert list(layers) == ["first", "second", "norm"]
    bias, weight = (found.by_parameter[f"first.{name}"] for name in ("bias", "weight"))
    assert close(layers["first"], bias + weight)
    assert close(sum(layers.values(), start=Criteria(0, 0, 0, 0)), found.whole)
    # What a module holds itself has no name but its own.
    assert list(Measured(bias, {"scale": bias}).by_layer()) == [""]


# On several batches.

SIZES = (3, 5, 8)


def full_data(model: Model) -> tuple[Loss, Loss]:
    """The mean loss over the same 16 examples: of one batch, and of several of different sizes."""
    x, y = random(1, 16, 5), random(2, 16, 3)

    def of_batch(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        return lambda: (model(x) - y).square().mean()

    parts = zip(x.split(SIZES), y.split(SIZES), strict=True)
    return of_batch(x, y), [(of_batch(*part), len(part[0])) for part in parts]


def independent_of_batches() -> tuple[Model, SubNetwork]:
    """A model whose examples do not know of each other."""
    model, core, _ = made()
    model.dropout.p = 0.0
    model.norm.eval()
    return model, core


def test_the_full_data_are_one_big_batch() -> None:
    model, core = independent_of_batches()
    at_once, parts = full_data(model)
    whole, found = (measure(model, Pass(core), loss) for loss in (at_once, parts))
    assert whole.whole.q > 1.01
    assert close(found.whole, whole.whole)
    for name, one in whole.by_parameter.items():
        assert close(found.by_parameter[name], one), name
    # Not the mean of the batches' means.
    assert not isinstance(parts, Callable)
    equal = measure(model, Pass(core), [(loss, 1.0) for loss, _ in parts])
    assert not close(equal.whole, whole.whole)
    # Only ratios of weights matter.
    scaled = measure(model, Pass(core), [(loss, 0.1 * weight) for loss, weight in parts])
    assert close(scaled.whole, whole.whole)


@pytest.mark.parametrize("kind", ["two", "same", "fresh"])
def test_a_step_on_the_full_data_is_one_on_a_big_batch(kind: str) -> None:
    """Passes that say where to go go by the gradient of all batches, too."""
    found = []
    for several in (False, True):
        model, core = independent_of_batches()
        full, losses = SubNetwork.full(model), full_data(model)
        plan = Plan((Pass(full), Pass(core, loss_weight=64.0)), update=full)
        if kind != "two":
            # Uphill, where gradients are larger: alpha is less than 1.
            plan = Extragradient(full, distance=0.3, look=kind, sign=1).plan(0)
        found.append(measure_step(model, plan, *[losses[several]] * 2))
    whole, parts = found
    assert 0 < whole.alpha < 1
    assert parts.alpha == pytest.approx(whole.alpha, rel=1e-9)
    assert list(parts.passes) == list(whole.passes)
    for name, one in whole.passes.items():
        assert close(parts.passes[name].whole, one.whole)
    assert max(one.whole.drift for one in whole.passes.values()) > 0


def test_all_passes_draw_the_same_numbers_batch_by_batch() -> None:
    """Also where one pass draws fewer than another: the core has half the dropout."""
    model, core, _ = made()
    full, (_, parts) = SubNetwork.full(model), full_data(model)
    drawn: list[float] = []

    def noted(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def drawing() -> Tensor:
            drawn.append(torch.rand(()).item())
            return loss()

        return drawing

    assert not isinstance(parts, Callable)
    losses = [(noted(loss), weight) for loss, weight in parts]
    found = measure_plan(model, Plan((Pass(core), Pass(full)), update=full), losses)
    # At x, of the core, of the whole network: batch after batch.
    batches = [drawn[i : i + 3] for i in range(0, 9, 3)]
    assert len(drawn) == 9 and all(len(set(batch)) == 1 for batch in batches)
    assert len(set(drawn)) == 3
    assert found["full"].whole.q == pytest.approx(1.0, rel=1e-12)
    assert found["core"].whole.q > 1.01


def most_bytes_held(measured: Callable[[], object]) -> int:
    """The most bytes that graphs held at once."""
    held = most = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, most
            self.tensor = tensor
            held += tensor.nbytes
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        measured()
    assert held == 0
    return most


def test_the_graph_of_one_batch_is_held_at_a_time() -> None:
    model, core = independent_of_batches()
    x = random(1, 64, 5)
    one = lambda: model(x).square().mean()  # noqa: E731
    item, plan = Pass(core), Slimmable([SubNetwork.full(model), core]).plan(0)
    single = most_bytes_held(lambda: measure(model, item, one))
    assert single > 64 * (5 + 8) * 8
    assert most_bytes_held(lambda: measure(model, item, [(one, 1.0)] * 6)) == single
    assert most_bytes_held(lambda: measure_step(model, plan, [(one, 1.0)] * 6)) == single
    # What there would be of all of them.
    at_once = most_bytes_held(lambda: measure(model, item, lambda: sum(one() for _ in range(6))))  # pyright: ignore[reportArgumentType]
    assert at_once > 5 * single


@pytest.mark.parametrize("kind", ["ats", "same", "past"])
def test_training_does_not_know_of_it(kind: str) -> None:
    """Bit for bit, with dropout, running statistics and a method that has a state."""
    states: list[dict[str, Tensor]] = []
    for measuring in (False, True):
        model, core, _ = made()
        full, (_, parts) = SubNetwork.full(model), full_data(model)
        makes: dict[str, Callable[[], Method]] = {
            "ats": lambda full=full, core=core: ATS([full, core]),
            "same": lambda full=full: Extragradient(full, distance=0.1),
            "past": lambda full=full: Extragradient(full, distance=0.1, look="past"),
        }
        method = makes[kind]()
        optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = Trainer(model, method, optimizer, nn.functional.mse_loss)
        torch.manual_seed(3)
        data = [(random(i, 8, 5), random(10 + i, 8, 3)) for i in range(4)]
        for report in trainer.steps(data, until=4):
            if measuring:
                measure_step(model, method.plan(report.step), parts)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [2.0, -1.0], [math.nan, 1.0], [math.inf]])
def test_weights_that_make_no_mean(weights: list[float]) -> None:
    model, core, loss = made()
    with pytest.raises(ValueError, match="weights of batches must be >= 0, finite and not all 0"):
        measure(model, Pass(core), [(loss, weight) for weight in weights])


def test_a_fresh_batch_has_to_be_given() -> None:
    model, _, loss = made()
    plan = Extragradient(SubNetwork.full(model), distance=0.1, look="fresh").plan(0)
    with pytest.raises(ValueError, match=r"run on 2 mini-batches: measuring needs .* got 1"):
        measure_step(model, plan, loss)

"""Smoothness: closed forms, the monotone iteration, and what measuring leaves alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import SubNetwork
from maskedtrain.methods.base import Pass
from maskedtrain.models import MLP, Transformer
from maskedtrain.theory import smoothness
from maskedtrain.theory.criteria import measure
from tests.theory.toolbox import random_point, seeded


class Point(nn.Module):
    """A model that is nothing but x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)


def with_eigenvalues(values: list[float], seed: int) -> Tensor:
    square = torch.randn(len(values), len(values), generator=seeded(seed), dtype=torch.float64)
    basis, _ = torch.linalg.qr(square)
    matrix = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ([1.0, 2.0, 5.0], 5.0),
        ([-7.0, 1.0, 2.0, 5.0], -7.0),
        ([-1.0, -2.0], -2.0),
        ([3.0], 3.0),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_quadratics_largest_eigenvalue(values: list[float], top: float, seed: int) -> None:
    matrix, model = with_eigenvalues(values, seed), Point(random_point(len(values), seed))
    found = smoothness(model, lambda: model.x @ matrix @ model.x / 2, tolerance=1e-14, seed=seed)
    assert found.converged
    assert pytest.approx(abs(top), rel=1e-9) == found.L
    assert found.curvature == pytest.approx(top, rel=1e-9)


def test_equal_eigenvalues_of_either_sign() -> None:
    """There the direction and its Rayleigh quotient never settle; the norm does."""
    matrix, model = with_eigenvalues([-4.0, 4.0, 1.0], 0), Point(random_point(3, 0))
    found = smoothness(model, lambda: model.x @ matrix @ model.x / 2, tolerance=1e-14)
    assert found.converged and pytest.approx(4.0, rel=1e-9) == found.L
    assert abs(found.curvature) < 3.99


def test_every_iteration_raises_it() -> None:
    matrix, model = with_eigenvalues([5.0, 4.9, -4.8, 1.0], 3), Point(random_point(4, 3))
    found = [
        smoothness(model, lambda: model.x @ matrix @ model.x / 2, iterations=n, tolerance=0.0)
        for n in range(1, 30)
    ]
    values = [one.L for one in found]
    assert values == sorted(values) and values[0] < values[-1] <= 5.0 + 1e-12
    assert [one.iterations for one in found] == list(range(1, 30))
    assert not any(one.converged for one in found)


def test_a_linear_layer_with_squared_error() -> None:
    """H = 2/(N O) I_O x [X 1]^T [X 1]: the mean over N examples and O outputs."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    x, y = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    with_ones = torch.cat([x, torch.ones(20, 1).double()], 1)
    expected = torch.linalg.eigvalsh(with_ones.T @ with_ones)[-1] * 2 / 60
    found = smoothness(layer, lambda: F.mse_loss(layer(x), y), tolerance=1e-14, iterations=500)
    assert pytest.approx(float(expected), rel=1e-9) == found.L


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the cross-entropy, dense, by central differences of gradients."""
    parameters = list(model.parameters())

    def gradient() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    columns: list[Tensor] = []
    for parameter in parameters:
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            held, ends = flat[i].clone(), []
            for sign in (1, -1):
                flat[i] = held + sign * 1e-5
                ends.append(gradient())
            flat[i] = held
            columns.append((ends[0] - ends[1]) / 2e-5)
    return torch.stack(columns)


@pytest.mark.parametrize("core", [False, True])
def test_of_a_network_and_of_its_core(core: bool) -> None:
    torch.manual_seed(0)
    model = MLP(4, (6,), 3).double()
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
    subnet = SubNetwork.width(model, 0.5, round_to=1) if core else SubNetwork.full(model)
    with subnet.activate():
        found = smoothness(
            model, lambda: F.cross_entropy(model(x), y), tolerance=1e-12, iterations=2000
        )
        values = torch.linalg.eigvalsh(hessian(model, x, y))
    # Differences of gradients are right to 1e-10 or so of their size.
    assert pytest.approx(float(values.abs().max()), rel=1e-6) == found.L


def test_a_function_without_curvature_has_none() -> None:
    model = nn.Linear(3, 1)
    found = smoothness(model, lambda: model(torch.ones(2, 3)).sum())
    assert (found.L, found.curvature, found.iterations, found.converged) == (0.0, 0.0, 1, True)


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    model = Transformer(9, 9, d_model=8, heads=2, ffn=8, encoder_layers=1, decoder_layers=1)
    tokens = torch.randint(4, 9, (2, 5))
    loss = lambda: F.cross_entropy(model(tokens, tokens).flatten(0, 1), tokens.flatten())  # noqa: E731
    assert smoothness(model, loss, iterations=3).L > 0


def test_assumption_3_consumes_it() -> None:
    """A core's perturbation on a quadratic, whose L is known, on both sides of the bound."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False).double()
    x = torch.randn(30, 6).double()
    core = SubNetwork(model, {"weight": pk.Element(torch.arange(6)[None] < 5)}, name="core")
    for outside, expected in ((1e-3, True), (10.0, False)):
        model.weight.data[0, 5] = outside
        loss = lambda: model(x).square().mean()  # noqa: E731
        found = smoothness(model, loss, tolerance=1e-12, iterations=1000)
        exact = float(torch.linalg.eigvalsh(x.T @ x)[-1]) * 2 / 30
        assert pytest.approx(exact, rel=1e-6) == found.L
        assert measure(model, Pass(core), loss).whole.assumption3(found.L) is expected


def test_measuring_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    x = torch.randn(8, 4)
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        return model(x).square().mean()

    loss().backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [parameter.grad for parameter in model.parameters()]
    copies = [grad.clone() for grad in grads if grad is not None]
    numbers = torch.get_rng_state()
    calls.clear()
    first, second = smoothness(model, loss, seed=1), smoothness(model, loss, seed=1)
    assert first == second and len(calls) == 2
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for parameter, grad, copy in zip(model.parameters(), grads, copies, strict=True):
        assert parameter.grad is grad and torch.equal(grad, copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1 and tolerance >= 0, got 0 and 0.001"),
        ({"tolerance": -1.0}, "iterations must be >= 1 and tolerance >= 0, got 100 and -1.0"),
        ({"tolerance": float("nan")}, "got 100 and nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=message):
        smoothness(model, lambda: model(torch.ones(2, 3)).sum(), **options)


def test_nothing_to_differentiate_is_refused() -> None:
    model = nn.Linear(3, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        smoothness(model, lambda: model(torch.ones(2, 3)).sum())

"""``fisher_scores`` against brute force and closed forms, and that it changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain.methods.fisher import fisher_scores, single_examples
from tests.train.toolbox import assert_equal, noise, snapshot

I, H, C = 5, 7, 4


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(I, H), nn.LayerNorm(H), nn.Tanh(), nn.Dropout(0.5), nn.Linear(H, C)
    return nn.Sequential(*layers).double()


def examples(count: int, *size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of these sizes, of ``count`` examples in all."""
    x, y = noise(40, I)[:count].double(), torch.arange(count) * 3 % C
    yield from zip(x.split(list(size)), y.split(list(size)), strict=True)


def brute_force(model: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """``sum_n sum_c weights[n, c] (d log p(c | x_n) / d theta)^2``, term by term."""
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for n, c in itertools.product(range(len(x)), range(C)):
        model.zero_grad()
        F.log_softmax(model(x), -1)[n, c].backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            found[name] += weights[n, c] * p.grad**2
    model.zero_grad()
    model.train()
    return found


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_scores_are_those_of_brute_force(kind: Literal["empirical", "true"]) -> None:
    model = small()
    batches = list(examples(9, 4, 5))
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    p = F.softmax(model.eval()(x), -1).detach()
    expected = brute_force(model, x, F.one_hot(y, C).double() if kind == "empirical" else p)
    found = fisher_scores(model, batches, examples=9, kind=kind)
    assert found.keys() == expected.keys()
    for name, score in found.items():
        # fp64 sums in another order.
        torch.testing.assert_close(score, expected[name], rtol=1e-10, atol=1e-14)
        assert score.any()


def test_closed_form_of_a_linear_classifier() -> None:
    """For logits ``W x``: ``(1[y] - p)^2 x^2``, whose expectation is ``p (1 - p) x^2``."""
    torch.manual_seed(0)
    model = nn.Linear(I, C, bias=False).double()
    ((x, y),) = examples(6, 6)
    p = F.softmax(model(x), -1).detach()
    expected = {
        "empirical": ((F.one_hot(y, C) - p) ** 2).T @ x**2,
        "true": (p * (1 - p)).T @ x**2,
    }
    for kind, score in expected.items():
        found = fisher_scores(model, [(x, y)], examples=6, kind=cast(Any, kind))["weight"]
        torch.testing.assert_close(found, score, rtol=1e-12, atol=0)


def test_the_first_examples_count_however_they_are_batched() -> None:
    model = small()
    expected = fisher_scores(model, examples(7, 7), examples=7)
    for sizes in ((1, 6, 5), (5, 5, 2), (12,)):
        assert_equal(fisher_scores(model, examples(12, *sizes), examples=7), expected)


def test_no_more_is_taken_than_is_scored() -> None:
    stream = single_examples(examples(6, 3, 3))
    fisher_scores(small(), stream, examples=4)
    assert len(list(stream)) == 2


class Tagger(nn.Module):
    """A class for each token, from it and the sentence's length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, C, dtype=torch.float64, sparse=True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.embedding(tokens) * lengths[:, None, None]


def test_a_sequence_is_one_example_and_what_is_ignored_does_not_count() -> None:
    model, tokens = Tagger(), torch.tensor([[0, 1, 1], [2, 3, 5]])
    targets, lengths = torch.tensor([[1, 2, 3], [0, 2, -100]]), torch.tensor([3, 2])
    expected = torch.zeros(6, C, dtype=torch.float64)
    for n in range(2):
        model.zero_grad()
        F.cross_entropy(
            model(tokens[n : n + 1], lengths[n : n + 1])[0], targets[n], reduction="sum"
        ).backward()
        assert model.embedding.weight.grad is not None
        expected += model.embedding.weight.grad.to_dense() ** 2
    model.zero_grad()
    found = fisher_scores(model, [((tokens, lengths), targets)], examples=2)["embedding.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not found[4:].any() and found[:4].all()


def test_nothing_changes() -> None:
    model = nn.Sequential(small(), nn.BatchNorm1d(C), nn.Dropout(0.3)).double()
    model[0].eval()
    before, modes = snapshot(model), [m.training for m in model.modules()]
    model.zero_grad()
    state = torch.get_rng_state()
    first = fisher_scores(model, examples(4, 4), examples=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(snapshot(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    # No dropout: no chance.
    torch.manual_seed(5)
    with torch.no_grad():
        assert_equal(fisher_scores(model, examples(4, 4), examples=4), first)


def test_modes_come_back_after_a_failure() -> None:
    model = small()
    with pytest.raises(ValueError, match="examples must be <= 2"):
        fisher_scores(model, examples(2, 2), examples=3)
    assert all(module.training for module in model.modules())


def test_half_precision_adds_up_in_fp32() -> None:
    model = small().bfloat16()
    x, y = noise(40, I).bfloat16(), torch.arange(40) % C
    found = fisher_scores(model, [(x, y)], examples=40)
    assert all(score.dtype == torch.float32 for score in found.values())
    expected = fisher_scores(small(), [(x.double(), y)], examples=40)
    for name, score in found.items():
        # Gradients with 8 bits, squared.
        torch.testing.assert_close(score.double(), expected[name], rtol=0.2, atol=0.05)


def test_only_what_is_asked_for_is_scored() -> None:
    model = small()
    every = fisher_scores(model, examples(3, 3), examples=3)
    model[0].weight.requires_grad = False  # pyright: ignore[reportIndexIssue]
    assert fisher_scores(model, examples(3, 3), examples=3).keys() == every.keys() - {"0.weight"}
    chosen = {"last": cast(Any, model)[4].bias}
    found = fisher_scores(model, examples(3, 3), examples=3, parameters=chosen)
    assert_equal(found, {"last": every["4.bias"]})


def test_what_the_model_does_not_use_scores_nothing() -> None:
    model = nn.ModuleDict({"used": nn.Linear(I, C), "idle": nn.Linear(I, C)}).double()
    model.forward = lambda x: model["used"](x)  # pyright: ignore[reportAttributeAccessIssue]
    found = fisher_scores(model, examples(3, 3), examples=3)
    assert found["used.weight"].any() and not found["idle.weight"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": 0}, "examples must be >= 1, got 0"),
        ({"kind": "expected"}, 'kind must be "empirical" or "true", got \'expected\''),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_scores(small(), examples(3, 3), **{"examples": 3, **options})


def test_targets_must_fit() -> None:
    x = noise(2, I).double()
    with pytest.raises(ValueError, match=r"targets must be of the logits' shape .* got \[1, 1\]"):
        fisher_scores(small(), [(x, torch.zeros(2, 1, dtype=torch.int64))], examples=2)
    tokens, lengths = torch.tensor([[0, 1]]), torch.tensor([2])
    batches = [((tokens, lengths), tokens)]
    with pytest.raises(ValueError, match=r'kind="true": targets must be \[B\]'):
        fisher_scores(Tagger(), batches, examples=1, kind="true")

"""Batches made ahead by a thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskedtrain.data import token_batches
from maskedtrain.data._prefetch import prefetched
from maskedtrain.data.token_batches import TokenBatches
from maskedtrain.data.translation import Ragged, TranslationSplit


def some_split() -> TranslationSplit:
    """Pairs that are all different."""
    lengths = np.random.default_rng(0).integers(1, 9, (50, 2))
    sides = [[range(4 + i, 4 + i + n) for i, n in enumerate(side)] for side in lengths.T]
    return TranslationSplit(*map(Ragged.of, sides), [""] * 50, [""] * 50)


def take(batches: TokenBatches, count: int) -> list[Any]:
    return list(itertools.islice(batches.stream(), count))


def test_batches_made_ahead_are_the_same(monkeypatch: pytest.MonkeyPatch):
    """What CUDA does, without it: copies go to the stream that the batches are used on."""
    current = threading.local()

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        current.stream = stream
        yield
        current.stream = None

    class Ahead(TokenBatches):
        def _placed(self, array: Any) -> Tensor:
            assert current.stream == "of training" and threading.current_thread() is not here
            return torch.from_numpy(array)

    here = threading.current_thread()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "of training")
    monkeypatch.setattr(torch.cuda, "stream", on)
    plain, ahead = TokenBatches(some_split(), 40), Ahead(some_split(), 40, device="cuda")
    threads = threading.active_count()
    stream = ahead.stream()
    found = list(itertools.islice(stream, 2 * len(ahead) + 3))
    assert threading.active_count() == threads + 1
    expected = take(plain, 2 * len(plain) + 3)
    for (inputs, targets), (other_inputs, other_targets) in zip(found, expected, strict=True):
        assert all(map(torch.equal, (*inputs, targets), (*other_inputs, other_targets)))
    # What was made ahead and not handed out is not counted.
    assert ahead.state_dict() == plain.state_dict() and ahead.batch == 3
    del stream
    assert threading.active_count() == threads


def test_on_the_host_there_is_no_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_batches, "prefetched", None)
    assert len(take(TokenBatches(some_split(), 40), 3)) == 3


def test_prefetched_items_come_in_order_and_end():
    threads = threading.active_count()
    assert list(prefetched(iter(range(100)), depth=2)) == list(range(100))
    assert threading.active_count() == threads


def test_no_more_is_made_ahead_than_asked_for():
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            if len(made) == 4:
                third.set()
            yield i

    ahead = prefetched(items(), depth=2)
    assert next(ahead) == 0
    # One handed out, two waiting, one in the thread's hands.
    assert third.wait(10)
    ahead.close()
    assert made == [0, 1, 2, 3]


def test_an_error_comes_where_its_item_would_have():
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("damaged")

    threads = threading.active_count()
    ahead = prefetched(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="damaged"):
        next(ahead)
    assert threading.active_count() == threads

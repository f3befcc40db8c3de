"""Batches of sentence pairs: what they hold, their budget, order, position; prefetching."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskedtrain.data import token_batches
from maskedtrain.data._prefetch import prefetched
from maskedtrain.data.token_batches import TokenBatches
from maskedtrain.data.translation import Ragged, TranslationSplit
from maskedtrain.data.vocabulary import BOS, EOS, PAD

Sides = list[tuple[list[int], list[int]]]

ids = st.lists(st.integers(4, 99), max_size=12)
sides = st.lists(st.tuples(ids, ids), min_size=1, max_size=40)
budgets = st.integers(1, 60)


def make_split(pairs: Sides) -> TranslationSplit:
    source, target = (Ragged.of([pair[side] for pair in pairs]) for side in range(2))
    return TranslationSplit(source, target, [""] * len(pairs), [""] * len(pairs))


def some_split(count: int = 50, seed: int = 0) -> TranslationSplit:
    """Pairs that are all different."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, (count, 2))
    return make_split(
        [(rng.integers(4, 99, a).tolist(), [4 + i, *[5] * b]) for i, (a, b) in enumerate(lengths)]
    )


def pairs_of(batches: Any) -> Sides:
    """The pairs that batches were made of; asserts that their parts agree."""
    found: Sides = []
    for (source, decoder_input), targets in batches:
        for row in range(len(source)):
            found.append((sentence(source[row]), sentence(targets[row], fill=-100)))
            length = len(found[-1][1]) + 1
            assert decoder_input[row, :length].tolist() == [BOS, *found[-1][1]]
            assert (decoder_input[row, length:] == PAD).all()
    return found


def sentence(row: Tensor, fill: int = PAD) -> list[int]:
    """The ids before eos; asserts that nothing but filling comes after it."""
    end = row.tolist().index(EOS)
    assert (row[end + 1 :] == fill).all()
    return row[:end].tolist()


def take(batches: TokenBatches, count: int) -> list[Any]:
    return list(itertools.islice(batches.stream(), count))


def test_a_batch_on_worked_numbers():
    batches = TokenBatches(make_split([([7], [8, 9]), ([5, 6, 7], [4])]), 100)
    (((source, decoder_input), targets),) = batches
    assert source.tolist() == [[5, 6, 7, EOS], [7, EOS, PAD, PAD]]
    assert decoder_input.tolist() == [[BOS, 4, PAD], [BOS, 8, 9]]
    assert targets.tolist() == [[4, EOS, -100], [8, 9, EOS]]
    assert {t.dtype for t in (source, decoder_input, targets)} == {torch.int64}


@given(sides, budgets, st.booleans())
def test_every_pair_comes_once_within_the_budget(pairs: Sides, max_tokens: int, shuffle: bool):
    batches = TokenBatches(make_split(pairs), max_tokens, shuffle=shuffle)
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(pairs_of(found)) == sorted(pairs)
    for (source, decoder_input), targets in found:
        assert decoder_input.shape == targets.shape and len(source) == len(targets)
        # No column is filling alone.
        assert (source != PAD).any(0).all() and (targets != -100).any(0).all()
        size = len(source) * max(source.shape[1], targets.shape[1])
        assert size <= max_tokens or len(source) == 1


@given(sides, budgets)
def test_batches_are_as_large_as_the_budget_allows(pairs: Sides, max_tokens: int):
    found = list(TokenBatches(make_split(pairs), max_tokens))
    for (source, _), targets in found[:-1]:
        longest = max(source.shape[1], targets.shape[1])
        assert (len(source) + 1) * longest > max_tokens


def test_one_pass_is_from_long_to_short():
    longest = [max(map(len, pair)) for pair in pairs_of(TokenBatches(some_split(), 40))]
    assert longest == sorted(longest, reverse=True) and len(longest) == 50


@pytest.mark.parametrize("swap", [False, True])
def test_neither_side_is_padded_much(swap: bool):
    lengths = np.random.default_rng(0).integers(0, 29, 4000)
    pairs: Sides = [([4] * 29, [5] * length) for length in lengths]
    batches = TokenBatches(make_split([(b, a) for a, b in pairs] if swap else pairs), 2000)
    tokens = padded = 0
    for (source, decoder_input), _ in batches:
        for side in (source, decoder_input):
            tokens += side.numel()
            padded += int((side == PAD).sum())
    # Sorted by the longer sides alone, a quarter would be.
    assert padded / tokens < 0.01


def test_shuffling_is_of_pairs_and_of_batches():
    split = some_split(400)
    plain, shuffled = (TokenBatches(split, 40, shuffle=shuffle) for shuffle in (False, True))
    found = take(shuffled, 2 * len(shuffled))
    first, second = found[: len(shuffled)], found[len(shuffled) :]
    orders = [pairs_of(part) for part in (plain, first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    # Batches of other pairs, not only other places of the same batches.
    contents = [{tuple(map(str, pairs_of([b]))) for b in part} for part in (plain, first, second)]
    assert all(len(a & b) < 10 for a, b in itertools.combinations(contents, 2))
    sizes = [[len(source) for (source, _), _ in part] for part in (plain, first, second)]
    assert sorted(sizes[0]) == sorted(sizes[1]) == sorted(sizes[2])
    assert sizes[0] != sizes[1] != sizes[2] != sizes[0]


@settings(max_examples=30)
@given(sides, budgets, st.integers(0, 2**40), st.integers(0, 50), st.booleans())
def test_a_fresh_loader_goes_on_bitwise(
    pairs: Sides, max_tokens: int, seed: int, done: int, shuffle: bool
):
    def make() -> TokenBatches:
        return TokenBatches(make_split(pairs), max_tokens, seed=seed, shuffle=shuffle)

    # Global random state is not looked at.
    torch.manual_seed(done)
    whole, cut, fresh = make(), make(), make()
    expected = take(whole, done + 20)
    take(cut, done)
    assert (cut.epoch, cut.batch) == divmod(done, len(cut))
    fresh.load_state_dict(cut.state_dict())
    for (inputs, targets), (other_inputs, other_targets) in zip(
        take(fresh, 20), expected[done:], strict=True
    ):
        assert all(map(torch.equal, (*inputs, targets), (*other_inputs, other_targets)))
    assert fresh.state_dict() == whole.state_dict()


def test_a_batch_counts_when_it_is_handed_out():
    batches = TokenBatches(some_split(), 40)
    stream = batches.stream()
    for expected in range(1, len(batches)):
        next(stream)
        assert (batches.epoch, batches.batch) == (0, expected)
    next(stream)
    assert (batches.epoch, batches.batch) == (1, 0)


def test_a_stream_goes_on_as_it_was_when_another_position_is_loaded():
    batches = TokenBatches(some_split(), 40)
    stream, expected = batches.stream(), take(TokenBatches(some_split(), 40), 2)
    next(stream)
    batches.load_state_dict({**batches.state_dict(), "epoch": 5, "batch": 3})
    assert pairs_of([next(stream)]) == pairs_of(expected[1:])
    # The position is that of the batch handed out last.
    assert (batches.epoch, batches.batch) == (0, 2)


def test_one_pass_leaves_the_position_and_follows_its_epoch():
    batches = TokenBatches(some_split(), 40, shuffle=True)
    take(batches, 3)
    state = batches.state_dict()
    first = pairs_of(batches)
    assert batches.state_dict() == state and pairs_of(batches) == first
    take(batches, len(batches))
    assert pairs_of(batches) != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 41}, "max_tokens must be 40, got 41"),
        ({"seed": 1}, "seed must be 0, got 1"),
        ({"shuffle": True}, "shuffle must be False, got True"),
        ({"num_pairs": 49}, "num_pairs must be 50, got 49"),
        ({"digest": "0"}, "digest must be [0-9a-f]{64}, got 0"),
        ({"batch": 1000}, r"batch in \[0, \d+\), got epoch 0, batch 1000"),
        ({"epoch": -1}, "got epoch -1, batch 3"),
        ({"more": 0}, "loader state must have keys"),
    ],
)
def test_a_state_of_other_batches_is_refused(change: dict[str, Any], message: str):
    batches = TokenBatches(some_split(), 40)
    take(batches, 3)
    before = batches.state_dict()
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict({**before, **change})
    assert batches.state_dict() == before


def test_of_several_differences_the_plainest_is_told():
    batches = TokenBatches(some_split(49), 40)
    with pytest.raises(ValueError, match="num_pairs must be 49, got 50"):
        batches.load_state_dict(TokenBatches(some_split(50), 40, seed=1).state_dict())


def test_digests_tell_data_apart():
    pairs: Sides = [([4, 5], [6]), ([7], [8])]
    moved: Sides = [([4], [6]), ([5, 7], [8])]
    swapped: Sides = [(b, a) for a, b in pairs]
    digests = {make_split(p).digest for p in (pairs, moved, swapped, pairs[:1], pairs[::-1])}
    assert len(digests) == 5
    assert make_split(pairs).digest in digests


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        (some_split(), {"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        (some_split(), {"max_tokens": 9, "seed": -1}, "seed must be >= 0, got -1"),
        (make_split([]), {"max_tokens": 9}, "there is no pair of sentences"),
    ],
)
def test_bad_arguments(split: TranslationSplit, options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        TokenBatches(split, **options)


# Prefetching


def test_batches_made_ahead_are_the_same(monkeypatch: pytest.MonkeyPatch):
    """What CUDA does, without it."""

    class Ahead(TokenBatches):
        def _placed(self, array: Any) -> Tensor:
            return torch.from_numpy(array)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    plain, ahead = TokenBatches(some_split(), 40), Ahead(some_split(), 40, device="cuda")
    assert ahead.device == torch.device("cuda", 1)
    threads = threading.active_count()
    stream = ahead.stream()
    found = list(itertools.islice(stream, 2 * len(ahead) + 3))
    assert threading.active_count() == threads + 1
    assert pairs_of(found) == pairs_of(take(plain, 2 * len(plain) + 3))
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

"""Batches of sentence pairs: what they hold, their budget, order, position; buckets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from maskedtrain.data._buckets import make_buckets
from maskedtrain.data.token_batches import TokenBatches
from maskedtrain.data.translation import Ragged, TranslationSplit
from maskedtrain.data.vocabulary import BOS, EOS, PAD
from maskedtrain.methods.cores import core_chain
from maskedtrain.models.transformer import Transformer
from maskedtrain.training.losses import cross_entropy

Sides = list[tuple[list[int], list[int]]]

ids = st.lists(st.integers(4, 99), max_size=12)
sides = st.lists(st.tuples(ids, ids), min_size=1, max_size=40)
budgets = st.integers(1, 60)
buckets = st.none() | st.integers(1, 5)


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


def pairs_of(batches: Any, *, filled: bool = False) -> Sides:
    """The pairs that batches were made of, empty ones that fill them up left out; asserts that
    their parts agree.
    """
    found: Sides = []
    for (source, decoder_input), targets in batches:
        for row in range(len(source)):
            if filled and (targets[row] == -100).all():
                assert sentence(source[row]) == sentence(decoder_input[row], end=BOS) == []
                continue
            found.append((sentence(source[row]), sentence(targets[row], fill=-100)))
            length = len(found[-1][1]) + 1
            assert decoder_input[row, :length].tolist() == [BOS, *found[-1][1]]
            assert (decoder_input[row, length:] == PAD).all()
    return found


def sentence(row: Tensor, fill: int = PAD, end: int = EOS) -> list[int]:
    """The ids before the end; asserts that nothing but filling comes after it."""
    length = row.tolist().index(end)
    assert (row[length + 1 :] == fill).all()
    return row[:length].tolist()


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
@given(sides, budgets, st.integers(0, 2**40), st.integers(0, 50), st.booleans(), buckets)
def test_a_fresh_loader_goes_on_bitwise(
    pairs: Sides, max_tokens: int, seed: int, done: int, shuffle: bool, buckets: int | None
):
    def make() -> TokenBatches:
        options: Any = {"seed": seed, "shuffle": shuffle, "buckets": buckets}
        return TokenBatches(make_split(pairs), max_tokens, **options)

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
        ({"buckets": 4}, "buckets must be None, got 4"),
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
        (some_split(), {"max_tokens": 9, "buckets": 0}, "buckets must be >= 1, got 0"),
        (make_split([]), {"max_tokens": 9}, "there is no pair of sentences"),
    ],
)
def test_bad_arguments(split: TranslationSplit, options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        TokenBatches(split, **options)


# Buckets


@given(sides, budgets, st.integers(1, 5), st.booleans())
def test_buckets_have_few_shapes_and_every_pair_once(
    pairs: Sides, max_tokens: int, count: int, shuffle: bool
):
    batches = TokenBatches(make_split(pairs), max_tokens, shuffle=shuffle, buckets=count)
    for _ in range(2):
        found = take(batches, len(batches))
        assert sorted(pairs_of(found, filled=True)) == sorted(pairs)
        shapes = {(*source.shape, targets.shape[1]) for (source, _), targets in found}
        assert len(shapes) <= count
        for B, S, T in shapes:
            longest = max(S, T)
            # As many pairs as fit: a bucket's last batch, too.
            assert max(1, max_tokens // longest) == B
        for (source, decoder_input), targets in found:
            assert decoder_input.shape == targets.shape and len(source) == len(targets)
            assert (targets != -100).any()
            assert {t.dtype for t in (source, decoder_input, targets)} == {torch.int64}


def test_a_bucket_on_worked_numbers():
    pairs: Sides = [([7], [8, 9]), ([5, 6, 7], [4]), ([5], [])]
    batches = TokenBatches(make_split(pairs), 8, buckets=1)
    (_, ((source, decoder_input), targets)) = batches
    # Two pairs fit a batch; the second one's other row is empty, the lengths are the longest ones.
    assert source.tolist() == [[7, EOS, PAD, PAD], [EOS, PAD, PAD, PAD]]
    assert decoder_input.tolist() == [[BOS, 8, 9], [BOS, PAD, PAD]]
    assert targets.tolist() == [[8, 9, EOS], [-100, -100, -100]]


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=25)


@given(lengths, budgets, st.integers(1, 4))
def test_an_epoch_has_the_fewest_tokens(pairs: list[tuple[int, int]], max_tokens: int, count: int):
    source, target = np.array(pairs).T
    longest = np.maximum(source, target)

    def tokens(bucket: NDArray[np.int64]) -> int:
        total = 0
        for one in np.unique(bucket):
            S, T = source[bucket == one].max(), target[bucket == one].max()
            B = max(1, max_tokens // max(S, T))
            total += -(-int((bucket == one).sum()) // B) * B * (S + T)
        return total

    bucket, shapes = make_buckets(source, target, max_tokens, count)
    ends = range(1, 9)
    cuts = (c for n in range(count) for c in itertools.combinations(ends, n))
    assert tokens(bucket) == min(tokens(np.searchsorted(cut, longest)) for cut in cuts)
    assert sorted(set(bucket)) == list(range(len(shapes)))
    for i, (B, S, T) in enumerate(shapes):
        assert (source[bucket == i].max(), target[bucket == i].max()) == (S, T)
        assert max(1, max_tokens // max(S, T)) == B
    # From short to long.
    parts = [longest[bucket == i] for i in range(len(shapes))]
    assert all(short.max() < long.min() for short, long in itertools.pairwise(parts))


def test_in_a_bucket_pairs_meet_others_each_epoch():
    batches = TokenBatches(some_split(400), 40, shuffle=True, buckets=3)
    epochs = [take(batches, len(batches)) for _ in range(2)]
    contents = [{tuple(map(str, pairs_of([b], filled=True))) for b in part} for part in epochs]
    assert len(contents[0] & contents[1]) < 5
    plain = list(TokenBatches(some_split(400), 40, buckets=3))
    sizes = [source.shape[1] for (source, _), _ in plain]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_a_state_from_before_there_were_buckets_is_read():
    batches = TokenBatches(some_split(), 40)
    take(batches, 3)
    state = batches.state_dict()
    del state["buckets"]
    fresh = TokenBatches(some_split(), 40)
    fresh.load_state_dict(state)
    assert fresh.batch == 3
    with pytest.raises(ValueError, match="buckets must be 2, got None"):
        TokenBatches(some_split(), 40, buckets=2).load_state_dict(state)


def each_alone(batch: Any) -> Iterator[Any]:
    """The pairs of a batch as batches of one, without any padding."""
    (source, decoder_input), targets = batch
    for row in range(len(source)):
        S, T = int((source[row] != PAD).sum()), int((targets[row] != -100).sum())
        if T:
            one = slice(row, row + 1)
            yield (source[one, :S], decoder_input[one, :T]), targets[one, :T]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("network", ["full", "core"])
def test_filling_changes_no_loss_and_no_gradient(
    network: str, norm: Any, autocast: torch.dtype | None
):
    torch.manual_seed(0)
    sizes: Any = {"d_model": 8, "heads": 2, "ffn": 16, "encoder_layers": 1, "decoder_layers": 2}
    model = Transformer(99, 99, dropout=0.0, norm=norm, **sizes)
    subnets = {s.name: s for s in core_chain(model, "lowrank", (0.25,), round_to=1)}
    model.to(torch.float64 if autocast is None else torch.float32)
    (batch,) = TokenBatches(some_split(30), 400, buckets=1)
    count = int((batch[1] != -100).sum())
    assert len(batch[1]) > 30 and count < batch[1].numel() / 2
    found: list[list[Tensor]] = []
    for parts in ([batch], list(each_alone(batch))):
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for inputs, targets in parts:
            enabled = autocast is not None
            with subnets[network].activate(), torch.autocast("cpu", autocast, enabled=enabled):
                loss = cross_entropy(model(*inputs), targets, 0.1)
            share = loss * (int((targets != -100).sum()) / count)
            share.backward()
            total += share.detach()
        # In one vector: of a key's bias the gradient is 0 but for rounding.
        gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append([total, torch.cat(gradient)])
    # Sums in another order; bf16 resolves 2^-8.
    tolerance = 1e-12 if autocast is None else 2**-6
    for filled, alone in zip(*found, strict=True):
        assert (filled - alone).norm() <= tolerance * alone.norm()

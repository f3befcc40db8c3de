"""Number words: pairs, splits, lengths of the numbers."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from num2words import num2words

from maskedtrain.data.numbers import Config, _spread


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def spread(largest: int, count: int, seed: int = 0) -> list[int]:
    return _spread(np.random.RandomState(seed), largest, count).tolist()


def test_both_sides_say_the_same_number():
    splits = Config(largest=9_999, train_pairs=200, eval_pairs=20).read()
    assert {name: len(source) for name, (source, _) in splits.items()} == {
        "train": 200,
        "val": 20,
        "test": 20,
    }
    numbers = {num2words(n, lang="en"): n for n in range(10_000)}
    for source, target in splits.values():
        assert target == [num2words(numbers[words], lang="de") for words in source]


def test_the_example_of_the_docstring():
    config = Config()
    number = np.array([42_321])
    assert config._words(number, "en") == ["forty-two thousand, three hundred and twenty-one"]
    assert config._words(number, "de") == ["zweiundvierzigtausenddreihunderteinundzwanzig"]


@pytest.mark.parametrize(
    ("largest", "train", "val"), [(999, 600, 100), (999, 800, 100), (11, 8, 2)]
)
def test_no_number_is_in_two_splits(largest: int, train: int, val: int):
    splits = Config(largest=largest, train_pairs=train, eval_pairs=val).read()
    for side in range(2):
        lines = [line for pair in splits.values() for line in pair[side]]
        assert len({*lines}) == len(lines) == train + 2 * val


def test_every_split_has_short_and_long_numbers():
    splits = Config(largest=9_999, train_pairs=600, eval_pairs=200).read()
    for source, _ in splits.values():
        short = sum("thousand" not in words for words in source)
        # 287 of all 1000.
        assert abs(short / len(source) - 0.287) < 0.1


def test_the_seed_settles_the_numbers():
    def read(seed: int) -> Any:
        return Config(largest=9999, train_pairs=50, eval_pairs=5, split_seed=seed).read()

    assert read(0) == read(0)
    assert not {*read(0)["test"][0]} & {*read(1)["test"][0]}


@settings(max_examples=200)
@given(st.integers(0, 300), st.data())
def test_numbers_are_different_and_in_range(largest: int, data: st.DataObject):
    count = data.draw(st.integers(0, largest + 1))
    found = spread(largest, count, data.draw(st.integers(0, 9)))
    assert len({*found}) == len(found) == count
    assert all(0 <= number <= largest for number in found)


def test_all_numbers_may_be_wanted():
    assert sorted(spread(1234, 1235)) == list(range(1235))


def test_short_and_long_numbers_occur():
    sizes = Counter(len(str(number)) for number in spread(999_999, 10_000))
    # Half of the numbers of one and two digits, then a quarter of what is still wanted.
    assert (sizes[1], sizes[2], sizes[3]) == (5, 45, 450)
    assert sizes[4] == 9500 // 4 and sizes[5] == (9500 - sizes[4]) // 4
    assert sum(sizes.values()) == 10_000


def test_numbers_of_a_length_are_drawn_evenly():
    numbers = np.array([n for n in spread(999_999_999, 20_000) if n >= 100_000_000])
    assert len(numbers) > 2000
    counts = np.bincount(numbers // 100_000_000)[1:]
    # Within 5 standard deviations.
    assert np.abs(counts - len(numbers) / 9).max() < 5 * (len(numbers) / 9) ** 0.5


def test_a_large_range_is_not_made():
    # An array of all these numbers would take 8 TB.
    found = spread(10**12, 1000)
    assert len({*found}) == 1000 and max(found) > 10**11


def test_the_data_set_loads():
    dataset = Config(largest=999, train_pairs=100, eval_pairs=10, vocab_size=300).load()
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (100, 10, 10)
    assert (dataset.source_language, dataset.target_language) == ("en", "de")
    assert dataset.bleu_tokenizer == "char"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "x"}, "numbers are made, not read: data must be None, got x"),
        ({"largest": 20_998}, "take at most the 20999 numbers there are, got 20000 and 500"),
        ({"train_pairs": 0}, "train_pairs and eval_pairs must be >= 1"),
        ({"eval_pairs": 0}, "train_pairs and eval_pairs must be >= 1"),
        ({"split_seed": -1}, r"split_seed must be >= 0 and < 2\*\*32, got -1"),
        ({"split_seed": 2**32}, r"split_seed must be >= 0 and < 2\*\*32, got 4294967296"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Config(**options)
    Config(largest=20_999)


def test_an_unknown_language_is_an_error():
    with pytest.raises(ValueError, match="num2words has no language 'klingon'"):
        Config(target="klingon", train_pairs=1, eval_pairs=1).read()


def test_without_num2words_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(ImportError, match=r"maskedtrain\[text\]"):
        Config(train_pairs=1, eval_pairs=1).read()

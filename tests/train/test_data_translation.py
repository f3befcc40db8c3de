"""Loading parallel text: ids, vocabularies, what is left out, the cache."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskedtrain.data.translation import (
    Pairs,
    Ragged,
    TranslationConfig,
    TranslationDataset,
    TranslationSplit,
)
from maskedtrain.data.vocabulary import Vocabulary

GERMAN = [f"das {a} haus hat {b} türen" for a in ("rote", "große") for b in range(20)]
ENGLISH = [f"the {a} house has {b} doors" for a in ("red", "large") for b in range(20)]


def texts(**changes: Pairs) -> dict[str, Pairs]:
    return {
        "train": (GERMAN, ENGLISH),
        "val": (["das haus"], ["the house"]),
        "test": (["die tür", "türen"], ["the door", "doors"]),
        **changes,
    }


@dataclass(frozen=True)
class Given(TranslationConfig):
    """Sentences that a test gives."""

    name = "given"

    splits: Any = None

    def read(self) -> dict[str, Pairs]:
        return dict(texts() if self.splits is None else self.splits)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "maskedtrain"


def small(**options: Any) -> Given:
    return Given(**{"vocab_size": 300, **options})


def decoded(vocabulary: Vocabulary, side: Ragged) -> list[str]:
    index = np.arange(len(side))
    return [vocabulary.decode(side[index[i : i + 1]].ids.tolist()) for i in index]


def assert_ids_are_of_lines(dataset: TranslationDataset) -> None:
    for split in (dataset.train, dataset.val, dataset.test):
        assert decoded(dataset.source_vocabulary, split.source) == split.source_lines
        assert decoded(dataset.target_vocabulary, split.target) == split.target_lines


def assert_equal(one: TranslationDataset, other: TranslationDataset) -> None:
    assert one.source_vocabulary.digest == other.source_vocabulary.digest
    assert one.target_vocabulary.digest == other.target_vocabulary.digest
    for name in ("train", "val", "test"):
        first, second = getattr(one, name), getattr(other, name)
        assert first.digest == second.digest
        assert first.target_lines == second.target_lines
    assert one.notes == other.notes


# Sequences of different lengths

sequences = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=12)


@given(sequences, st.data())
def test_ragged_sequences_are_lists(lists: list[list[int]], data: st.DataObject):
    ragged = Ragged.of(iter(lists))
    assert len(ragged) == len(lists)
    assert (ragged.ids.dtype, ragged.offsets.dtype) == (np.int32, np.int64)
    assert ragged.lengths.tolist() == [len(sequence) for sequence in lists]
    places = st.integers(0, len(lists) - 1) if lists else st.nothing()
    index = np.array(data.draw(st.lists(places)), np.int64)
    chosen = [lists[i] for i in index]
    expected = Ragged.of(chosen)
    found = ragged[index]
    assert (found.ids.dtype, found.offsets.dtype) == (np.int32, np.int64)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.offsets.tolist() == expected.offsets.tolist()

    width = max(map(len, chosen), default=0) + data.draw(st.integers(0, 2))
    rows = ragged.padded(index, fill=-7, width=width)
    assert rows.dtype == np.int64 and rows.shape == (len(index), width)
    assert rows.tolist() == [row + [-7] * (width - len(row)) for row in chosen]


def test_sides_must_be_as_long():
    two, one = Ragged.of([[4], [5]]), Ragged.of([[4]])
    with pytest.raises(ValueError, match=r"as many sentences, got \[2, 1, 2, 2\]"):
        TranslationSplit(two, one, ["a", "b"], ["a", "b"])


# Loading


@pytest.mark.parametrize("vocabulary", ["joint", "shared", "separate"])
def test_ids_are_of_the_lines(vocabulary: Any):
    dataset = small(vocabulary=vocabulary).load()
    assert (dataset.name, dataset.source_language, dataset.target_language) == ("given", "de", "en")
    assert_ids_are_of_lines(dataset)
    assert dataset.train.target_lines == ENGLISH and dataset.notes == ()
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [40, 1, 2]
    assert dataset.train.mean_lengths == (
        dataset.train.source.lengths.mean() + 1,
        dataset.train.target.lengths.mean() + 1,
    )


def test_vocabularies_of_each_kind():
    joint, shared, separate = (
        small(vocabulary=kind).load() for kind in ("joint", "shared", "separate")
    )
    whole = Vocabulary.train([*GERMAN, *ENGLISH], 300)
    assert shared.source_vocabulary.digest == shared.target_vocabulary.digest == whole.digest
    for side, lines in (("source", GERMAN), ("target", ENGLISH)):
        part, own = (getattr(d, f"{side}_vocabulary") for d in (joint, separate))
        assert part.digest == whole.used_on(lines).digest
        assert own.digest == Vocabulary.train(lines, 300).digest
        assert 260 < len(part) < len(whole) == len(own) == 300


def test_nothing_but_training_sentences_is_learned_from():
    other = texts(val=(["neu neu neu"], ["new new new"]), test=(["alt alt"], ["old old"]))
    one, two = small().load(), small(splits=other).load()
    assert one.source_vocabulary.digest == two.source_vocabulary.digest
    assert_ids_are_of_lines(two)


def test_training_pairs_with_an_empty_side_are_left_out_and_counted():
    train = ([*GERMAN, "", " \t", "tür"], [*ENGLISH, "door", "doors", "\u2003"])
    dataset = small(splits=texts(train=train)).load()
    assert dataset.train.source_lines == GERMAN and dataset.train.target_lines == ENGLISH
    assert dataset.notes == ("training pairs left out: 3 with an empty side",)
    assert_ids_are_of_lines(dataset)


def test_long_training_pairs_are_left_out_and_counted():
    train = (
        [*GERMAN, "haus", "haus " * 9, "haus"],
        [*ENGLISH, "house " * 8, "house", "house " * 9],
    )
    splits = texts(train=train, test=(["haus"], [" ".join(["house"] * 50)]))
    nothing_is_long = small(splits=splits, vocab_size=320, max_length=10).load()
    assert nothing_is_long.notes == () and len(nothing_is_long.train) == 43
    dataset = small(splits=splits, vocab_size=320, max_length=9).load()
    lengths = np.maximum(nothing_is_long.train.source.lengths, nothing_is_long.train.target.lengths)
    assert lengths[40:].tolist() == [8, 9, 9]
    assert len(dataset.train) == 41 and dataset.train.source_lines == [*GERMAN, "haus"]
    assert dataset.notes == ("training pairs left out: 2 of more than 9 tokens",)
    assert dataset.train.target[np.array([40])].ids.tolist() == [
        *dataset.target_vocabulary.encode(["house " * 8])[0]
    ]
    # No sentence of an evaluation is.
    assert dataset.test.target.lengths.tolist() == [50]


def test_empty_lines_of_evaluations_stay():
    splits = texts(val=(["", "haus"], ["house", ""]), test=([""], [""]))
    dataset = small(splits=splits).load()
    assert dataset.val.source.lengths[0] == dataset.val.target.lengths[1] == 0
    assert dataset.val.source_lines == ["", "haus"] and len(dataset.test) == 1
    assert dataset.notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": texts(train=([], []))}, "given: there is no sentence to train on"),
        ({"splits": texts(train=(["", "a"], ["b", " "]))}, "there is no sentence to train on"),
        ({"max_length": 2}, r"no training pair has at most 2 tokens \(max_length\)"),
        ({"vocab_size": 259}, "vocab_size must be >= 260 .*, got 259"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"max_tokens": 200}, "max_tokens must be >= max_length = 256, got 200"),
        ({"max_length": 0}, "max_length must be >= 1, got 0"),
        ({"source": "en"}, "source and target must be two languages, got en twice"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        small(**options).load()


# The cache


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the vocabularies that were learned."""
    learned: list[int] = []
    learn = Vocabulary.train.__func__  # type: ignore[attr-defined]

    def train(cls: type[Vocabulary], lines: Any, size: int) -> Vocabulary:
        learned.append(size)
        return learn(cls, lines, size)

    monkeypatch.setattr(Vocabulary, "train", classmethod(train))
    return learned


def test_what_was_made_once_is_read(cache: Path, trainings: list[int]):
    first, again = small().load(), small().load()
    assert_equal(first, again)
    assert_ids_are_of_lines(again)
    assert trainings == [300] and len(list(cache.iterdir())) == 1
    # Batches, lengths and searches are nothing to it.
    small(max_length=30, max_tokens=99, eval_max_tokens=9, beam=2).load()
    assert trainings == [300]


def test_whatever_ids_depend_on_is_made_anew(cache: Path, trainings: list[int]):
    changes = [
        {"vocab_size": 299},
        {"vocabulary": "shared"},
        {"splits": texts(train=(GERMAN[:-1], ENGLISH[:-1]))},
        {"splits": texts(train=(GERMAN, GERMAN))},
        {"splits": texts(test=(["die tür", "tor"], ["the door", "gate"]))},
        # The same letters in other lines.
        {"splits": texts(test=(["die türto", "r"], ["the door", "gate"]))},
        # The same lines one after another, in other splits.
        {"splits": texts(val=([], []), test=(["das haus", "die tür"], ["the house", "the door"]))},
        {"splits": texts(test=([], []), val=(["das haus", "die tür"], ["the house", "the door"]))},
    ]
    small().load()
    for change in changes:
        before = len(trainings)
        assert_ids_are_of_lines(small(**change).load())
        assert len(trainings) == before + 1, change
    assert len(list(cache.iterdir())) == len(changes) + 1


def test_a_damaged_file_is_made_anew(cache: Path, trainings: list[int]):
    expected = small().load()
    (path,) = cache.iterdir()
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    flipped = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]
               for i in rng.integers(0, len(content), 10)]  # fmt: skip
    damaged = [*flipped, b"", content[:9], content[:-1], content + b"\0", content[32:]]
    for count, found in enumerate(damaged, start=2):
        path.write_bytes(found)
        assert_equal(small().load(), expected)
        assert len(trainings) == count
        assert path.read_bytes() == content


def test_the_cache_may_be_elsewhere(tmp_path: Path, cache: Path):
    small(cache=tmp_path / "mine").load()
    assert len(list((tmp_path / "mine").iterdir())) == 1 and not cache.exists()


def test_without_a_cache_there_is_a_warning(tmp_path: Path):
    (tmp_path / "file").touch()
    config = small(cache=tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="cannot write the cache folder") as caught:
        dataset = config.load()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(config.load(), dataset)
    assert_equal(replace(config, cache=None).load(), dataset)

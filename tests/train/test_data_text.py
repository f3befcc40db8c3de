"""GLUE's files, plain and compressed, and what is wrong with them; splits, vocabulary, batches."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskedtrain.data.cola import Config as CoLA
from maskedtrain.data.sst2 import Config as SST2
from maskedtrain.data.text import TextBatches, TextDataset, TextSplit
from maskedtrain.data.vocabulary import EOS, PAD, Vocabulary

pytest.importorskip("tokenizers", reason="vocabularies need tokenizers")

HEADER = "sentence\tlabel\n"


def write(path: Path, content: str) -> Path:
    data = content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def sst2(folder: Path, train: str, dev: str = "fine\t1\n", suffix: str = "") -> SST2:
    for name, rows in (("train", train), ("dev", dev)):
        write(folder / f"{name}.tsv{suffix}", HEADER + rows)
    return SST2(data=folder, vocab_size=300)


def cola(folder: Path, train: str, dev: str = "x\t1\t\tFine.\n") -> CoLA:
    for name, rows in (("train", train), ("dev", dev)):
        write(folder / f"{name}.tsv", rows)
    return CoLA(data=folder, vocab_size=300)


# Files


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "SST-2", "glue/SST-2"])
def test_sst2_has_a_header_and_two_columns(place: str, suffix: str, tmp_path: Path):
    sst2(tmp_path / place, "good film \t1\r\nbad\t0\n", "so so\t0\n", suffix)
    found = SST2(data=tmp_path).read()
    assert found == {"train": (["good film ", "bad"], [1, 0]), "test": (["so so"], [0])}


def test_cola_has_no_header_and_the_sentence_last(tmp_path: Path):
    config = cola(tmp_path, "gj04\t1\t\tFine.\nks08\t0\t*\tFine not is.\n", "a\t0\t*\tIs.\n")
    assert config.read() == {"train": (["Fine.", "Fine not is."], [1, 0]), "test": (["Is."], [0])}
    assert config.score == "matthews" and SST2.score == "accuracy"


def test_quotation_marks_are_characters(tmp_path: Path):
    lines = ['"', '"good" film', 'say "yes', "' it 's"]
    rows = "".join(f"{line}\t1\n" for line in lines)
    assert sst2(tmp_path, rows).read()["train"][0] == lines


def test_the_folder_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sst2(tmp_path / "SST-2", "good\t1\n")
    monkeypatch.setenv("MASKEDTRAIN_DATA", str(tmp_path))
    assert SST2().read()["train"] == (["good"], [1])
    monkeypatch.delenv("MASKEDTRAIN_DATA")
    with pytest.raises(ValueError, match="sst2 is read from files: pass their folder or set MASK"):
        SST2().read()


def test_sides_come_from_one_folder(tmp_path: Path):
    sst2(tmp_path / "SST-2", "good\t1\n")
    write(tmp_path / "dev.tsv", HEADER + "of another task\t0\n")
    assert SST2(data=tmp_path).read()["test"] == (["fine"], [1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("good\t1\nbad\t2\n", r"train\.tsv, line 3: the label must be one of 0, 1, got '2'"),
        ("good\t1\nbad\n", r"train\.tsv, line 3: must have at least 2 columns, got 1"),
        ("good\t1\n\nbad\t0\n", r"train\.tsv, line 3: must have at least 2 columns, got 1"),
        ("a tab\tin it\t1\n", r"train\.tsv, line 2: the label must be one of 0, 1, got 'in it'"),
        ("", r"train\.tsv holds no sentence"),
    ],
)
def test_bad_rows_are_named(rows: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        sst2(tmp_path, rows).read()


def test_other_headers_are_refused(tmp_path: Path):
    config = sst2(tmp_path, "good\t1\n")
    write(tmp_path / "dev.tsv", "good\t1\n")
    expected = r"dev\.tsv, line 1: the columns must be \('sentence', 'label'\), got \('good', '1'\)"
    with pytest.raises(ValueError, match=expected):
        config.read()
    write(tmp_path / "dev.tsv", "")
    with pytest.raises(ValueError, match=r"dev\.tsv, line 1: the columns must be .*, got \(\)"):
        config.read()
    with pytest.raises(ValueError, match=r"line 1: the label must be one of 0, 1, got 'label'"):
        cola(tmp_path, "source\tlabel\tmark\tsentence\n").read()


def test_bytes_that_are_no_text_are_named(tmp_path: Path):
    config = sst2(tmp_path, "good\t1\n")
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\ngood\t1\nb\xe4d\t0\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 3: not UTF-8"):
        config.read()


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"lacks train\.tsv \(or \.gz\) of SST-2"):
        SST2(data=tmp_path).read()
    sst2(tmp_path, "good\t1\n")
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks dev\.tsv \(or \.gz\) of SST-2"):
        SST2(data=tmp_path).read()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        SST2(data=tmp_path / "nowhere").read()


# Splits and vocabulary

WORDS = ["good", "bad", "film", "plot", "dull", "witty", "never", "ever", "seen", "it"]


@pytest.fixture
def numbered(tmp_path: Path) -> SST2:
    """40 training sentences that are all different, with labels in turn, and 3 of the test."""
    rows = "".join(f"{WORDS[i % 10]} {WORDS[i // 10]} {i}\t{i % 2}\n" for i in range(40))
    config = sst2(tmp_path, rows, "fine\t1\nbad\t0\nfilm\t1\n")
    return dataclasses.replace(config, val_sentences=10)


def rows_of(split: TextSplit) -> list[tuple[str, int]]:
    assert split.target_lines == [str(label) for label in split.labels]
    return list(zip(split.source_lines, split.labels.tolist(), strict=True))


def test_validation_is_held_out_of_training(numbered: SST2):
    dataset = numbered.load()
    train, val, test = (rows_of(s) for s in (dataset.train, dataset.val, dataset.test))
    assert (len(train), len(val), len(test)) == (30, 10, 3)
    lines, labels = numbered.read()["train"]
    assert sorted(train + val) == sorted(zip(lines, labels, strict=True))
    assert test == [("fine", 1), ("bad", 0), ("film", 1)]
    # Drawn, not cut off.
    assert val != sorted(val, key=lambda row: lines.index(row[0]))


def test_ids_are_those_of_the_lines(numbered: SST2):
    dataset = numbered.load()
    for split in (dataset.train, dataset.val, dataset.test):
        ids = dataset.vocabulary.encode(split.source_lines)
        assert split.source.lengths.tolist() == [len(row) for row in ids]
        assert split.source.ids.tolist() == [i for row in ids for i in row]
        assert split.target.lengths.tolist() == [1] * len(split)


def test_the_split_is_a_function_of_its_seed(numbered: SST2):
    one = numbered.load()
    np.random.seed(5)  # noqa: NPY002 (the point is that it does not matter)
    same, other = numbered.load(), dataclasses.replace(numbered, split_seed=1).load()
    for name in ("train", "val", "test"):
        assert getattr(same, name).digest == getattr(one, name).digest
        assert rows_of(getattr(same, name)) == rows_of(getattr(one, name))
    assert same.vocabulary.digest == one.vocabulary.digest
    assert sorted(rows_of(other.val)) != sorted(rows_of(one.val))
    assert rows_of(other.test) == rows_of(one.test)


def test_the_split_stays_what_it_was(numbered: SST2):
    """A run of one version is evaluated by another on sentences that it was not trained on."""
    found = [int(line.split()[-1]) for line in numbered.load().val.source_lines]
    assert found == FIRST_TEN


# The first ten of RandomState(0).permutation(40).
FIRST_TEN = [22, 20, 25, 4, 10, 15, 28, 11, 18, 29]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True))
def test_parts_cover_the_training_side_without_overlap(numbered_load: Any, cuts: list[float]):
    load, whole = numbered_load
    ends = sorted({0.0, *cuts, 1.0})
    found: list[tuple[str, int]] = []
    for start, stop in itertools.pairwise(ends):
        if round(30 * start) == round(30 * stop):
            with pytest.raises(ValueError, match="leave none to train on"):
                load((start, stop))
            continue
        part: TextDataset = load((start, stop))
        found += rows_of(part.train)
        # Everything else is that of the whole.
        assert part.vocabulary.digest == whole.vocabulary.digest
        assert part.val.digest == whole.val.digest and part.test.digest == whole.test.digest
    assert found == rows_of(whole.train)


@pytest.fixture(scope="module")
def numbered_load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = "".join(f"{WORDS[i % 10]} {WORDS[i // 10]} {i}\t{i % 2}\n" for i in range(40))
    config = sst2(tmp_path_factory.mktemp("parts"), rows)

    def load(part: tuple[float, float]) -> TextDataset:
        return dataclasses.replace(config, val_sentences=10, train_part=part).load()

    return load, load((0.0, 1.0))


def test_the_vocabulary_is_learned_on_what_is_not_held_out(tmp_path: Path):
    rows = "".join(f"{word} {word} {word}\t0\n" for word in WORDS[:4])
    config = dataclasses.replace(sst2(tmp_path, rows), val_sentences=1)
    dataset = config.load()
    (held,) = dataset.val.source_lines
    expected = Vocabulary.train([row for row in config.read()["train"][0] if row != held], 300)
    assert dataset.vocabulary.digest == expected.digest
    with_held = Vocabulary.train(config.read()["train"][0], 300)
    assert dataset.vocabulary.digest != with_held.digest


def test_a_vocabulary_may_be_given(numbered: SST2):
    given = Vocabulary.train(["zzz"], 260)
    dataset = numbered.load(given)
    assert dataset.vocabulary is given
    assert dataset.test.source.lengths.tolist() == [len(f" {w}") for w in ("fine", "bad", "film")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"eval_max_tokens": 0}, "eval_max_tokens must be >= 1, got 0"),
        ({"val_sentences": 0}, "val_sentences must be >= 1, got 0"),
        (
            {"train_part": (0.5, 0.5)},
            r"train_part must be two rising shares in \[0, 1\], got 0.5 a",
        ),
        ({"train_part": (-0.1, 0.5)}, "train_part must be two rising shares"),
        ({"train_part": (0.0, 1.5)}, "train_part must be two rising shares"),
        ({"split_seed": -1}, r"split_seed must be >= 0 and < 2\*\*32, got -1"),
        ({"split_seed": 2**32}, "split_seed must be >= 0"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SST2(**options)


def test_too_few_sentences_are_an_error(numbered: SST2):
    assert len(dataclasses.replace(numbered, val_sentences=39).load().train) == 1
    with pytest.raises(
        ValueError,
        match=r"sst2: of 40 sentences, 40 to validate on \(val_sentences\) and train_part "
        r"\(0.0, 1.0\) leave none to train on",
    ):
        dataclasses.replace(numbered, val_sentences=40).load()


# Batches

ids = st.lists(st.integers(4, 99), max_size=12)
sentences = st.lists(st.tuples(ids, st.integers(0, 2)), min_size=1, max_size=40)


def make_split(rows: list[tuple[list[int], int]]) -> TextSplit:
    """Sentences of these ids, whatever their lines."""

    class Ids(Vocabulary):
        def __init__(self) -> None: ...

        def encode_each(self, lines: Any) -> Any:
            yield from lines

    return TextSplit.of([row for row, _ in rows], [label for _, label in rows], Ids())  # pyright: ignore[reportArgumentType]


def test_a_batch_on_worked_numbers():
    split = make_split([([7], 1), ([5, 6, 8], 0), ([], 2)])
    batches: Any = TextBatches(split, 100)
    ((tokens, labels),) = batches
    assert tokens.tolist() == [[5, 6, 8, EOS], [7, EOS, PAD, PAD], [EOS, PAD, PAD, PAD]]
    assert labels.tolist() == [0, 1, 2]
    assert tokens.dtype == labels.dtype == torch.int64


@given(sentences, st.integers(1, 60), st.booleans())
def test_every_sentence_comes_once_within_the_budget(
    rows: list[tuple[list[int], int]], max_tokens: int, shuffle: bool
):
    batches: Any = TextBatches(make_split(rows), max_tokens, shuffle=shuffle)
    found: list[tuple[list[int], int]] = []
    for tokens, labels in batches:
        count, length = tokens.shape
        assert labels.shape == (count,)
        # One that is too long for the budget is a batch by itself.
        assert count == 1 or count * max(length, 2) <= max_tokens
        found += [
            (sentence(row), label) for row, label in zip(tokens, labels.tolist(), strict=True)
        ]
    assert sorted(found) == sorted(rows)


def sentence(row: Tensor) -> list[int]:
    """The ids before eos; asserts that nothing but padding comes after it."""
    end = row.tolist().index(EOS)
    assert (row[end + 1 :] == PAD).all()
    return row[:end].tolist()


def test_batches_go_on_where_they_were():
    split = make_split([([4 + i] * (i % 5), i % 2) for i in range(30)])

    def batches() -> TextBatches:
        return TextBatches(split, 12, seed=3, shuffle=True)

    first = batches()
    stream = first.stream()
    for _ in range(len(first) + 2):
        next(stream)
    second = batches()
    second.load_state_dict(first.state_dict())
    again = second.stream()
    for _ in range(2 * len(first)):
        (tokens, labels), (others, other_labels) = next(stream), next(again)
        assert torch.equal(tokens, others) and torch.equal(labels, other_labels)


# GLUE itself

needs_glue = pytest.mark.skipif(
    not (Path(os.environ.get("MASKEDTRAIN_DATA", "/nowhere")) / "glue").is_dir(),
    reason="MASKEDTRAIN_DATA names no folder with GLUE's files in glue/",
)


@needs_glue
def test_the_whole_of_glue_is_read():
    found = SST2().read()
    assert [len(found[side][0]) for side in ("train", "test")] == [67_349, 872]
    assert sum(found["test"][1]) == 444
    found = CoLA().read()
    assert [len(found[side][0]) for side in ("train", "test")] == [8_551, 1_043]
    assert all(line for lines, _ in found.values() for line in lines)

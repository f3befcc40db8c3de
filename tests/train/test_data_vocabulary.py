"""Vocabularies: every line comes back, sizes, parts of a vocabulary, files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskedtrain.data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary

TEXT = [
    "the house at the lake is the largest house",
    "das Haus am See ist das größte Haus",
    # What looks like a special token, often enough to be merged into one.
    *["<s> </s> <pad> <unk> <s></s>"] * 20,
]
VOCABULARY = Vocabulary.train(TEXT, 300)

# Any Unicode that a UTF-8 file can hold.
lines = st.text(st.characters(codec="utf-8"), max_size=30)


@given(lines)
def test_every_line_comes_back(line: str):
    (ids,) = VOCABULARY.encode([line])
    assert VOCABULARY.decode(ids) == " ".join(line.split())
    assert all(UNK < i < len(VOCABULARY) for i in ids)


@pytest.mark.parametrize(
    "line",
    [
        "",
        " ",
        "<s>",
        "</s> <pad>",
        "a\u2028b\u00a0c\u0085d\x1ce",
        "👩\u200d👩\u200d👧",
        "e\u0301 é",
        "\0",
    ],
)
def test_lines_that_others_lose_come_back(line: str):
    (ids,) = VOCABULARY.encode([line])
    assert VOCABULARY.decode(ids) == " ".join(line.split())
    assert not {PAD, BOS, EOS, UNK} & {*ids}


def test_the_first_ids_are_special():
    known = json.loads(VOCABULARY.to_bytes())["model"]["vocab"]
    assert [known[token] for token in ("<pad>", "<s>", "</s>", "<unk>")] == [PAD, BOS, EOS, UNK]
    assert [PAD, BOS, EOS, UNK] == [0, 1, 2, 3]
    (ids,) = VOCABULARY.encode(["the house"])
    assert VOCABULARY.decode([BOS, *ids, EOS, PAD, PAD]) == "the house"


def test_what_is_decoded_is_one_line():
    known = json.loads(VOCABULARY.to_bytes())["model"]["vocab"]
    (word,) = VOCABULARY.encode(["lake"])
    # How byte-level BPE writes line feed and carriage return.
    breaks = [known[chr(0x100 + byte)] for byte in (0x0A, 0x0D)]
    assert VOCABULARY.decode([*breaks, *word, *breaks, *word]) == "lake lake"


def test_bytes_that_are_no_character_are_replaced():
    (ids,) = VOCABULARY.encode(["ü"])
    assert len(ids) > 1
    assert VOCABULARY.decode(ids[:-1]) == "\ufffd"


def test_many_lines_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch):
    expected = [VOCABULARY.encode([line])[0] for line in TEXT]
    monkeypatch.setattr("maskedtrain.data.vocabulary.CHUNK", 4)
    assert VOCABULARY.encode(TEXT) == expected
    assert VOCABULARY.encode([]) == []


def test_frequent_words_become_tokens():
    assert len(VOCABULARY.encode(["the house"])[0]) == 2
    assert len(VOCABULARY) == 300


def test_a_vocabulary_ends_where_the_lines_do():
    assert len(Vocabulary.train(["ab ab"], 10_000)) == 4 + 256 + 2


def test_the_same_lines_give_the_same_vocabulary():
    again = Vocabulary.train(iter(TEXT), 300)
    assert again.to_bytes() == VOCABULARY.to_bytes()
    assert again.digest == VOCABULARY.digest != Vocabulary.train(TEXT, 299).digest


def test_bytes_are_the_least():
    assert len(Vocabulary.train(["aaaa"], 260)) == 260
    with pytest.raises(ValueError, match=r"vocab_size must be >= 260 \(the 256 bytes.*got 259"):
        Vocabulary.train(["aaaa"], 259)


# Parts


def spelled(vocabulary: Vocabulary, line: str) -> list[str]:
    tokens = json.loads(vocabulary.to_bytes())["model"]["vocab"]
    names = {i: token for token, i in tokens.items()}
    return [names[i] for i in vocabulary.encode([line])[0]]


words = st.lists(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=8).map(" ".join)


@given(st.lists(words, min_size=1, max_size=6), st.lists(words, min_size=1, max_size=6), lines)
def test_a_part_splits_its_lines_as_the_whole(first: list[str], second: list[str], other: str):
    whole = Vocabulary.train([*first, *second], 280)
    part = whole.used_on(first)
    assert len(part) <= len(whole)
    for line in first:
        assert spelled(part, line) == spelled(whole, line)
    (ids,) = part.encode([other])
    assert part.decode(ids) == " ".join(other.split())
    assert all(UNK < i < len(part) for i in ids)


def test_a_part_has_no_tokens_of_the_other_side():
    whole = Vocabulary.train(["house house", "Haus Haus"], 280)
    english, german = whole.used_on(["house"]), whole.used_on(["Haus"])
    assert len(english) < len(whole) > len(german)
    assert spelled(english, "house") == ["Ġhouse"] and len(spelled(english, "Haus")) > 1
    assert spelled(german, "Haus") == ["ĠHaus"] and len(spelled(german, "house")) > 1
    # Ids are without gaps, so that no row of an embedding is for nothing.
    known = json.loads(english.to_bytes())["model"]["vocab"]
    assert sorted(known.values()) == list(range(len(english)))


# Files


def test_a_saved_vocabulary_is_the_same(tmp_path: Path):
    path = tmp_path / "source.json"
    VOCABULARY.save(path)
    loaded = Vocabulary.load(path)
    assert loaded.digest == VOCABULARY.digest and len(loaded) == len(VOCABULARY)
    line = "das größte <s> 👧"
    assert loaded.encode([line]) == VOCABULARY.encode([line])


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", VOCABULARY.to_bytes()[:-9]])
def test_a_damaged_file_is_an_error(content: bytes | None, tmp_path: Path):
    path = tmp_path / "source.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"source\.json is missing or damaged"):
        Vocabulary.load(path)


def test_without_tokenizers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"maskedtrain\[text\]"):
        Vocabulary.train(TEXT, 300)
    with pytest.raises(ImportError, match=r"maskedtrain\[text\]"):
        Vocabulary.from_bytes(VOCABULARY.to_bytes())

"""Parallel text in files of every form, and what is wrong with it; splits that share nothing."""

from __future__ import annotations

import gzip
import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskedtrain.data._parallel_text import (
    find_pair,
    read_columns,
    read_lines,
    read_pair,
    split_apart,
    undo_bpe,
)


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# Lines

# What str.splitlines takes for ends of lines.
ODD = "a\u2028b\u0085c\x0bd\x0ce\x1cf\rg"


@pytest.mark.parametrize("name", ["text.de", "text.de.gz"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("eins\nzwei\n", ["eins", "zwei"]),
        ("eins\nzwei", ["eins", "zwei"]),
        ("", []),
        ("\n", [""]),
        ("eins\n\n\nzwei\n\n", ["eins", "", "", "zwei", ""]),
        ("eins\r\nzwei\r\n", ["eins", "zwei"]),
        ("\ufeffeins\nzwei\n", ["eins", "zwei"]),
        (f"{ODD}\n\ufeff{ODD}\n", [ODD, f"\ufeff{ODD}"]),
    ],
)
def test_only_a_line_feed_ends_a_line(name: str, content: str, lines: list[str], tmp_path: Path):
    assert read_lines(write(tmp_path / name, content)) == lines


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\ufeff"))))
def test_lines_come_back(tmp_path_factory: pytest.TempPathFactory, lines: list[str]):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    assert read_lines(write(path, "".join(line + "\n" for line in lines))) == lines


@pytest.mark.parametrize("name", ["text.de", "text.de.gz"])
def test_other_bytes_are_an_error_with_their_line(name: str, tmp_path: Path):
    path = write(tmp_path / name, b"\xef\xbb\xbfeins\nzwei\nf\xfcnf\n")
    with pytest.raises(ValueError, match=rf"{name}, line 3: not UTF-8 \(invalid start byte\)"):
        read_lines(path)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-9], lambda b: b"eins\n", lambda b: b[:15] + b"\xff\xff" + b[17:]],
    ids=["cut", "not gzip", "changed"],
)
def test_damaged_compression_is_an_error(damage: Callable[[bytes], bytes], tmp_path: Path):
    path = tmp_path / "text.de.gz"
    path.write_bytes(damage(gzip.compress(b"eins\nzwei\n" * 100)))
    with pytest.raises(ValueError, match=r"text\.de\.gz is damaged"):
        read_lines(path)


# Pairs


def test_a_pair_may_be_of_plain_and_compressed_files(tmp_path: Path):
    write(tmp_path / "train.de.gz", "eins\n")
    write(tmp_path / "train.en", "one\n")
    assert read_pair(tmp_path, ["train"], "de", "en") == (["eins"], ["one"])
    assert read_pair(tmp_path, ["train"], "en", "de") == (["one"], ["eins"])
    # The plain file comes first.
    write(tmp_path / "train.de", "zwei\n")
    assert read_pair(tmp_path, ["train"], "de", "en") == (["zwei"], ["one"])


def test_both_sides_are_of_one_name(tmp_path: Path):
    for name in ("val.de", "val.en", "dev.de", "dev.en"):
        write(tmp_path / name, f"{name}\n")
    names = ["valid", "val", "dev"]
    assert read_pair(tmp_path, names, "de", "en") == (["val.de"], ["val.en"])
    write(tmp_path / "valid.en", "valid.en\n")
    with pytest.raises(FileNotFoundError, match=r"lacks valid\.de or valid\.de\.gz$"):
        read_pair(tmp_path, names, "de", "en")
    with pytest.raises(FileNotFoundError, match=r"lacks valid\.de or valid\.de\.gz$"):
        read_pair(tmp_path, names, "en", "de")


def test_missing_files_are_an_error(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"lacks valid\.de and \.en, val\.de and \.en \(or \.gz\)"
    ):
        find_pair(tmp_path, ["valid", "val"], "de", "en")


def test_sides_of_different_length_are_an_error(tmp_path: Path):
    write(tmp_path / "train.de", "eins\n" * 1200)
    write(tmp_path / "train.en", "one\n" * 1201)
    with pytest.raises(
        ValueError, match=r"train\.de and .*train\.en must have as many lines, got 1,200 and 1,201"
    ):
        read_pair(tmp_path, ["train"], "de", "en")


def test_subwords_become_words():
    split = (["das gr@@ ö@@ ßte h@@ aus @-@", "cu@@"], ["a@b @@", ""])
    assert undo_bpe(split) == (["das größte haus @-@", "cu"], ["a@b ", ""])


# Columns

TSV = "one\teins\tx\ntwo\tzwei\ty\n\tnull\tz\n"


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.tsv.gz", "pairs.txt"])
def test_columns(name: str, tmp_path: Path):
    path = write(tmp_path / name, TSV)
    assert read_columns(path, 1, 0) == (["eins", "zwei", "null"], ["one", "two", ""])
    assert read_columns(path, 0, 2) == (["one", "two", ""], ["x", "y", "z"])


def write_zip(path: Path, **texts: str | bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            archive.writestr(name.replace("__", "."), text)
    return path


def test_columns_in_an_archive(tmp_path: Path):
    path = write_zip(tmp_path / "deu-eng.zip", deu__txt=TSV, _about__txt="about", more__md="#")
    assert read_columns(path, 1, 0) == (["eins", "zwei", "null"], ["one", "two", ""])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a__txt": TSV, "b__tsv": TSV}, r"must hold one \.tsv or \.txt file, got a\.txt, b\.tsv"),
        ({"a__md": TSV}, r"must hold one \.tsv or \.txt file, got none"),
        ({"a__txt": b"one\teins\ntw\xff\tzwei\n"}, r"p\.zip: a\.txt, line 2: not UTF-8"),
        ({"a__txt": "one\teins\ntwo\n"}, r"p\.zip, line 2: must have at least 2 columns, got 1"),
    ],
)
def test_bad_archives(texts: dict[str, str | bytes], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        read_columns(write_zip(tmp_path / "p.zip", **texts), 1, 0)


def test_a_damaged_archive_is_an_error(tmp_path: Path):
    path = write_zip(tmp_path / "p.zip", a__txt=TSV)
    path.write_bytes(path.read_bytes().replace(b"zwei", b"drei"))
    with pytest.raises(ValueError, match=r"p\.zip is damaged: Bad CRC-32"):
        read_columns(path, 1, 0)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"p\.zip is damaged"):
        read_columns(path, 1, 0)


# Splits

SHARES = {"val": 0.2, "test": 0.3}
word = st.sampled_from([f"{letter}{i}" for letter in "ab" for i in range(30)])


def normal(line: str) -> str:
    return " ".join(line.lower().split())


@given(st.lists(st.tuples(word, word), min_size=1, max_size=60), st.randoms())
def test_no_sentence_is_in_two_splits(pairs: list[tuple[str, str]], random):
    # The same sentences in other guises.
    disguises = [str.upper, str.title, lambda s: f" {s}  ", str]
    given_pairs = [(random.choice(disguises)(a), random.choice(disguises)(b)) for a, b in pairs]
    source, target = map(list, zip(*given_pairs, strict=True))
    found = split_apart((source, target), SHARES)
    assert found.keys() == {"val", "test", "train"}
    together = [pair for split in found.values() for pair in zip(*split, strict=True)]
    assert sorted(together) == sorted(given_pairs)
    for one, other in itertools.combinations(found.values(), 2):
        for side in range(2):
            assert not {*map(normal, one[side])} & {*map(normal, other[side])}


@given(st.lists(st.tuples(word, word), min_size=1, max_size=60), st.randoms())
def test_splits_do_not_depend_on_the_order(pairs: list[tuple[str, str]], random):
    shuffled = random.sample(pairs, len(pairs))
    first, second = (
        split_apart(([a for a, _ in lines], [b for _, b in lines]), SHARES)
        for lines in (pairs, shuffled)
    )
    for name in first:
        assert sorted(zip(*first[name], strict=True)) == sorted(zip(*second[name], strict=True))


def test_splits_have_their_shares():
    lines = [f"sentence {i}" for i in range(20_000)]
    found = split_apart((lines, lines), SHARES)
    assert abs(len(found["val"][0]) / 20_000 - 0.2) < 0.01
    assert abs(len(found["test"][0]) / 20_000 - 0.3) < 0.01
    # In their order.
    kept = {*found["train"][0]}
    assert found["train"][0] == [line for line in lines if line in kept]


def test_a_side_is_not_the_other():
    """A line that is a source here and a target there connects nothing."""
    lines = [f"{i}" for i in range(1000)]
    found = split_apart((lines, lines[1:] + lines[:1]), SHARES)
    assert all(len(split[0]) > 100 for split in found.values())


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_group_is_for_training(seed: int):
    source = [f"{seed} {i}" for i in range(30)]
    target = ["yes"] * 10 + [f"{i}" for i in range(20)]
    found = split_apart((source, target), {"val": 0.5, "test": 0.49})
    assert found["train"][1].count("yes") == 10

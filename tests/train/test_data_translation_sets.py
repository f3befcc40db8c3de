"""Multi30k, IWSLT14, WMT17, one's own text, the hub: where they are looked for and what is read."""

from __future__ import annotations

import gzip
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskedtrain import data
from maskedtrain.data import huggingface, iwslt14, multi30k, parallel, wmt17
from maskedtrain.data.translation import Pairs, TranslationConfig

DATA = os.environ.get("MASKEDTRAIN_DATA", "")
needs_multi30k = pytest.mark.skipif(
    not Path(DATA, "multi30k", "raw", "train.de.gz").exists(),
    reason="MASKEDTRAIN_DATA holds no multi30k",
)
needs_tatoeba = pytest.mark.skipif(
    not Path(DATA, "tatoeba_deu_eng", "deu-eng.zip").exists(),
    reason="MASKEDTRAIN_DATA holds no tatoeba_deu_eng",
)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and no data in the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MASKEDTRAIN_DATA", raising=False)


def write(folder: Path, *names: str, end: str = "") -> Path:
    """Files of two lines for each split's name, in German and English."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for language in ("de", "en"):
            content = f"{name} {language}\n\n".encode()
            path = folder / f"{name}.{language}{end}"
            path.write_bytes(gzip.compress(content) if end else content)
    return folder


def expected(*names: str, source: str = "de", target: str = "en") -> dict[str, Pairs]:
    return {
        split: ([f"{name} {source}", ""], [f"{name} {target}", ""])
        for split, name in zip(("train", "val", "test"), names, strict=True)
    }


def test_all_are_found():
    names = {"numbers", "multi30k", "iwslt14", "wmt17", "parallel", "huggingface"}
    found = data.configs()
    assert names <= found.keys()
    for name in names:
        assert issubclass(found[name], TranslationConfig) and found[name].task == "translation"


@pytest.mark.parametrize("config", [multi30k, iwslt14, wmt17, parallel])
def test_without_a_place_the_error_says_so(config: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=r"pass their folder or set MASKEDTRAIN_DATA"):
        config.Config().load()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        config.Config(data=tmp_path / "nowhere").load()
    with pytest.raises(FileNotFoundError, match=r"lacks train\.\w\w and"):
        config.Config(data=tmp_path).load()


# Multi30k

MULTI30K = ("train", "val", "test_2016_flickr")


@pytest.mark.parametrize("place", ["", "raw", "multi30k/raw"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_multi30k(place: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "root" / place, *MULTI30K, end=end)
    assert multi30k.Config(data=tmp_path / "root").read() == expected(*MULTI30K)
    monkeypatch.setenv("MASKEDTRAIN_DATA", str(tmp_path / "root"))
    assert multi30k.Config().read() == expected(*MULTI30K)
    swapped = multi30k.Config(source="en", target="de").read()
    assert swapped == expected(*MULTI30K, source="en", target="de")


def test_multi30k_has_several_test_sets(tmp_path: Path):
    write(tmp_path, *MULTI30K, "test_2017_mscoco")
    found = multi30k.Config(data=tmp_path, test_set="test_2017_mscoco").read()
    assert found == expected("train", "val", "test_2017_mscoco")
    with pytest.raises(FileNotFoundError, match=r"lacks test_2019\.de and \.en"):
        multi30k.Config(data=tmp_path, test_set="test_2019").read()


@needs_multi30k
@pytest.mark.timeout(120)
def test_real_multi30k():
    dataset = multi30k.Config(data=Path(DATA)).load()
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [29_000, 1_014, 1_000]
    assert dataset.notes == ()
    assert 3000 < len(dataset.target_vocabulary) < len(dataset.source_vocabulary) < 8000
    assert dataset.val.source_lines[0] == (
        "Eine Gruppe von Männern lädt Baumwolle auf einen Lastwagen"
    )
    assert dataset.val.target_lines[0] == "A group of men are loading cotton onto a truck"
    split, vocabulary = dataset.train, dataset.source_vocabulary
    for i in range(0, 29_000, 100):
        ids = split.source.ids[split.source.offsets[i] : split.source.offsets[i + 1]]
        assert vocabulary.decode(ids.tolist()) == " ".join(split.source_lines[i].split())


# What fairseq prepares

PREPARED = [
    (iwslt14.Config, "iwslt14.tokenized.de-en", "de", "en"),
    (wmt17.Config, "wmt17_en_de", "en", "de"),
]


@pytest.mark.parametrize(("config", "folder", "source", "target"), PREPARED)
@pytest.mark.parametrize("inside", [True, False])
def test_prepared(config: Any, folder: str, source: str, target: str, inside: bool, tmp_path: Path):
    write(tmp_path / folder, "train", "valid", "test")
    place = tmp_path / folder if inside else tmp_path
    found = config(data=place).read()
    assert found == expected("train", "valid", "test", source=source, target=target)


@pytest.mark.parametrize(("config", "folder", "source", "target"), PREPARED)
def test_prepared_words_are_whole(
    config: Any, folder: str, source: str, target: str, tmp_path: Path
):
    write(tmp_path, "train", "valid", "test")
    (tmp_path / f"test.{target}").write_text("das gr@@ ö@@ ßte\nh@@ aus\n")
    dataset = config(data=tmp_path).load()
    assert dataset.test.target_lines == ["das größte", "haus"]
    assert dataset.bleu_tokenizer == "none"
    assert dataset.notes == ("training pairs left out: 1 with an empty side",)
    assert (dataset.source_language, dataset.target_language) == (source, target)


# One's own text


@pytest.mark.parametrize("val", ["valid", "val", "dev"])
def test_a_folder(val: str, tmp_path: Path):
    write(tmp_path, "train", val, "test")
    assert parallel.Config(data=tmp_path).read() == expected("train", val, "test")


def test_a_file_of_columns(tmp_path: Path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"one {i}\teins {i}\t{i}\n" for i in range(500)))
    config = parallel.Config(data=path, val_share=0.1, test_share=0.2)
    found = config.read()
    assert 20 < len(found["val"][0]) < 80 < len(found["test"][0]) < 120
    pairs = sorted(pair for split in found.values() for pair in zip(*split, strict=True))
    assert pairs == sorted((f"eins {i}", f"one {i}") for i in range(500))
    assert len(config.load().test) == len(found["test"][0])


def test_too_short_a_file_is_an_error(tmp_path: Path):
    path = tmp_path / "pairs.tsv"
    path.write_text("one\teins\ntwo\tzwei\n")
    with pytest.raises(ValueError, match=r"pairs\.tsv: 2 pairs are too few: \w+ got none"):
        parallel.Config(data=path).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_column": -1}, "columns must be >= 0, got -1 and 0"),
        ({"source_column": 0}, "columns must be two, got 0 twice"),
        ({"val_share": 0.0}, "val_share and test_share must be > 0"),
        ({"val_share": 0.5, "test_share": 0.5}, "leave some to train on"),
    ],
)
def test_mistakes_of_columns(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        parallel.Config(**options)


@needs_tatoeba
@pytest.mark.timeout(120)
def test_real_tatoeba():
    path = Path(DATA, "tatoeba_deu_eng", "deu-eng.zip")
    found = parallel.Config(data=path).read()
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if not name.startswith("_")]
        count = archive.read(name).count(b"\n")
    assert sum(len(source) for source, _ in found.values()) == count
    assert all(0.005 < len(found[name][0]) / count < 0.015 for name in ("val", "test"))
    held_out = [{line.lower() for line in found[name][1]} for name in ("val", "test")]
    assert not held_out[0] & held_out[1]
    assert not (held_out[0] | held_out[1]) & {line.lower() for line in found["train"][1]}


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module datasets that has one set; ``asked`` is what was asked of it."""
    module = SimpleNamespace(asked=[], rows=[])

    def load_dataset(path: str, subset: str | None, cache_dir: str | None) -> Any:
        module.asked.append((path, subset, cache_dir))
        return {"train": module.rows * 2, "validation": module.rows, "test": module.rows}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return module


@pytest.mark.parametrize("nested", [True, False])
def test_a_set_of_the_hub(nested: bool, hub: SimpleNamespace):
    texts = [{"de": "eins", "en": "one"}, {"de": "zwei\nzeilen", "en": None, "fr": "deux"}]
    hub.rows = [{"id": 0, "translation": text} if nested else text for text in texts]
    pairs = ["eins", "zwei zeilen"], ["one", ""]
    config = huggingface.Config(path="wmt/wmt17", subset="de-en", data=Path("kept"))
    assert config.read() == {
        "train": (pairs[0] * 2, pairs[1] * 2),
        "val": pairs,
        "test": pairs,
    }
    assert hub.asked == [("wmt/wmt17", "de-en", "kept")]
    dataset = huggingface.Config().load()
    assert hub.asked[1] == ("bentrevett/multi30k", None, None)
    assert len(dataset.train) == 2 and len(dataset.test) == 2


def test_what_a_set_of_the_hub_may_lack(hub: SimpleNamespace):
    hub.rows = [{"translation": {"de": "eins", "en": "one"}}]
    with pytest.raises(ValueError, match=r"has no language 'fr', but de, en"):
        huggingface.Config(target="fr").read()
    with pytest.raises(ValueError, match=r"has no split 'dev', but train, validation, test"):
        huggingface.Config(val_split="dev").read()


def test_without_datasets_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"maskedtrain\[hub\]"):
        huggingface.Config().load()

"""LibSVM's format: indices, labels, compression, splits, scaling, and lines that are no rows."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskedtrain.data.images import BatchLoader, ImageDataset, ImageSplit
from maskedtrain.data.libsvm import Config

datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def write(path: Path, content: str) -> Path:
    path.write_bytes(PACK.get(path.suffix, bytes)(content.encode()))
    return path


def plain(path: Path, content: str, **options: Any) -> ImageDataset:
    """The rows as they are, a half of each class to test on."""
    options = {"scale": False, "val_share": 0.5, "test_share": 0.5, **options}
    return Config(data=write(path, content), **options).load()


def splits(dataset: ImageDataset) -> list[ImageSplit]:
    return [dataset.train, dataset.val, dataset.test]


def rows_of(*parts: ImageSplit) -> list[tuple[list[float], int]]:
    """Features and labels of all rows, in an order of their own."""
    return sorted(
        (row, label)
        for part in parts
        for row, label in zip(part.images.flatten(1).tolist(), part.labels.tolist(), strict=True)
    )


# Four rows of each of two classes, features 1 to 3; the last feature's zeros are left out.
EIGHT = "".join(
    f"{label} 1:{i} 2:{i * i}{' 3:1' if i else ''}\n" for i in range(4) for label in "12"
)
EIGHT_ROWS = sorted(
    ([float(i), float(i * i), float(i > 0)], label) for i in range(4) for label in (0, 1)
)


@pytest.mark.parametrize("suffix", PACK)
def test_rows_come_back(suffix: str, tmp_path: Path):
    dataset = plain(tmp_path / f"rows{suffix}", EIGHT)
    assert rows_of(*splits(dataset)) == EIGHT_ROWS
    assert dataset.image_shape == (1, 1, 3) and dataset.num_classes == 2
    assert {part.images.dtype for part in splits(dataset)} == {torch.float32}


def test_the_file_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASKEDTRAIN_DATA", str(write(tmp_path / "rows", EIGHT)))
    assert rows_of(*splits(Config(scale=False, val_share=0.4).load())) == EIGHT_ROWS
    monkeypatch.setenv("MASKEDTRAIN_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="must be a file, got a folder"):
        Config().load()


def test_indices_begin_at_zero_if_any_does(tmp_path: Path):
    rows = ["1 0:5 1:6", "1 1:7", "2 1:8", "2 0:9", "1 2:1", "2 1:2", "1 1:3", "2 1:4"]
    zero = plain(tmp_path / "zero", "\n".join(rows))
    assert zero.image_shape == (1, 1, 3)
    assert ([5.0, 6.0, 0.0], 0) in rows_of(*splits(zero))
    # Index 0 in either file counts for both.
    one = write(tmp_path / "one", EIGHT)
    test = write(tmp_path / "test", "1 0:1\n")
    assert Config(data=one, test_data=test, scale=False, val_share=0.5).load().image_shape == (
        1,
        1,
        4,
    )


def test_comments_blank_lines_queries_and_windows_ends(tmp_path: Path):
    strange = "# a comment\r\n\r\n" + EIGHT.replace(" 1:", " qid:7 1:").replace("\n", " # x\r\n")
    assert rows_of(*splits(plain(tmp_path / "rows", strange))) == EIGHT_ROWS


@pytest.mark.parametrize(
    ("labels", "classes"),
    [("-1 +1", 2), ("0 1", 2), ("1.0 2.0", 2), ("7 3 5", 3), ("2 -5 0 100", 4)],
)
def test_labels_are_in_the_order_of_their_numbers(labels: str, classes: int, tmp_path: Path):
    names = labels.split()
    content = "".join(f"{name} 1:{float(name):g} 2:{i + 1}\n" for i in range(4) for name in names)
    dataset = plain(tmp_path / "rows", content)
    assert dataset.num_classes == classes
    order = sorted(float(name) for name in names)
    for part in splits(dataset):
        assert (
            len(part)
            and [order[label] for label in part.labels] == part.images[:, 0, 0, 0].tolist()
        )


# Splits


def random_rows(seed: int, count: int = 60, features: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(3, [1, 10, 0.1, 5, 100][:features], (count, features)).astype(np.float32)
    return rows, rng.integers(0, 3, count)


def dump(path: Path, seed: int, count: int = 60) -> tuple[Path, Tensor, Tensor]:
    rows, labels = random_rows(seed, count)
    datasets.dump_svmlight_file(rows, labels, str(path), zero_based=False)
    return path, torch.from_numpy(rows), torch.from_numpy(labels)


def test_splits_partition_the_rows_by_class(tmp_path: Path):
    path, rows, labels = dump(tmp_path / "rows", 0)
    dataset = Config(data=path, scale=False).load()
    assert rows_of(*splits(dataset)) == rows_of(ImageSplit(rows[:, None, None], labels))
    for label in range(3):
        total, *counts = (
            int((y == label).sum()) for y in (labels, *(s.labels for s in splits(dataset)))
        )
        test = round(0.2 * total)
        val = round(0.1 * (total - test))
        assert counts == [total - test - val, val, test]


def test_the_split_is_a_function_of_its_seed(tmp_path: Path):
    config = Config(data=dump(tmp_path / "rows", 0)[0])
    one = config.load()
    np.random.seed(5)  # noqa: NPY002 (the point is that it does not matter)
    same, other = config.load(), dataclasses.replace(config, split_seed=1).load()
    for part, again in zip(splits(one), splits(same), strict=True):
        assert torch.equal(part.images, again.images) and torch.equal(part.labels, again.labels)
    assert not torch.equal(one.test.images, other.test.images)


def test_a_test_file_is_taken_whole(tmp_path: Path):
    path, rows, labels = dump(tmp_path / "rows", 0)
    # Without its last features: as many as the other file has.
    content = "2 1:1 2:5\n0 1:2\n1 3:4\n"
    test = write(tmp_path / "test.gz", content)
    dataset = Config(data=path, test_data=test, scale=False).load()
    assert dataset.test.images[:, 0, 0].tolist() == [
        [1, 5, 0, 0, 0],
        [2, 0, 0, 0, 0],
        [0, 0, 4, 0, 0],
    ]
    assert dataset.test.labels.tolist() == [2, 0, 1]
    assert rows_of(dataset.train, dataset.val) == rows_of(ImageSplit(rows[:, None, None], labels))


def test_features_that_only_the_test_file_has_are_zero_in_training(tmp_path: Path):
    one = write(tmp_path / "one", EIGHT)
    test = write(tmp_path / "test", "1 5:2\n")
    dataset = Config(data=one, test_data=test, scale=False, val_share=0.5).load()
    assert dataset.image_shape == (1, 1, 5)
    assert not dataset.train.images[..., 3:].any()
    scaled = Config(data=one, test_data=test, val_share=0.5).load()
    # A feature that is constant in training is centred alone.
    assert scaled.test.images[0, 0, 0, 3:].tolist() == [0, 2]


@pytest.mark.parametrize("with_test", [False, True])
def test_features_are_scaled_by_the_training_rows_alone(with_test: bool, tmp_path: Path):
    path, _, _ = dump(tmp_path / "rows", 0)
    test = dump(tmp_path / "test", 1, count=7)[0] if with_test else None
    raw = Config(data=path, test_data=test, scale=False).load()
    scaled = Config(data=path, test_data=test).load()
    train = raw.train.images.double()
    mean, std = train.mean(0), train.std(0, correction=0)
    for before, after in zip(splits(raw), splits(scaled), strict=True):
        assert after.images.dtype == torch.float32 and torch.equal(before.labels, after.labels)
        expected = (before.images.double() - mean) / std
        # A rounding of the difference, of values a few tens of deviations from 0, and one of the
        # quotient.
        torch.testing.assert_close(after.images.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_are_fed_as_they_are(tmp_path: Path):
    """Batches of float images are the split's rows: neither divided by 255 nor changed in it."""
    dataset = Config(data=dump(tmp_path / "rows", 0)[0]).load()
    before = dataset.train.images.clone()
    loader = BatchLoader(dataset.train, 7, mean=dataset.mean, std=dataset.std)
    images = torch.cat([images for images, _ in loader])
    assert torch.equal(images, before) and torch.equal(dataset.train.images, before)


# What is wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x 1:2", "line 10: could not convert string to float: b'x'"),
        ("1 1:", "line 10: could not convert"),
        ("1 a:2", "line 10: invalid literal for int"),
        ("1 1:2 3", "line 10: "),
        ("1 2:1 1:1", "line 10: Feature indices .* should be sorted and unique"),
        ("1 -1:2", "line 10: Invalid index -1"),
        ("1,2 1:2", "line 10: could not convert string to float: b'1,2'"),
        ("1 99999999999:1", "line 10: value too large"),
        ("1 1:nan", "line 10: values must be finite, got nan"),
        ("1 1:0 2:1e400", "line 10: values must be finite, got inf"),
        ("1.5 1:2", "line 10: labels must be whole numbers, got 1.5"),
        ("nan 1:2", "line 10: labels must be whole numbers, got nan"),
        ("inf 1:2", "line 10: labels must be whole numbers, got inf"),
    ],
)
@pytest.mark.parametrize("where", ["data", "test_data"])
def test_bad_lines_are_named(where: str, line: str, message: str, tmp_path: Path):
    # Nine lines before it, one of them a comment, and others behind it, one as bad.
    bad = write(tmp_path / "bad.gz", f"# comment\n{EIGHT}{line}\n{EIGHT}{line}\n")
    paths = {"data": write(tmp_path / "good", EIGHT), where: bad}
    with pytest.raises(ValueError, match=rf"bad\.gz, {message}"):
        Config(**paths).load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows holds no row"),
        ("# nothing\n\n", "rows holds no row"),
        ("1 1:2\n1 1:3\n", "rows must have 2 classes at least, got 1"),
        ("1 1:2\n2 1:3\n", "rows: 2 rows are too few: test got none"),
        (EIGHT, "rows: 8 rows are too few: val got none"),
    ],
)
def test_too_little_is_an_error(content: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        Config(data=write(tmp_path / "rows", content)).load()


def test_labels_of_the_test_file_must_be_known(tmp_path: Path):
    one, test = write(tmp_path / "one", EIGHT), write(tmp_path / "test", "3 1:2\n2 1:1\n-1 1:1\n")
    with pytest.raises(ValueError, match=r"test has labels that .*one has not: -1, 3$"):
        Config(data=one, test_data=test).load()


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: EIGHT.encode()], ids=["cut", "raw"])
def test_damaged_compression_is_an_error(
    suffix: str, damage: Callable[[bytes], bytes], tmp_path: Path
):
    path = write(tmp_path / f"rows{suffix}", EIGHT * 100)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"rows{suffix} cannot be read: "):
        Config(data=path).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 8}, "rows are not resized: image_size must be None, got 8"),
        ({"val_share": 0.0}, r"val_share must be in \(0, 1\), got 0.0"),
        ({"test_share": 1.0}, r"test_share must be in \(0, 1\), got 1.0"),
        ({"split_seed": -1}, r"split_seed must be >= 0 and < 2\*\*32, got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_without_scikit_learn_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"LibSVM files need scikit-learn: .*maskedtrain\[data\]"):
        Config(data=write(tmp_path / "rows", EIGHT)).load()

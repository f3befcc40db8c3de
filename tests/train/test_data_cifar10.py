"""CIFAR-10 records in every form they come in, their cache, and damaged files."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from maskedtrain.data import cifar10
from maskedtrain.data.images import channel_stats

PER_FILE = 20


@pytest.fixture(autouse=True)
def small_files(request, monkeypatch, tmp_path):
    """Files of 20 records, a cache of their own, and no data set in the environment."""
    if "real" in request.fixturenames:
        return
    monkeypatch.setattr(cifar10, "FILE_BYTES", PER_FILE * cifar10.RECORD_BYTES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MASKEDTRAIN_DATA", raising=False)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "xdg" / "maskedtrain"


@pytest.fixture
def records():
    """File name -> uint8 [20, 3073]; two images of each class in every file."""
    rng = np.random.default_rng(0)
    files = {}
    for name in cifar10.FILES:
        files[name] = rng.integers(0, 256, (PER_FILE, cifar10.RECORD_BYTES), dtype=np.uint8)
        files[name][:, 0] = rng.permutation(PER_FILE) % 10
    return files


def write_bin(folder: Path, records) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in records.items():
        (folder / name).write_bytes(array.tobytes())
    return folder


def write_xz(folder: Path, records) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in records.items():
        (folder / f"{name}.xz").write_bytes(lzma.compress(array.tobytes(), preset=0))
    return folder


def write_tar(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        # The official archive is not in the order of the batches either.
        for name in ["readme.html", *sorted(records, reverse=True)]:
            content = records[name].tobytes() if name in records else b"<html>"
            member = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_mixed(folder: Path, records) -> Path:
    names = list(records)
    write_bin(folder, {name: records[name] for name in names[::2]})
    return write_xz(folder, {name: records[name] for name in names[1::2]})


FORMS = {
    "bin": write_bin,
    "bin in the official folder": lambda p, r: write_bin(p / cifar10.FOLDER, r).parent,
    "xz": write_xz,
    "xz in the official folder": lambda p, r: write_xz(p / cifar10.FOLDER, r).parent,
    "bin and xz": write_mixed,
    "archive": lambda p, r: write_tar(p / "any name.tgz", r),
    "folder of the archive": lambda p, r: write_tar(p / cifar10.ARCHIVE, r).parent,
}


def assert_equal(one, other):
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(one, part).images, getattr(other, part).images)
        assert torch.equal(getattr(one, part).labels, getattr(other, part).labels)


def assert_holds(dataset, records):
    """Each image with its label, once: test in order, the rest split between train and val."""

    def rows(split):
        return torch.cat(
            (split.labels.to(torch.uint8)[:, None], split.images.flatten(1)), 1
        ).numpy()

    np.testing.assert_array_equal(rows(dataset.test), records[cifar10.FILES[-1]])
    rest = np.concatenate([records[name] for name in cifar10.FILES[:-1]])
    got = np.concatenate((rows(dataset.train), rows(dataset.val)))
    assert sorted(map(bytes, got)) == sorted(map(bytes, rest))


# Forms


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors(form, tmp_path, records):
    root = FORMS[form](tmp_path / "data", records)
    first, again = cifar10.load(root), cifar10.load(str(root))
    assert first.image_shape == (3, 32, 32)
    assert (first.num_train, first.num_val, first.num_test) == (90, 10, 20)
    assert first.val.labels.bincount().tolist() == [1] * 10
    assert_holds(first, records)
    assert_equal(first, again)
    assert_equal(first, cifar10.load(write_bin(tmp_path / "plain", records)))


def test_the_root_defaults_to_the_environment(tmp_path, records, monkeypatch):
    monkeypatch.setenv("MASKEDTRAIN_DATA", str(write_bin(tmp_path / "data", records)))
    assert_holds(cifar10.load(), records)


def test_options(tmp_path, records):
    root = write_bin(tmp_path / "data", records)
    dataset = cifar10.load(root, image_size=64, interpolation="nearest", val_fraction=0.2)
    assert dataset.image_shape == (3, 64, 64)
    assert (dataset.num_train, dataset.num_val) == (80, 20)
    plain, other = cifar10.load(root, val_fraction=0.2), cifar10.load(root, split_seed=1)
    assert torch.equal(dataset.train.images[:, :, ::2, 1::2], plain.train.images)
    assert torch.equal(other.test.images, plain.test.images)
    assert not torch.equal(other.val.images, cifar10.load(root).val.images)
    assert cifar10.load(root, val_fraction=0).num_train == 100


def test_tensors_do_not_depend_on_the_files_any_more(tmp_path, records):
    root = write_bin(tmp_path / "data", records)
    dataset = cifar10.load(root)
    for name in records:
        (root / name).write_bytes(bytes(PER_FILE * cifar10.RECORD_BYTES))
    assert_holds(dataset, records)


# Cache


@pytest.mark.parametrize("form", ["xz", "archive"])
def test_the_second_load_decodes_nothing(form, tmp_path, cache, records, monkeypatch):
    root = FORMS[form](tmp_path / "data", records)
    cifar10.load(root)
    assert len(list(cache.iterdir())) == 6

    def fail(path):
        raise AssertionError(f"decoded again: {path}")

    monkeypatch.setattr(cifar10, "_unpack_xz", fail)
    monkeypatch.setattr(cifar10, "_unpack_archive", fail)
    assert_holds(cifar10.load(root), records)


@pytest.mark.parametrize("form", ["xz", "archive"])
def test_a_changed_source_is_decoded_again(form, tmp_path, records):
    root = FORMS[form](tmp_path / "data", records)
    cifar10.load(root)
    sources = [root] if root.is_file() else sorted(root.iterdir())
    times = [path.stat().st_mtime_ns for path in sources]
    changed = {name: array.copy() for name, array in records.items()}
    for array in changed.values():
        array[:, 1:] ^= 0xFF
    FORMS[form](tmp_path / "data", changed)
    # Same names and times of change: only the content tells.
    for path, time in zip(sources, times, strict=True):
        os.utime(path, ns=(time, time))
    assert_holds(cifar10.load(root), changed)


def test_a_shortened_entry_is_replaced(tmp_path, cache, records):
    root = write_xz(tmp_path / "data", records)
    cifar10.load(root)
    entry = next(iter(cache.iterdir()))
    entry.write_bytes(entry.read_bytes()[:-1])
    assert_holds(cifar10.load(root), records)
    assert entry.stat().st_size == PER_FILE * cifar10.RECORD_BYTES


def test_an_unusable_cache_folder_costs_a_warning_only(tmp_path, records):
    root = write_xz(tmp_path / "data", records)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot write the cache folder .*file.* decoded again"):
        dataset = cifar10.load(root, cache=tmp_path / "file" / "cache")
    assert_holds(dataset, records)


def test_a_full_disk_costs_a_warning_and_leaves_nothing(tmp_path, cache, records, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root = write_xz(tmp_path / "data", records)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        dataset = cifar10.load(root)
    assert_holds(dataset, records)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_nothing(step, tmp_path, cache, records, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    root = write_tar(tmp_path / "data.tar.gz", records)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            cifar10.load(root)
    assert list(cache.iterdir()) == []
    assert_holds(cifar10.load(root), records)


def test_the_cache_follows_the_xdg_rules(tmp_path, records, monkeypatch):
    root = write_xz(tmp_path / "data", records)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cifar10.load(root)
    assert len(list((tmp_path / "home/.cache/maskedtrain").iterdir())) == 6
    cifar10.load(root, cache=tmp_path / "own")
    assert len(list((tmp_path / "own").iterdir())) == 6


# Bad input: every message names the file


@pytest.mark.parametrize("size", [0, 61459, 61461])
def test_a_plain_file_of_the_wrong_size(size, tmp_path, records):
    root = write_bin(tmp_path, records)
    (root / "data_batch_3.bin").write_bytes(bytes(size))
    got = "more" if size > 61460 else size
    with pytest.raises(ValueError, match=rf"data_batch_3\.bin must hold 61460 bytes .* got {got}$"):
        cifar10.load(root)


@pytest.mark.parametrize("form", ["bin", "xz", "archive"])
def test_a_label_above_nine(form, tmp_path, records):
    records["test_batch.bin"][7, 0] = 10
    root = FORMS[form](tmp_path / "data", records)
    for _ in range(2):  # decoded, then from the cache
        with pytest.raises(ValueError, match=r"test_batch\.bin.* < 10, got 10 in record 7$"):
            cifar10.load(root)


def test_missing_places(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        cifar10.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds neither data_batch_1\.bin"):
        cifar10.load(tmp_path)
    with pytest.raises(ValueError, match="pass their folder or set MASKEDTRAIN_DATA"):
        cifar10.load()


@pytest.mark.parametrize("form", ["bin", "xz", "archive"])
def test_a_missing_batch(form, tmp_path, records):
    del records["data_batch_4.bin"]
    root = FORMS[form](tmp_path / "data", records)
    with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin"):
        cifar10.load(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, plain: data[:-20], "complete xz file, got: Compressed file ended"),
        (lambda data, plain: b"", "complete xz file"),
        (lambda data, plain: b"not xz at all", "complete xz file"),
        (lambda data, plain: flipped(data, len(data) // 2), "complete xz file, got: Corrupt"),
        # The checksum of the content: 8 bytes, before 12 of index and 12 of footer.
        (lambda data, plain: flipped(data, len(data) - 28), "complete xz file, got: Corrupt"),
        (lambda data, plain: lzma.compress(plain[:-1]), "must hold 61460 bytes .*, got 61459"),
        (lambda data, plain: lzma.compress(plain + b"\0"), "must hold 61460 bytes .*, got more"),
    ],
)
def test_a_damaged_xz_file(damage, message, tmp_path, cache, records):
    root = write_xz(tmp_path / "data", records)
    file = root / "data_batch_2.bin.xz"
    file.write_bytes(damage(file.read_bytes(), records["data_batch_2.bin"].tobytes()))
    with pytest.raises(ValueError, match=rf"data_batch_2\.bin\.xz.* {message}"):
        cifar10.load(root)
    assert not list(cache.glob("data_batch_2*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4],
        lambda data: flipped(data, len(data) // 2),
        # The gzip checksum.
        lambda data: flipped(data, len(data) - 8),
        lambda data: gzip.compress(b"no archive in here" * 100),
        lambda data: b"neither gzip nor tar",
        lambda data: b"",
    ],
)
def test_a_damaged_archive(damage, tmp_path, cache, records):
    archive = write_tar(tmp_path / "cifar.tar.gz", records)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz must be a complete tar\.gz archive"):
        cifar10.load(archive)
    assert not cache.exists()


def test_an_archive_member_of_the_wrong_size(tmp_path, records):
    records["data_batch_1.bin"] = records["data_batch_1.bin"][:-1]
    archive = write_tar(tmp_path / "cifar.tar.gz", records)
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz: data_batch_1\.bin must hold 61460"):
        cifar10.load(archive)


def test_decompression_is_bounded(tmp_path, records):
    root = write_xz(tmp_path / "data", records)
    bomb = lzma.compress(bytes(16 << 20), preset=0)
    (root / "data_batch_5.bin.xz").write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"data_batch_5.*, got more"):
            cifar10.load(root)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 << 20


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]


# The real thing


@pytest.fixture(scope="module")
def real():
    # Through the user's own cache: decoding takes seconds, and later runs need not repeat it.
    root = os.environ.get("MASKEDTRAIN_DATA")
    if not root:
        pytest.skip("MASKEDTRAIN_DATA is not set")
    return cifar10.load(root, val_fraction=0), cifar10.load(root)


def test_real_statistics(real):
    everything, _ = real
    mean, std = channel_stats(everything.train.images)
    assert mean == pytest.approx(cifar10.MEAN, abs=1e-6)
    assert std == pytest.approx(cifar10.STD, abs=1e-6)
    assert everything.train.labels.bincount().tolist() == [5000] * 10
    assert everything.test.labels.bincount().tolist() == [1000] * 10


def test_real_split(real):
    everything, dataset = real
    assert (dataset.num_train, dataset.num_val, dataset.num_test) == (45_000, 5_000, 10_000)
    assert dataset.val.labels.bincount().tolist() == [500] * 10
    pooled = torch.cat((dataset.train.images, dataset.val.images)).flatten(1)
    weights = torch.arange(1, pooled.shape[1] + 1)
    # Order-free fingerprint: the multiset of weighted pixel sums.
    expected = (everything.train.images.flatten(1).long() @ weights).sort().values
    assert torch.equal((pooled.long() @ weights).sort().values, expected)

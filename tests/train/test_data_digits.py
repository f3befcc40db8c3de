"""scikit-learn's digits: values, splits, and what happens without scikit-learn."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from maskedtrain.data import digits
from maskedtrain.data.images import channel_stats

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")


def splits(dataset):
    return dataset.train, dataset.val, dataset.test


def test_splits_partition_the_images():
    levels, targets = sklearn_datasets.load_digits(return_X_y=True)
    dataset = digits.load()
    assert (dataset.num_train, dataset.num_val, dataset.num_test) == (1295, 143, 359)
    assert dataset.image_shape == (1, 8, 8)

    def rows(pixels, labels):
        return sorted(map(tuple, np.column_stack((pixels.reshape(len(labels), -1), labels))))

    got = [rows(split.images.numpy(), split.labels.numpy()) for split in splits(dataset)]
    # 255 / 16 per level; 8 * 255 / 16 = 127.5 goes to the even 128, as numpy rounds too.
    expected = rows(np.round(levels * 255 / 16), targets)
    assert sorted(itertools.chain(*got)) == expected


def test_splits_are_stratified():
    dataset = digits.load()
    counts = torch.stack([split.labels.bincount(minlength=10) for split in splits(dataset)])
    total = counts.sum(0)
    # Within half an image of the shares, and half of that again where val is a share of a rest.
    shares = torch.tensor([[0.72], [0.08], [0.2]])
    assert float((counts - shares * total).abs().max()) <= 1.05


def test_the_split_seed_moves_validation_but_never_the_test_set():
    one, other = digits.load(split_seed=0), digits.load(split_seed=1)
    assert torch.equal(one.test.images, other.test.images)
    assert not torch.equal(one.val.images, other.val.images)
    np.random.seed(5)  # noqa: NPY002 (the point is that it does not matter)
    again = digits.load(split_seed=0)
    for split, same in zip(splits(one), splits(again), strict=True):
        assert torch.equal(split.images, same.images)
        assert torch.equal(split.labels, same.labels)


def test_validation_can_be_empty():
    dataset = digits.load(val_fraction=0)
    assert (dataset.num_train, dataset.num_val) == (1438, 0)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_upsampled_statistics_are_those_of_the_train_images(interpolation):
    dataset = digits.load(image_size=24, interpolation=interpolation)
    assert dataset.image_shape == (1, 24, 24)
    assert (dataset.mean, dataset.std) == channel_stats(dataset.train.images)
    assert dataset.augment.padding == 3
    assert not dataset.augment.flip


def test_without_scikit_learn_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "maskedtrain\[data\]"'):
        digits.load()

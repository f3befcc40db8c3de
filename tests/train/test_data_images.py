"""Image types and the batch loader: augmentation, order, position, bad input."""

from __future__ import annotations

import dataclasses
import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskedtrain.data.images import (
    Augment,
    BatchLoader,
    ImageDataset,
    ImageSplit,
    channel_stats,
    held_out,
    upsample,
)

MEAN, STD = (0.49, 0.25, 0.75), (0.25, 0.2, 0.3)
COUNT = 37


def make_split(count: int = COUNT, shape: tuple[int, int, int] = (3, 6, 5)) -> ImageSplit:
    """Random images; the label of an image is its index."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return ImageSplit(images, torch.arange(count))


def make_loader(split: ImageSplit | None = None, batch_size: int = 8, **options) -> BatchLoader:
    defaults = {"mean": MEAN, "std": STD, "shuffle": True, "seed": 3, "augment": Augment(2, True)}
    split = make_split() if split is None else split
    return BatchLoader(split, batch_size, **{**defaults, **options})


def take(loader: BatchLoader, count: int) -> list[tuple[Tensor, Tensor]]:
    return list(itertools.islice(loader.stream(), count))


def labels_of(batches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def assert_same_batches(got, expected) -> None:
    assert len(got) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(got, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def crop_and_flip_one(image: np.ndarray, padding: int, top: int, left: int, flip: bool):
    """The augmentation of one image [C, H, W], written as a loop over its pixels."""
    channels, height, width = image.shape
    result = np.zeros_like(image)
    for c, y, x in itertools.product(range(channels), range(height), range(width)):
        row, column = y + top - padding, (width - 1 - x if flip else x) + left - padding
        if 0 <= row < height and 0 <= column < width:
            result[c, y, x] = image[c, row, column]
    return result


# Augmentation


@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 4, 4)])
@pytest.mark.parametrize("augment", [Augment(), Augment(4, True), Augment(1), Augment(0, True)])
def test_augmentation_equals_a_loop_over_images(augment, shape):
    images = make_split(23, shape).images
    top, left, flip = torch.from_numpy(augment.draw(23, np.random.default_rng(0)))
    got = augment.apply(images, top, left, flip)
    for index, image in enumerate(images.numpy()):
        expected = crop_and_flip_one(
            image, augment.padding, int(top[index]), int(left[index]), bool(flip[index])
        )
        np.testing.assert_array_equal(got[index].numpy(), expected)
    assert torch.equal(got, images) == (augment == Augment())


def test_draws_are_uniform_and_independent():
    top, left, flip = Augment(1, True).draw(18_000, np.random.default_rng(0))
    counts = np.bincount((top * 3 + left) * 2 + flip, minlength=18)
    # Chi-squared with 17 degrees of freedom: 40.8 is its 0.999 quantile.
    assert counts.size == 18
    assert ((counts - 1000) ** 2 / 1000).sum() < 40.8


def test_loader_augments_each_image_on_its_own_with_black_borders():
    split, padding = make_split(12), 2
    (images, _), *_ = make_loader(split, batch_size=12, shuffle=False, augment=Augment(2, True))
    pixels = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    pixels = (pixels * 255).round().to(torch.uint8)
    found = []
    for image, original in zip(pixels.numpy(), split.images.numpy(), strict=True):
        found += [
            draw
            for draw in itertools.product(range(5), range(5), (False, True))
            if np.array_equal(image, crop_and_flip_one(original, padding, *draw))
        ]
    assert len(found) == 12
    assert len(set(found)) > 6


def test_normalisation_is_that_of_unit_pixels():
    split = make_split()
    ((images, _),) = make_loader(split, batch_size=COUNT, shuffle=False, augment=None)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = (split.images.double() / 255 - mean) / std
    assert images.dtype == torch.float32
    # Four roundings in fp32 (scale, shift, product, sum), none above max |x / std| + |mean / std|.
    bound = 4 * torch.finfo(torch.float32).eps / 2 * float((1 / std + mean / std).max())
    assert float((images - expected).abs().max()) <= bound


# Order and position


@pytest.mark.parametrize(
    ("batch_size", "drop_last"),
    [(1, False), (1, True), (8, False), (8, True), (COUNT, False), (COUNT, True), (50, False)],
)
def test_an_epoch_holds_every_image_once(batch_size, drop_last):
    loader = make_loader(batch_size=batch_size, drop_last=drop_last)
    assert len(loader) == (COUNT // batch_size if drop_last else -(-COUNT // batch_size))
    epochs = [labels_of(take(loader, len(loader))) for _ in range(3)]
    for labels in epochs:
        assert len(labels) == len(set(labels)) == min(COUNT, len(loader) * batch_size)
    assert epochs[0] != epochs[1] != epochs[2]
    assert (loader.epoch, loader.batch) == (3, 0)


def test_a_pass_is_a_whole_epoch_and_leaves_the_position_alone():
    loader = make_loader()
    take(loader, 7)
    before = loader.state_dict()
    first, second = list(loader), list(loader)
    assert loader.state_dict() == before
    assert sorted(labels_of(first)) == list(range(COUNT))
    assert first[-1][0].shape == (COUNT % 8, 3, 6, 5)
    assert_same_batches(first, second)
    # The stream's epoch 1, of which 2 batches had been taken.
    assert_same_batches(take(loader, len(loader) - 2), first[2:])


def test_without_shuffle_the_order_is_that_of_the_split():
    assert labels_of(make_loader(shuffle=False)) == list(range(COUNT))


def test_batches_are_a_function_of_the_seed_alone():
    reference = take(make_loader(), 7)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (the point is that it does not matter)
    states = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    assert_same_batches(take(make_loader(), 7), reference)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]  # noqa: NPY002
    assert labels_of(take(make_loader(seed=4), 7)) != labels_of(reference)


def test_order_and_augmentation_do_not_depend_on_the_batch_size():
    small, large = list(make_loader(batch_size=5)), list(make_loader(batch_size=COUNT))
    assert labels_of(small) == labels_of(large)
    assert torch.equal(torch.cat([images for images, _ in small]), large[0][0])


@pytest.mark.parametrize("drop_last", [False, True])
# Epochs of 5 and 4 batches: fresh, inside, last of an epoch, boundary, first of the next, later.
@pytest.mark.parametrize("cut", [0, 1, 3, 4, 5, 6, 13])
def test_resume_continues_bitwise(cut, drop_last):
    whole = take(make_loader(drop_last=drop_last), cut + 12)
    interrupted = make_loader(drop_last=drop_last)
    for count, _ in enumerate(interrupted.stream()):
        assert interrupted.epoch * len(interrupted) + interrupted.batch == count + 1
        if count + 1 >= cut:
            break
    if cut == 0:
        interrupted = make_loader(drop_last=drop_last)
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed = make_loader(drop_last=drop_last)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same_batches(take(resumed, 12), whole[cut:])


def test_a_live_stream_follows_a_loaded_position():
    loader = make_loader()
    stream = loader.stream()
    start = loader.state_dict()
    first = [next(stream) for _ in range(7)]
    loader.load_state_dict(start)
    assert_same_batches([next(stream) for _ in range(7)], first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9}, "batch_size must be 8, got 9"),
        ({"num_images": 36}, "num_images must be 37, got 36"),
        ({"seed": 4}, "seed must be 3, got 4"),
        ({"shuffle": False}, "shuffle must be True, got False"),
        ({"drop_last": True}, "drop_last must be False, got True"),
        ({"augment": {"padding": 2, "flip": False}}, "augment must be .*'flip': True.*, got"),
        ({"batch": 5}, r"batch in \[0, 5\), got epoch 0, batch 5"),
        ({"epoch": -1}, "got epoch -1, batch 2"),
        ({"rank": 0}, "must have keys"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, message):
    loader = make_loader()
    take(loader, 2)
    before = loader.state_dict()
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**before, "epoch": 0, **change})
    with pytest.raises(ValueError, match="must have keys"):
        loader.load_state_dict({"epoch": 1, "batch": 1})
    assert loader.state_dict() == before


# Devices and layouts


@pytest.mark.parametrize("augment", [None, Augment(2, True)])
def test_channels_last_changes_the_layout_only(augment):
    plain = take(make_loader(augment=augment), 6)
    channels_last = take(make_loader(augment=augment, channels_last=True), 6)
    assert_same_batches(channels_last, plain)
    assert all(images.is_contiguous() for images, _ in plain)
    assert all(
        images.is_contiguous(memory_format=torch.channels_last) for images, _ in channels_last
    )


def test_a_split_that_is_in_place_is_not_copied():
    split = make_split()
    loader = make_loader(split, device=torch.device("cpu"))
    assert loader.split.images.data_ptr() == split.images.data_ptr()
    before = split.images.clone()
    take(loader, 6)
    assert torch.equal(split.images, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_equal_the_cpu_ones_without_synchronisation():
    loader = make_loader(device="cuda")
    stream = loader.stream()
    got = [next(stream)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got += [next(stream) for _ in range(11)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(images.is_cuda and labels.is_cuda for images, labels in got)
    for (images, labels), (expected, expected_labels) in zip(
        got, take(make_loader(), 12), strict=True
    ):
        assert torch.equal(labels.cpu(), expected_labels)
        # The GPU may contract the product and the sum to one rounding.
        torch.testing.assert_close(images.cpu(), expected, rtol=1e-6, atol=1e-6)


# Helpers of the data sets


@pytest.mark.parametrize("arguments", [{"size": 12}, {"factor": 3}])
def test_nearest_upsampling_repeats_pixels(arguments):
    images = make_split(shape=(2, 4, 4)).images
    expected = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert torch.equal(upsample(images, mode="nearest", **arguments), expected)


def test_bilinear_upsampling_rounds_the_exact_value():
    images = make_split(1030, (1, 4, 4)).images
    got = upsample(images, size=9)
    exact = F.interpolate(images.double(), (9, 9), mode="bilinear")
    assert got.dtype == torch.uint8
    # Half a level, and fp32 interpolation of values up to 255.
    assert float((got - exact).abs().max()) <= 0.5 + 255 * 1e-6


def test_upsampling_to_the_same_size_is_no_copy():
    images = make_split(shape=(1, 4, 4)).images
    assert upsample(images, size=4) is images
    assert upsample(images, factor=1) is images


@pytest.mark.parametrize(
    "arguments", [{}, {"size": 8, "factor": 2}, {"size": 3}, {"factor": 0}, {"factor": -1}]
)
def test_upsampling_refuses(arguments):
    with pytest.raises(ValueError, match="must be"):
        upsample(make_split(shape=(1, 4, 4)).images, **arguments)


def test_channel_stats_are_exact():
    images = make_split().images
    mean, std = channel_stats(images)
    pixels = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean((0, 2, 3)))
    torch.testing.assert_close(
        torch.tensor(std).double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=0
    )
    assert channel_stats(images.flip(0)) == (mean, std)


def test_held_out_is_stratified_and_frozen():
    labels = torch.tensor([0, 1] * 10 + [2] * 5)
    chosen = held_out(labels, 0.3, seed=0)
    assert labels[chosen].bincount(minlength=3).tolist() == [3, 3, 2]
    assert torch.equal(held_out(labels, 0.3, seed=0), chosen)
    assert not torch.equal(held_out(labels, 0.3, seed=1), chosen)
    assert not held_out(labels, 0.0, seed=0).any()
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 1"):
        held_out(labels, 1, seed=0)
    # Written down: a split that moved between versions would make runs incomparable.
    assert chosen.nonzero().flatten().tolist() == [3, 4, 7, 8, 11, 16, 22, 24]


# Bad input


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(2, 3, 4, 4).double(),
            torch.zeros(2).long(),
            r"uint8 \[N, C, H, W\], or float32, got float64",
        ),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"got uint8 \[2, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), r"int64 \[2\], got float32 \[2\]"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), r"int64 \[2\], got int64 \[3\]"),
        (
            torch.zeros(2, 3, 4, 4).byte(),
            torch.zeros(2, device="meta").long(),
            "labels must be on cpu, got meta",
        ),
    ],
)
def test_a_split_is_validated(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageSplit(images, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": make_split(0)}, "at least one image"),
        ({"val": make_split(4, (1, 6, 5))}, r"val images must be \[3, 6, 5\]"),
        ({"num_classes": COUNT - 1}, rf"train labels must be in \[0, {COUNT - 1}\), got 0 to 36"),
        ({"mean": (0.5,)}, "must have 3 channels"),
        ({"mean": (0.5, 0.5, 128.0)}, r"mean must be in \[0, 1\]"),
        ({"std": (0.5, 0.5, 0.0)}, r"std in \(0, 1\]"),
        ({"std": (0.5, 0.5, float("nan"))}, r"std in \(0, 1\]"),
    ],
)
def test_a_dataset_is_validated(change, message):
    dataset = ImageDataset("toy", make_split(), make_split(0), make_split(5), COUNT, MEAN, STD)
    assert (dataset.num_train, dataset.num_val, dataset.num_test) == (COUNT, 0, 5)
    assert dataset.image_shape == (3, 6, 5)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(dataset, **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": 38, "drop_last": True}, "must fill a batch.* got 37 images"),
        ({"split": make_split(0)}, "must fill a batch.* got 0 images"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"mean": (0.5,)}, "must have 3 channels"),
        ({"std": (0.0, 0.5, 0.5)}, r"std in \(0, 1\]"),
    ],
)
def test_loader_arguments_are_validated(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(**options)


def test_padding_is_validated():
    with pytest.raises(ValueError, match="padding must be >= 0, got -1"):
        Augment(-1)

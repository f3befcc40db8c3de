"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels, 10 classes, no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maskedtrain.data.images import (
    Augment,
    ImageConfig,
    ImageDataset,
    ImageSplit,
    Interpolation,
    channel_stats,
    held_out,
    upsample,
)

TEST_FRACTION = 0.2


def load(
    *,
    image_size: int = 8,
    interpolation: Interpolation = "bilinear",
    val_fraction: float = 0.1,
    split_seed: int = 0,
) -> ImageDataset:
    """The digits as uint8 [N, 1, image_size, image_size], levels 0..16 scaled to 0..255.

    Splits are stratified. The test set is a fixed fifth of every class, 359 images; `split_seed`
    draws `val_fraction` of each class of the rest for validation: 143 at 0.1, leaving 1,295.
    mean and std are those of the train split at its final size. The customary augmentation shifts
    by up to 1/8 of the width and does not mirror: a mirrored digit is not a digit.

    Raises ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'digits need scikit-learn: pip install "maskedtrain[data]"', name=error.name
        ) from error
    levels, targets = load_digits(return_X_y=True)
    pixels = (torch.from_numpy(levels) * (255 / 16)).round().to(torch.uint8)
    images = upsample(pixels.view(-1, 1, 8, 8), size=image_size, mode=interpolation)
    labels = torch.from_numpy(targets).to(torch.int64)

    in_test = held_out(labels, TEST_FRACTION, seed=0)
    rest = torch.nonzero(~in_test).flatten()
    in_val = held_out(labels[rest], val_fraction, split_seed)
    train, val, test = (
        ImageSplit(images[index], labels[index]) for index in (rest[~in_val], rest[in_val], in_test)
    )
    mean, std = channel_stats(train.images)
    augment = Augment(padding=image_size // 8, flip=False)
    return ImageDataset("digits", train, val, test, 10, mean, std, augment)


@dataclass(frozen=True)
class Config(ImageConfig):
    """Handwritten digits, embedded in scikit-learn."""

    name = "digits"

    def load(self) -> ImageDataset:
        return load(image_size=self.image_size or 8)

"""Images in memory: the types every image data set returns, and the loader that feeds them.

# N images, B batch, C channels, H height, W width, P padding
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskedtrain.data.base import DataConfig

Interpolation = Literal["bilinear", "nearest"]


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Labelled images: `images` [N, C, H, W], `labels` int64 [N], on one device.

    Images are uint8 levels, of which 255 is 1, or float32 values.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [N, C, H, W], or float32, got {_describe(images)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(images)}], got {_describe(labels)}")
        if labels.device != images.device:
            raise ValueError(f"labels must be on {images.device}, got {labels.device}")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> ImageSplit:
        """The same split on `device`, without a copy where it is there already."""
        return ImageSplit(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding, then random horizontal flip; the default changes nothing.

    The standard CIFAR recipe is ``Augment(padding=4, flip=True)``. Each image is padded by
    `padding` pixels of raw value 0 (black, before normalisation, as torchvision's
    ``RandomCrop(32, padding=4)`` on images does), cropped back to H x W at an offset uniform over
    the (2P + 1)² positions, and mirrored with probability 1/2. Images are drawn independently.
    """

    padding: int = 0
    """Pixels added on each side."""
    flip: bool = False
    """Mirror left to right with probability 1/2."""

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be >= 0, got {self.padding}")

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw for `count` images: int64 [3, count], rows are crop top, crop left, flip."""
        corners = rng.integers(0, 2 * self.padding + 1, size=(2, count))
        return np.concatenate((corners, rng.integers(0, 1 + self.flip, size=(1, count))))

    def apply(self, images_BCHW: Tensor, top_B: Tensor, left_B: Tensor, flip_B: Tensor) -> Tensor:
        """Crop and mirror each image as drawn; top and left count from the padded corner."""
        images = images_BCHW
        if self.padding:
            height, width = images.shape[-2:]
            padded = F.pad(images, (self.padding,) * 4)
            # Every possible crop as a strided view [B, C, 2P+1, 2P+1, H, W]; one gather picks.
            crops = padded.unfold(2, height, 1).unfold(3, width, 1)
            images = crops[torch.arange(len(images), device=images.device), :, top_B, left_B]
        if self.flip:
            images = torch.where(flip_B.bool().view(-1, 1, 1, 1), images.flip(-1), images)
        return images


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """An image classification data set, held in memory.

    `mean` and `std` are per channel, of pixels scaled to [0, 1]; `augment` is the recipe that is
    customary for training on it. Labels are in [0, num_classes).
    """

    name: str
    train: ImageSplit
    val: ImageSplit
    test: ImageSplit
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        if len(self.train) == 0:
            raise ValueError(f"{self.name}: train must hold at least one image, got 0")
        for part in ("train", "val", "test"):
            split: ImageSplit = getattr(self, part)
            if split.images.shape[1:] != self.train.images.shape[1:]:
                raise ValueError(
                    f"{self.name}: {part} images must be {list(self.image_shape)} as in train, "
                    f"got {list(split.images.shape[1:])}"
                )
            if len(split):
                low, high = (int(label) for label in split.labels.aminmax())
                if low < 0 or high >= self.num_classes:
                    raise ValueError(
                        f"{self.name}: {part} labels must be in [0, {self.num_classes}), "
                        f"got {low} to {high}"
                    )
        _check_normalization(self.mean, self.std, channels=self.image_shape[0])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_train(self) -> int:
        return len(self.train)

    @property
    def num_val(self) -> int:
        return len(self.val)

    @property
    def num_test(self) -> int:
        return len(self.test)


@dataclass(frozen=True)
class ImageConfig(DataConfig):
    """What data sets of images have in common."""

    task = "images"

    image_size: int | None = None
    """Side to which images are resized, in pixels; the data set's own where not given."""
    batch_size: int = 128
    """Images a step."""
    eval_batch_size: int = 500
    """Images a forward pass of an evaluation."""
    augment: bool = True
    """Random crops and, where the data set allows, flips of the training images."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "eval_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")

    def load(self) -> ImageDataset:
        raise NotImplementedError


class BatchLoader:
    """Batches of a split: float32 images [B, C, H, W], normalised, and int64 labels [B].

    The split lives on `device` as it is; gathering, augmentation and normalisation
    (x / 255 - mean) / std (of float images: (x - mean) / std) run there, without a host
    synchronisation between batches.

    :meth:`stream` is for training: endless, advances the position (`epoch`, `batch`).
    ``for images, labels in loader`` is for evaluation: one pass over the current epoch from its
    first batch; it leaves the position alone. The last batch is short unless `drop_last`.

    Order and augmentation are a function of (seed, epoch, place within the epoch) alone, the same
    on every device and independent of global random state, so the position is all a checkpoint
    has to keep. ``state_dict()`` counts the batches handed out: taken between two steps, it makes
    a fresh loader continue with exactly the batches that were to come.

    Raises ValueError for arguments that do not fit the split, or leave no batch.
    """

    epoch: int
    """Epoch of the next batch of the stream."""
    batch: int
    """Its index within the epoch, in [0, len(loader))."""

    def __init__(
        self,
        split: ImageSplit,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        shuffle: bool = False,
        drop_last: bool = False,
        channels_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if len(split) < (batch_size if drop_last else 1):
            raise ValueError(
                f"split must fill a batch: batch_size={batch_size}, drop_last={drop_last}, "
                f"got {len(split)} images"
            )
        _check_normalization(mean, std, channels=split.images.shape[1])
        self.split = split.to(device)
        self.batch_size = batch_size
        self.augment = Augment() if augment is None else augment
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        one = 255 if split.images.dtype == torch.uint8 else 1
        # (x / one - mean) / std as one product and one sum.
        mean_C11 = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
        std_C11 = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        self._scale_C11 = (1 / (one * std_C11)).to(device, torch.float32)
        self._shift_C11 = (-mean_C11 / std_C11).to(device, torch.float32)
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = self._draw(self.epoch)
        for batch in range(len(self)):
            yield self._load(draws, batch)

    def stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end, from the position on; each moves the position past itself."""
        epoch, draws = self.epoch, self._draw(self.epoch)
        while True:
            if epoch != self.epoch:
                epoch, draws = self.epoch, self._draw(self.epoch)
            loaded = self._load(draws, self.batch)
            # Before the yield: between two steps the consumer sees this batch already counted.
            self.epoch, self.batch = divmod(self.epoch * len(self) + self.batch + 1, len(self))
            yield loaded

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it must be combined with to mean the same batches."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "batch_size": self.batch_size,
            "num_images": len(self.split),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "augment": dataclasses.asdict(self.augment),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a saved position; ValueError, and no move, if it belongs to another loader."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"loader state must have keys {list(own)}, got {list(state)}")
        fixed = own.keys() - {"epoch", "batch"}
        if wrong := sorted(key for key in fixed if state[key] != own[key]):
            raise ValueError(
                "loader state must match this loader: "
                + ", ".join(f"{key} must be {own[key]}, got {state[key]}" for key in wrong)
            )
        epoch, batch = state["epoch"], state["batch"]
        if epoch < 0 or not 0 <= batch < len(self):
            raise ValueError(
                f"position must have epoch >= 0 and batch in [0, {len(self)}), "
                f"got epoch {epoch}, batch {batch}"
            )
        self.epoch, self.batch = epoch, batch

    def _draw(self, epoch: int) -> Tensor:
        """All random numbers of an epoch: int64 [4, N], rows are image, crop top, left, flip."""
        # Drawn on the host so that every device sees the same epoch; one small copy moves them.
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
        count = len(self.split)
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        draws = np.concatenate((order[None], self.augment.draw(count, rng)))
        return torch.from_numpy(draws).to(self.split.images.device, non_blocking=True)

    def _load(self, draws: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        start = batch * self.batch_size
        order, top, left, flip = draws[:, start : start + self.batch_size]
        images = self.augment.apply(self.split.images.index_select(0, order), top, left, flip)
        images = images.float().mul_(self._scale_C11).add_(self._shift_C11)
        return (
            images.contiguous(memory_format=self._layout),
            self.split.labels.index_select(0, order),
        )


def upsample(
    images_NCHW: Tensor,
    *,
    size: int | None = None,
    factor: int | None = None,
    mode: Interpolation = "bilinear",
) -> Tensor:
    """Enlarge uint8 images to `size` x `size` pixels, or by the integer `factor` on both sides.

    Bilinear interpolates between pixel centres (align_corners=False) and rounds to the nearest
    level. Raises ValueError unless exactly one of `size` and `factor` is given, or if the result
    would be smaller than the input.
    """
    height, width = images_NCHW.shape[-2:]
    if size is not None and factor is None:
        target = (size, size)
    elif factor is not None and size is None:
        target = (height * factor, width * factor)
    else:
        raise ValueError(f"either size or factor must be given, got {size=}, {factor=}")
    if target[0] < height or target[1] < width:
        raise ValueError(f"upsampled images must be >= {height}x{width}, got {target}")
    if target == (height, width):
        return images_NCHW
    if mode == "nearest":
        return F.interpolate(images_NCHW, target, mode="nearest")
    # In chunks: the float copy of a whole data set would need four times its memory.
    chunks = (
        F.interpolate(chunk.float(), target, mode="bilinear").round_().to(torch.uint8)
        for chunk in images_NCHW.split(1024)
    )
    return torch.cat(list(chunks))


def channel_stats(images_NCHW: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation per channel of uint8 images scaled to [0, 1].

    Computed in float64 from exact counts of the 256 levels, so the result does not depend on
    the order of summation.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images_NCHW.unbind(1):
        weights = torch.bincount(channel.flatten(), minlength=256).cpu() / channel.numel()
        centre = (weights * levels).sum()
        mean.append(float(centre))
        std.append(float((weights * (levels - centre).square()).sum().sqrt()))
    return tuple(mean), tuple(std)


def held_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Bool [N] that marks round(fraction * n) images of each class of n, chosen by `seed`.

    The choice depends on the arguments alone and is the same in every numpy version.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    # RandomState, unlike Generator, promises a frozen stream.
    rng = np.random.RandomState(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        (members,) = torch.nonzero(labels == label, as_tuple=True)
        picks = torch.from_numpy(rng.permutation(len(members)))
        chosen[members[picks[: round(fraction * len(members))]]] = True
    return chosen


def _check_normalization(mean: Sequence[float], std: Sequence[float], *, channels: int) -> None:
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std must have {channels} channels, got {mean} and {std}")
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise ValueError(f"mean must be in [0, 1] and std in (0, 1], got {mean} and {std}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

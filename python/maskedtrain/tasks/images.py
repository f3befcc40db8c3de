"""Classification of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskedtrain.data.images import BatchLoader, ImageConfig, ImageDataset, ImageSplit
from maskedtrain.methods.base import Plan
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.tasks import base
from maskedtrain.training.loop import evaluate, evaluation_mode, training_mode
from maskedtrain.training.losses import cross_entropy
from maskedtrain.training.scores import ACCURACY

__all__ = ["Task"]


class Task(base.Task):
    unit = "image"
    score = ACCURACY

    def describe(self, dataset: ImageDataset) -> dict[str, Any]:
        return {"image_shape": list(dataset.image_shape), "num_classes": dataset.num_classes}

    def model_arguments(self) -> dict[str, Any]:
        channels, *size = self.image_shape
        return {
            "in_channels": channels,
            "num_classes": self.description["num_classes"],
            "image_size": tuple(size),
        }

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.description["image_shape"])

    def train_batches(self) -> BatchLoader:
        return self._batches(self.dataset.train, training=True)

    def eval_batches(self, split: base.Split) -> BatchLoader:
        return self._batches(getattr(self.dataset, split), training=False)

    def _batches(self, split: ImageSplit, *, training: bool) -> BatchLoader:
        options = cast(ImageConfig, self.config.data)
        return BatchLoader(
            split,
            options.batch_size if training else options.eval_batch_size,
            mean=self.dataset.mean,
            std=self.dataset.std,
            augment=self.dataset.augment if training and options.augment else None,
            seed=self.config.run.seed,
            device=self.device,
            shuffle=training,
            drop_last=training,
            channels_last=self.config.run.channels_last,
        )

    def evaluate(
        self, model: nn.Module, subnet: SubNetwork, split: base.Split, *, final: bool = False
    ) -> dict[str, float]:
        batches = self.eval_batches(split)
        return asdict(evaluate(model, subnet, batches, cross_entropy, autocast=self.autocast))

    def batch_flops(self, plan: Plan) -> Callable[[Tensor], int]:
        # In training mode, which backward passes may depend on. Batch norm has to have more than a
        # single value per channel then: two images.
        images = torch.empty(2, *self.image_shape, device=self.device)
        with training_mode(plan.update.model):
            flops = plan.flops(images) // 2
        return lambda images: flops * len(images)

    def unit_flops(self, subnet: SubNetwork) -> float:
        image = torch.empty(1, *self.image_shape, device=self.device)
        with evaluation_mode(subnet.model):
            return subnet.flops(image)

    def example(self) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        # Two images: torch.export would take a batch of one for a constant.
        return (torch.zeros(2, *self.image_shape),), ({0: torch.export.Dim("batch")},)

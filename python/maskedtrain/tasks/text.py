"""Classification of sentences: token-budget batches, accuracy or Matthews correlation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from maskedtrain.data.text import TextBatches, TextConfig, TextDataset
from maskedtrain.data.vocabulary import EOS
from maskedtrain.methods.base import Plan
from maskedtrain.models.text_classifier import TextModelConfig
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.tasks import base
from maskedtrain.training.loop import evaluate, evaluation_mode, training_mode
from maskedtrain.training.losses import cross_entropy
from maskedtrain.training.scores import ACCURACY, MATTHEWS, Score

__all__ = ["Task", "matthews_correlation"]


class Task(base.Task):
    unit = "sentence"

    @property
    def score(self) -> Score:
        return {"accuracy": ACCURACY, "matthews": MATTHEWS}[self.options.score]

    @property
    def options(self) -> TextConfig:
        return cast(TextConfig, self.config.data)

    def load(self) -> TextDataset:
        return self.options.load(cast(TextModelConfig, self.config.model).vocabulary())

    def describe(self, dataset: TextDataset) -> dict[str, Any]:
        return {
            "vocabulary": dataset.vocabulary.digest,
            "vocab_size": len(dataset.vocabulary),
            "num_classes": dataset.num_classes,
            "mean_length": dataset.train.mean_lengths[0],
        }

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.dataset.vocabulary.save(folder / "vocabulary.json")

    def model_arguments(self) -> dict[str, Any]:
        sizes = self.description
        return {"vocab": sizes["vocab_size"], "num_classes": sizes["num_classes"]}

    def train_batches(self) -> TextBatches:
        return TextBatches(
            self.dataset.train,
            self.options.max_tokens,
            seed=self.config.run.seed,
            device=self.device,
            shuffle=True,
            buckets=self.options.buckets,
        )

    @property
    def shapes(self) -> int | None:
        return self.options.buckets

    def eval_batches(self, split: base.Split) -> TextBatches:
        return TextBatches(
            getattr(self.dataset, split), self.options.eval_max_tokens, device=self.device
        )

    def evaluate(
        self, model: nn.Module, subnet: SubNetwork, split: base.Split, *, final: bool = False
    ) -> dict[str, float]:
        classes = self.description["num_classes"]
        confusion = torch.zeros(classes**2, dtype=torch.int64, device=self.device)

        def counting(logits: Tensor, labels: Tensor) -> Tensor:
            pairs = classes * labels + logits.argmax(-1)
            confusion.add_(torch.bincount(pairs, minlength=classes**2))
            return cross_entropy(logits, labels)

        batches = self.eval_batches(split)
        found = asdict(evaluate(model, subnet, batches, counting, autocast=self.autocast))
        if self.score is MATTHEWS:
            found["matthews"] = matthews_correlation(confusion.view(classes, classes))
        return found

    def batch_flops(self, plan: Plan) -> Callable[[Tensor], int]:
        """A polynomial in the batch's sides, through counts of torch's: exact as long as the layers
        compute by the same form as in batches of the usual size.
        """
        B, S = self._usual_shape()
        # None longer: models may have a longest sentence.
        shapes = [(B, S), (2 * B, S), (2 * B, 2 * S // 3), (3 * B, S // 3)]
        with training_mode(plan.update.model):
            counts = [plan.flops(self._tokens(*shape)) for shape in shapes]
        coefficients = np.linalg.solve([_monomials(*shape) for shape in shapes], counts)
        return lambda tokens: round(float(coefficients @ _monomials(*tokens.shape)))

    def unit_flops(self, subnet: SubNetwork) -> float:
        """Of a sentence of mean length."""
        B, S = self._usual_shape()
        with evaluation_mode(subnet.model):
            return subnet.flops(self._tokens(B, S)) / B

    def _usual_shape(self) -> tuple[int, int]:
        """Sentences, and tokens of each, of a batch of mean lengths: at least 6, a third of which
        leaves a token beside the end.
        """
        length = max(6, round(self.description["mean_length"]))
        return max(1, self.options.max_tokens // length), length

    def _tokens(self, sentences: int, length: int) -> Tensor:
        return torch.full((sentences, length), EOS, device=self.device)

    def example(self) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        # Models may have a longest sentence, which the export finds out.
        axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
        return (torch.full((2, 7), EOS),), (axes,)


def matthews_correlation(confusion: Tensor) -> float:
    """Matthews correlation of predictions with labels, in [-1, 1], for any number of classes::

        (c s - t . p) / sqrt((s^2 - p . p) (s^2 - t . t))

    c right ones of s, t the labels' counts by class and p the predictions'; 0 where labels or
    predictions are all of one class.

    Args:
        confusion: counts ``[classes, classes]``, by label and prediction.

    Source: Gorodkin 2004, as scikit-learn's ``matthews_corrcoef``.
    """
    counts = confusion.double().cpu().numpy()
    c, s, t, p = counts.trace(), counts.sum(), counts.sum(1), counts.sum(0)
    spread = (s * s - p @ p) * (s * s - t @ t)
    return float((c * s - t @ p) / np.sqrt(spread)) if spread > 0 else 0.0


def _monomials(sentences: int, length: int) -> list[int]:
    """What costs are sums of: once a pass, once a sentence, linear layers, attention."""
    B, S = sentences, length
    return [1, B, B * S, B * S * S]

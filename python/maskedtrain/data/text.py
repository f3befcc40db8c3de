"""Labelled sentences as subword ids: the types every data set of texts to classify returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from maskedtrain.data._buckets import Shape
from maskedtrain.data.base import DataConfig
from maskedtrain.data.translation import Ragged, TokenBatches, TranslationSplit
from maskedtrain.data.vocabulary import Vocabulary

__all__ = ["Labelled", "TextBatches", "TextConfig", "TextDataset", "TextSplit"]

Labelled = tuple[list[str], list[int]]
"""Sentences and as many labels."""


@dataclass(frozen=True, eq=False)
class TextSplit(TranslationSplit):
    """Sentences and their labels: a label is a target of a single token."""

    @classmethod
    def of(cls, lines: Sequence[str], labels: Sequence[int], vocabulary: Vocabulary) -> TextSplit:
        """These sentences, as ids of the vocabulary."""
        target = Ragged(np.array(labels, np.int32), np.arange(len(labels) + 1))
        source = Ragged.of(vocabulary.encode_each(lines))
        return cls(source, target, list(lines), [str(label) for label in labels])

    @property
    def labels(self) -> NDArray[np.int32]:
        """In [0, classes), one for each sentence."""
        return self.target.ids


class TextBatches(TokenBatches):
    """Batches ``(tokens, labels)`` of sentences of about the same lengths.

    tokens int64 ``[B, S]`` end with eos and are padded on the right with 0; labels int64 ``[B]``.
    A batch has as many sentences as ``B * max(S, 2) <= max_tokens`` allows. Order, position and
    buckets are those of ``TokenBatches``.
    """

    def _load(self, index: NDArray[np.int64], shape: Shape | None) -> Any:
        (tokens, _), targets = super()._load(index, shape)
        # Behind the label there is a target's end.
        return tokens, targets[:, 0]


@dataclass(frozen=True, eq=False)
class TextDataset:
    """Labelled sentences, and the vocabulary that their ids are of; labels in [0, num_classes)."""

    name: str
    vocabulary: Vocabulary
    num_classes: int
    train: TextSplit
    val: TextSplit
    test: TextSplit


@dataclass(frozen=True)
class TextConfig(DataConfig):
    """What data sets of texts to classify have in common."""

    task = "text"
    num_classes: ClassVar[int] = 2
    score: ClassVar[Literal["accuracy", "matthews"]] = "accuracy"
    """What networks are compared by."""

    data: Path | None = None
    """Folder of the sentences; the variable MASKEDTRAIN_DATA where not given."""
    vocab_size: int = 8000
    """Subwords to learn, the 256 bytes and 4 special tokens among them; of no meaning to models
    that bring a vocabulary of their own."""
    max_tokens: int = 1024
    """Largest size of a batch, in padded tokens."""
    eval_max_tokens: int = 8192
    """The same of a batch of an evaluation."""
    buckets: int | None = None
    """Pad training batches to so few shapes, each of which a compiled model compiles by itself; to
    the smallest for each batch where not given."""
    val_sentences: int = 1000
    """Sentences held out of the training side to validate on."""
    train_part: tuple[float, float] = (0.0, 1.0)
    """Part of the other sentences to train on, from one share to another: 0 0.5 is a half, 0.5 1
    the other one. Vocabulary and validation do not depend on it."""
    split_seed: int = 0
    """Seed that draws the sentences to validate on and the parts."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "eval_max_tokens", "buckets", "val_sentences"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        start, stop = self.train_part
        if not 0 <= start < stop <= 1:
            raise ValueError(
                f"train_part must be two rising shares in [0, 1], got {start} and {stop}"
            )
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed must be >= 0 and < 2**32, got {self.split_seed}")

    def read(self) -> dict[str, Labelled]:
        """The sentences of the sides train and test."""
        raise NotImplementedError

    def load(self, vocabulary: Vocabulary | None = None) -> TextDataset:
        """Read the sentences, hold some out for validation, learn the vocabulary, make ids.

        Args:
            vocabulary: makes the ids; where there is none it is learned on all training sentences,
                whatever ``train_part`` says, but not on those held out.
        """
        sides = self.read()
        lines, labels = sides["train"]
        # RandomState, unlike Generator, promises a frozen stream.
        order = np.random.RandomState(self.split_seed).permutation(len(lines))
        val, rest = order[: self.val_sentences], order[self.val_sentences :]
        start, stop = (round(share * len(rest)) for share in self.train_part)
        if start == stop:
            raise ValueError(
                f"{self.name}: of {len(lines):,} sentences, {self.val_sentences:,} to validate on "
                f"(val_sentences) and train_part {self.train_part} leave none to train on"
            )
        if vocabulary is None:
            vocabulary = Vocabulary.train([lines[i] for i in np.sort(rest)], self.vocab_size)

        def chosen(index: NDArray[np.int64]) -> TextSplit:
            return TextSplit.of([lines[i] for i in index], [labels[i] for i in index], vocabulary)

        return TextDataset(
            self.name,
            vocabulary,
            self.num_classes,
            chosen(rest[start:stop]),
            chosen(val),
            TextSplit.of(*sides["test"], vocabulary),
        )

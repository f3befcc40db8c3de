"""Pairs of sentences as subword ids: the types every translation data set returns."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maskedtrain.data._files import cached
from maskedtrain.data.base import DataConfig
from maskedtrain.data.token_batches import TokenBatches
from maskedtrain.data.vocabulary import Vocabulary

__all__ = [
    "Pairs",
    "Ragged",
    "TokenBatches",
    "TranslationConfig",
    "TranslationDataset",
    "TranslationSplit",
]

Pairs = tuple[list[str], list[str]]
"""Source lines and target lines, as many of each."""

SPLITS = ("train", "val", "test")

# Of what is cached: another number whenever lines become other ids, or arrays have other names.
FORMAT = 2


@dataclass(frozen=True, eq=False)
class Ragged:
    """Sequences of ids of different lengths: sequence i is ``ids[offsets[i] : offsets[i + 1]]``."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> Ragged:
        """These sequences."""
        ids, offsets = array("i"), array("q", [0])
        for sequence in sequences:
            ids.extend(sequence)
            offsets.append(len(ids))
        return cls(np.array(ids, np.int32), np.array(offsets, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: NDArray[np.int64]) -> Ragged:
        """The sequences of these indices, in their order."""
        lengths = self.lengths[index]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        # Each sequence counts up from where it was.
        places = np.repeat(self.offsets[index] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.ids[places], offsets)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def padded(self, index: NDArray[np.int64], *, fill: int, width: int) -> NDArray[np.int64]:
        """The sequences of these indices as rows ``[len(index), width]``, filled up with ``fill``;
        ``width`` is at least their longest length.
        """
        chosen = self[index]
        rows = np.full((len(index), width), fill, np.int64)
        rows[np.arange(width) < chosen.lengths[:, None]] = chosen.ids
        return rows


@dataclass(frozen=True, eq=False)
class TranslationSplit:
    """Pairs of sentences: ids without bos and eos, and the lines they came from."""

    source: Ragged
    target: Ragged
    source_lines: list[str]
    target_lines: list[str]

    def __post_init__(self) -> None:
        counts = [len(self.source), len(self.target), len(self.source_lines)]
        counts.append(len(self.target_lines))
        if len(set(counts)) > 1:
            raise ValueError(f"both sides must have as many sentences, got {counts}")

    def __len__(self) -> int:
        return len(self.source)

    @property
    def mean_lengths(self) -> tuple[float, float]:
        """Tokens of a source and of a target sentence, with eos."""
        source, target = (float(side.lengths.mean()) + 1 for side in (self.source, self.target))
        return source, target

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ids."""
        found = hashlib.sha256()
        for side in (self.source, self.target):
            found.update(side.offsets.data)
            found.update(side.ids.data)
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class TranslationDataset:
    """Sentences in two languages, and the vocabularies that their ids are of.

    ``bleu_tokenizer`` is sacreBLEU's name for how lines of the target are split into what BLEU
    counts; ``notes`` says what was left out of the training data.
    """

    name: str
    source_language: str
    target_language: str
    source_vocabulary: Vocabulary
    target_vocabulary: Vocabulary
    train: TranslationSplit
    val: TranslationSplit
    test: TranslationSplit
    bleu_tokenizer: str = "13a"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TranslationConfig(DataConfig):
    """What data sets of translations have in common."""

    task = "translation"
    bleu_tokenizer = "13a"

    data: Path | None = None
    """Folder or file of the sentences; the variable MASKEDTRAIN_DATA where not given."""
    source: str = "de"
    """Language that is translated."""
    target: str = "en"
    """Language that it is translated to."""
    vocab_size: int = 8000
    """Subwords to learn, the 256 bytes and 4 special tokens among them."""
    vocabulary: Literal["joint", "shared", "separate"] = "joint"
    """Subwords are learned on both languages, each then having those that it uses; or one
    vocabulary is shared by both; or each language learns its own."""
    max_tokens: int = 4096
    """Largest size of a batch, in padded tokens of its longer side."""
    eval_max_tokens: int = 8192
    """The same of a batch of an evaluation."""
    buckets: int | None = None
    """Pad training batches to so few shapes, each of which a compiled model compiles by itself; to
    the smallest for each batch where not given."""
    max_length: int = 256
    """Longest sentence to train on, in tokens with its end; longer ones are left out."""
    val_beam: int = 1
    """Hypotheses of the search for validation BLEU during training; 1 is greedy."""
    beam: int = 5
    """Hypotheses of the search for results."""
    length_penalty: float = 1.0
    """Scores of hypotheses are log probabilities by their length to this power."""
    cache: Path | None = None
    """Folder for what is made of the sentences; the user's cache folder where not given."""

    def __post_init__(self) -> None:
        counts = ("max_tokens", "eval_max_tokens", "buckets", "max_length", "val_beam", "beam")
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens must be >= max_length = {self.max_length}, got {self.max_tokens}: "
                "a batch holds a sentence at least"
            )
        if self.source == self.target:
            raise ValueError(f"source and target must be two languages, got {self.source} twice")

    def read(self) -> dict[str, Pairs]:
        """The sentences of the splits train, val and test."""
        raise NotImplementedError

    def load(self) -> TranslationDataset:
        """Read the sentences, learn the vocabularies, make ids: through a cache.

        Training pairs with an empty side, or one longer than ``max_length``, are left out and
        counted in ``notes``; evaluation pairs never are, and an empty line is translated as one.
        """
        splits = self.read()
        splits["train"], empty = _without_empty(splits["train"])
        if not splits["train"][0]:
            raise ValueError(f"{self.name}: there is no sentence to train on")
        vocabularies, arrays = self._encoded(splits)
        found = {
            name: TranslationSplit(
                arrays[f"{name}-source"], arrays[f"{name}-target"], *splits[name]
            )
            for name in SPLITS
        }
        train, long = _without_long(found["train"], self.max_length)
        if len(train) == 0:
            raise ValueError(
                f"{self.name}: no training pair has at most {self.max_length} tokens (max_length)"
            )
        left_out = {"with an empty side": empty, f"of more than {self.max_length} tokens": long}
        return TranslationDataset(
            self.name,
            self.source,
            self.target,
            vocabularies[0],
            vocabularies[1],
            train,
            found["val"],
            found["test"],
            self.bleu_tokenizer,
            tuple(f"training pairs left out: {n:,} {what}" for what, n in left_out.items() if n),
        )

    def _encoded(self, splits: dict[str, Pairs]) -> tuple[list[Vocabulary], dict[str, Ragged]]:
        """Vocabularies of both sides and, by split and side, ids."""

        def make() -> dict[str, NDArray]:
            pair = self._learn(splits["train"])
            made: dict[str, NDArray] = {}
            for side, vocabulary in enumerate(pair):
                word = ("source", "target")[side]
                made[f"{word}-vocabulary"] = np.frombuffer(vocabulary.to_bytes(), np.uint8)
                for name in SPLITS:
                    ragged = Ragged.of(vocabulary.encode_each(splits[name][side]))
                    made[f"{name}-{word}-ids"] = ragged.ids
                    made[f"{name}-{word}-offsets"] = ragged.offsets
            return made

        counts = [len(splits[name][0]) for name in SPLITS]
        key = hashlib.sha256(repr((FORMAT, self.vocab_size, self.vocabulary, counts)).encode())
        for name in SPLITS:
            for side in splits[name]:
                key.update("\n".join([*side, ""]).encode())
        held = cached(f"{self.name}-{key.hexdigest()}", make, cache=self.cache)
        vocabularies = [
            Vocabulary.from_bytes(held[f"{word}-vocabulary"].tobytes())
            for word in ("source", "target")
        ]
        arrays = {
            f"{name}-{word}": Ragged(held[f"{name}-{word}-ids"], held[f"{name}-{word}-offsets"])
            for name in SPLITS
            for word in ("source", "target")
        }
        return vocabularies, arrays

    def _learn(self, train: Pairs) -> tuple[Vocabulary, Vocabulary]:
        source, target = train
        if self.vocabulary == "separate":
            return Vocabulary.train(source, self.vocab_size), Vocabulary.train(
                target, self.vocab_size
            )
        both = Vocabulary.train([*source, *target], self.vocab_size)
        if self.vocabulary == "shared":
            return both, both
        return both.used_on(source), both.used_on(target)


def _without_empty(pairs: Pairs) -> tuple[Pairs, int]:
    """The pairs that have words on both sides, and how many others there were."""
    kept = [(a, b) for a, b in zip(*pairs, strict=True) if a.strip() and b.strip()]
    return ([a for a, _ in kept], [b for _, b in kept]), len(pairs[0]) - len(kept)


def _without_long(split: TranslationSplit, max_length: int) -> tuple[TranslationSplit, int]:
    """The pairs of at most ``max_length`` tokens with eos, and how many others there were."""
    longest = np.maximum(split.source.lengths, split.target.lengths) + 1
    keep = np.flatnonzero(longest <= max_length)
    dropped = len(split) - len(keep)
    if not dropped:
        return split, 0
    lines = ([side[i] for i in keep] for side in (split.source_lines, split.target_lines))
    return TranslationSplit(split.source[keep], split.target[keep], *lines), dropped

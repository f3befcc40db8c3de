"""English number words and German ones: a translation task that needs no file.

Long words, and another order: "forty-two thousand, three hundred and twenty-one" is
"zweiundvierzigtausenddreihunderteinundzwanzig".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskedtrain.data.translation import Pairs, TranslationConfig

__all__ = ["Config"]


@dataclass(frozen=True)
class Config(TranslationConfig):
    """Number words, made by num2words."""

    name = "numbers"
    # A German number is one word: BLEU counts its letters.
    bleu_tokenizer = "char"

    source: str = "en"
    """Language that is translated, as num2words calls it."""
    target: str = "de"
    """Language that it is translated to, as num2words calls it."""
    vocab_size: int = 360
    """Subwords to learn, the 256 bytes and 4 special tokens among them."""
    max_length: int = 64
    """Longest number to train on, in tokens with its end; longer ones are left out."""
    largest: int = 999_999
    """Largest number."""
    train_pairs: int = 20_000
    """Numbers to train on."""
    eval_pairs: int = 500
    """Numbers to validate on, and as many others to test on."""
    split_seed: int = 0
    """Seed that draws the numbers and deals them to the splits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None:
            raise ValueError(f"numbers are made, not read: data must be None, got {self.data}")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed must be >= 0 and < 2**32, got {self.split_seed}")
        wanted = self.train_pairs + 2 * self.eval_pairs
        if min(self.train_pairs, self.eval_pairs) < 1 or wanted > self.largest + 1:
            raise ValueError(
                "train_pairs and eval_pairs must be >= 1 and take at most the "
                f"{self.largest + 1} numbers there are, got {self.train_pairs} and "
                f"{self.eval_pairs}"
            )

    def read(self) -> dict[str, Pairs]:
        """Numbers as words; no number is in two splits."""
        # RandomState, unlike Generator, promises a frozen stream.
        rng = np.random.RandomState(self.split_seed)
        sizes = self.train_pairs, self.eval_pairs, self.eval_pairs
        numbers = _spread(rng, self.largest, sum(sizes))
        parts = np.split(rng.permutation(numbers), np.cumsum(sizes)[:-1])
        names = ("train", "val", "test")
        return {
            name: (self._words(part, self.source), self._words(part, self.target))
            for name, part in zip(names, parts, strict=True)
        }

    def _words(self, numbers: NDArray[np.int64], language: str) -> list[str]:
        try:
            from num2words import num2words
        except ImportError as error:
            raise ImportError(
                'numbers need num2words: pip install "maskedtrain[text]"', name=error.name
            ) from error
        try:
            return [num2words(int(number), lang=language) for number in numbers]
        except NotImplementedError:
            raise ValueError(f"num2words has no language {language!r}") from None


def _spread(rng: np.random.RandomState, largest: int, count: int) -> NDArray[np.int64]:
    """Different numbers up to the largest, of every number of digits as far as there are enough: a
    quarter of what is still wanted of each length, short ones first, the rest of the longest.
    """
    found = np.empty(0, np.int64)
    low = 0
    while low <= largest:
        high = min(max(10, low * 10), largest + 1)
        wanted = count - len(found)
        share = min(wanted, high - low) if high > largest else min(wanted // 4, (high - low) // 2)
        found = _with_more(rng, found, low, high, share)
        low = high
    # More may have been wanted than the longest numbers are: take from all.
    return _with_more(rng, found, 0, largest + 1, count - len(found))


def _with_more(
    rng: np.random.RandomState, found: NDArray[np.int64], low: int, high: int, count: int
) -> NDArray[np.int64]:
    """The numbers found, and so many others of [low, high)."""
    if 2 * (len(found) + count) >= high - low:
        new = np.setdiff1d(np.arange(low, high), found)
    else:
        # Without making the whole range, which may be billions.
        new = np.empty(0, np.int64)
        while len(new) < count:
            drawn = rng.randint(low, high, 2 * count, np.int64)
            new = np.setdiff1d(np.concatenate((new, drawn)), found)
    return np.concatenate((found, rng.permutation(new)[:count]))

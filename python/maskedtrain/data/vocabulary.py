"""Vocabularies of subwords: byte-level BPE, which loses no character of any language."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from maskedtrain.files import atomic_write

__all__ = ["BOS", "EOS", "PAD", "UNK", "Vocabulary"]

PAD, BOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
"""The same in every vocabulary. Nothing is unknown; the place is customary."""

# Specials and the 256 bytes.
SMALLEST = len(SPECIAL) + 256

# Lines encoded at once, in parallel: what the library keeps of a line is far more than its ids.
CHUNK = 10_000


class Vocabulary:
    """Lines to subword ids and back, through a ``tokenizers.Tokenizer``.

    Words are split by byte-level BPE (Sennrich et al. 2016), so that every line can be written:
    ``decode(encode([line])[0])`` is ``" ".join(line.split())``: runs of white space become one
    space, and none at the ends. Ids hold no special tokens; ``<s>`` in a line is text.
    """

    def __init__(self, tokenizer: Any) -> None:
        # What looks like a special token in a text is not one.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, lines: Iterable[str], size: int) -> Vocabulary:
        """Merges learned on these lines, to ``size`` tokens with the special ones, fewer where the
        lines have no more to give. The same lines give the same vocabulary.

        Raises ValueError for a size under 260: special tokens and bytes.
        """
        if size < SMALLEST:
            raise ValueError(
                f"vocab_size must be >= {SMALLEST} (the 256 bytes and {len(SPECIAL)} special "
                f"tokens), got {size}"
            )
        tokenizers = _tokenizers()
        tokenizer = _byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """The ids of each line, without bos and eos; none for an empty line."""
        return list(self.encode_each(lines))

    def encode_each(self, lines: Sequence[str]) -> Iterator[list[int]]:
        """The same one by one, for lines whose ids together are too many to be Python's."""
        for start in range(0, len(lines), CHUNK):
            chunk = list(lines[start : start + CHUNK])
            yield from (found.ids for found in self._tokenizer.encode_batch_fast(chunk))

    def decode(self, ids: Sequence[int]) -> str:
        """The line that ids stand for; special tokens are left out. It is one line whatever the
        ids: a network may choose the byte of a line feed.
        """
        return " ".join(self._tokenizer.decode(list(ids)).split())

    def used_on(self, lines: Sequence[str]) -> Vocabulary:
        """The part of this vocabulary that splits these lines as the whole does: the tokens they
        consist of, what those were merged from, and every byte.
        """
        content = json.loads(self.to_bytes())
        whole: dict[str, int] = content["model"]["vocab"]
        names = {i: token for token, i in whole.items()}
        merges = [tuple(merge) for merge in content["model"]["merges"]]
        kept = {names[i] for ids in self.encode_each(lines) for i in ids}
        # A merge comes after those that its parts came from.
        for first, second in reversed(merges):
            if first + second in kept:
                kept |= {first, second}
        kept |= {token for token, i in whole.items() if i < SMALLEST}
        content["model"]["vocab"] = {
            token: i for i, token in enumerate(sorted(kept, key=lambda token: whole[token]))
        }
        content["model"]["merges"] = [
            [first, second] for first, second in merges if first + second in kept
        ]
        return Vocabulary(_tokenizers().Tokenizer.from_str(json.dumps(content)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what ``save`` writes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """What ``save`` writes."""
        return self._tokenizer.to_str().encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Vocabulary:
        """Inverse of ``to_bytes``; ValueError for anything else."""
        try:
            return cls(_tokenizers().Tokenizer.from_str(content.decode()))
        except ImportError:
            raise
        # The library raises bare exceptions.
        except Exception as error:
            raise ValueError(f"not a vocabulary: {error}") from None

    def save(self, path: Path) -> None:
        """Write the vocabulary as ``tokenizers`` JSON; raises OutputError."""
        with atomic_write(path) as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """The vocabulary that ``save`` wrote; ValueError where there is none."""
        try:
            return cls.from_bytes(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from None


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            'vocabularies need tokenizers: pip install "maskedtrain[text]"', name=error.name
        ) from error
    return tokenizers


def _byte_level(model: Any) -> Any:
    tokenizers = _tokenizers()
    normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer

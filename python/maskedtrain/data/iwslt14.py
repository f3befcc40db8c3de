"""IWSLT 2014 German-English, as fairseq's ``prepare-iwslt14.sh`` leaves it."""

from __future__ import annotations

from dataclasses import dataclass

from maskedtrain.data._files import find_root
from maskedtrain.data._parallel_text import read_pair, undo_bpe
from maskedtrain.data.translation import Pairs, TranslationConfig

__all__ = ["Config", "read_prepared"]


@dataclass(frozen=True)
class Config(TranslationConfig):
    """IWSLT14: the folder ``iwslt14.tokenized.de-en``, or the one it is in. Its text is tokenised
    and lower-cased; words that were split into subwords are made whole first."""

    name = "iwslt14"
    # The lines are tokenised already: this is the tokenised BLEU of the literature.
    bleu_tokenizer = "none"

    vocab_size: int = 10_000
    """Subwords to learn, the 256 bytes and 4 special tokens among them."""

    def read(self) -> dict[str, Pairs]:
        return read_prepared(self, "iwslt14.tokenized.de-en")


def read_prepared(config: TranslationConfig, folder_name: str) -> dict[str, Pairs]:
    """``train``, ``valid`` and ``test`` with the languages' endings, in the folder or in the one of
    that name within it.
    """
    root = find_root(config.data, config.name)
    folder = root / folder_name if (root / folder_name).is_dir() else root
    return {
        split: undo_bpe(read_pair(folder, [name], config.source, config.target))
        for split, name in {"train": "train", "val": "valid", "test": "test"}.items()
    }

"""WMT 2017 English-German, as fairseq's ``prepare-wmt14en2de.sh`` leaves it."""

from __future__ import annotations

from dataclasses import dataclass

from maskedtrain.data.iwslt14 import read_prepared
from maskedtrain.data.translation import Pairs, TranslationConfig

__all__ = ["Config"]


@dataclass(frozen=True)
class Config(TranslationConfig):
    """WMT17: the folder ``wmt17_en_de``, or the one it is in. Its text is tokenised; words that
    were split into subwords are made whole first."""

    name = "wmt17"
    # The lines are tokenised already: this is the tokenised BLEU of the literature.
    bleu_tokenizer = "none"

    source: str = "en"
    """Language that is translated."""
    target: str = "de"
    """Language that it is translated to."""
    vocab_size: int = 40_000
    """Subwords to learn, the 256 bytes and 4 special tokens among them."""

    def read(self) -> dict[str, Pairs]:
        return read_prepared(self, "wmt17_en_de")

"""Multi30k (Elliott et al. 2016): 29,000 captions of images in English and German, and more."""

from __future__ import annotations

from dataclasses import dataclass

from maskedtrain.data._files import find_root
from maskedtrain.data._parallel_text import read_pair
from maskedtrain.data.translation import Pairs, TranslationConfig

__all__ = ["Config"]


@dataclass(frozen=True)
class Config(TranslationConfig):
    """Multi30k: ``train``, ``val`` and ``test_2016_flickr`` with the languages' endings, as plain
    files or ``.gz``, in the folder, its ``raw``, or its ``multi30k/raw``."""

    name = "multi30k"

    test_set: str = "test_2016_flickr"
    """Name of the test set."""

    def read(self) -> dict[str, Pairs]:
        root = find_root(self.data, "multi30k")
        places = [root, root / "raw", root / "multi30k" / "raw"]
        folder = next((f for f in places if any(f.glob(f"train.{self.source}*"))), root)
        names = {"train": "train", "val": "val", "test": self.test_set}
        return {
            split: read_pair(folder, [name], self.source, self.target)
            for split, name in names.items()
        }

"""Translation data sets of the Hugging Face hub, by name."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from maskedtrain.data.translation import Pairs, TranslationConfig

__all__ = ["Config"]


@dataclass(frozen=True)
class Config(TranslationConfig):
    """A data set of the Hugging Face hub whose rows have a translation by language; needs the
    package datasets, and the network the first time."""

    name = "huggingface"

    path: str = "bentrevett/multi30k"
    """Name of the data set on the hub, such as wmt/wmt17."""
    subset: str | None = None
    """Its configuration, such as de-en, where it has several."""
    train_split: str = "train"
    """Its split to train on."""
    val_split: str = "validation"
    """Its split to validate on."""
    test_split: str = "test"
    """Its split to test on."""

    def read(self) -> dict[str, Pairs]:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                'the hub needs datasets: pip install "maskedtrain[hub]"', name=error.name
            ) from error
        place = None if self.data is None else str(self.data)
        loaded = datasets.load_dataset(self.path, self.subset, cache_dir=place)
        names = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        for name in names.values():
            if name not in loaded:
                raise ValueError(f"{self.path} has no split {name!r}, but {', '.join(loaded)}")
        return {split: self._pairs(loaded[name]) for split, name in names.items()}

    def _pairs(self, rows: Any) -> Pairs:
        pairs: Pairs = [], []
        for row in rows:
            # Either {"translation": {"de": ..., "en": ...}} or {"de": ..., "en": ...}.
            texts = row.get("translation", row)
            for side, language in zip(pairs, (self.source, self.target), strict=True):
                if language not in texts:
                    known = ", ".join(itertools.islice(texts, 10))
                    raise ValueError(f"{self.path} has no language {language!r}, but {known}")
                # A line feed would make two lines of what counts as one.
                side.append((texts[language] or "").replace("\n", " "))
        return pairs

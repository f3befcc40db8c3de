"""Any parallel text: files with one sentence a line, or one file with tabs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskedtrain.data._files import find_root
from maskedtrain.data._parallel_text import read_columns, read_pair, split_apart
from maskedtrain.data.translation import Pairs, TranslationConfig

__all__ = ["Config"]

NAMES = {"train": ["train"], "val": ["valid", "val", "dev"], "test": ["test"]}


@dataclass(frozen=True)
class Config(TranslationConfig):
    """Your own text: a folder with ``train.de``, ``train.en``, ``valid.de`` ... (``.gz``, too), or
    one file of tab-separated columns, which is split here."""

    name = "parallel"

    source_column: int = 1
    """Column of the source in a tab-separated file, from 0."""
    target_column: int = 0
    """Column of the target in a tab-separated file, from 0."""
    val_share: float = 0.01
    """Share of a tab-separated file that is for validation, about."""
    test_share: float = 0.01
    """Share of a tab-separated file that is for testing, about."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.source_column, self.target_column) < 0:
            raise ValueError(
                f"columns must be >= 0, got {self.source_column} and {self.target_column}"
            )
        if self.source_column == self.target_column:
            raise ValueError(f"columns must be two, got {self.source_column} twice")
        shares = self.val_share, self.test_share
        if not (min(shares) > 0 and sum(shares) < 1):
            raise ValueError(
                f"val_share and test_share must be > 0 and leave some to train on, got {shares}"
            )

    def read(self) -> dict[str, Pairs]:
        root = find_root(self.data, "parallel")
        if root.is_dir():
            return {
                split: read_pair(root, names, self.source, self.target)
                for split, names in NAMES.items()
            }
        return self._split(root)

    def _split(self, path: Path) -> dict[str, Pairs]:
        pairs = read_columns(path, self.source_column, self.target_column)
        found = split_apart(pairs, {"val": self.val_share, "test": self.test_share})
        for name, (lines, _) in found.items():
            if not lines:
                raise ValueError(f"{path}: {len(pairs[0])} pairs are too few: {name} got none")
        return found

"""Tasks of GLUE (Wang et al. 2018) in their tab-separated files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from maskedtrain.data._files import find_root
from maskedtrain.data._parallel_text import read_columns
from maskedtrain.data.text import Labelled, TextConfig

__all__ = ["GLUEConfig"]

_SIDES = {"train": "train", "test": "dev"}


@dataclass(frozen=True)
class GLUEConfig(TextConfig):
    """A task of GLUE with one sentence a row: ``train.tsv`` and ``dev.tsv``, plain or ``.gz``, in
    the folder or its sub-folder of the task's name. The labels of GLUE's own test side are not
    public: the test data here are its ``dev``.

    Quotation marks are characters of the sentences like any other.
    """

    folder: ClassVar[str]
    columns: ClassVar[tuple[int, int]]
    """Those of the sentence and the label, counted from 0."""
    header: ClassVar[tuple[str, str] | None] = None
    """What the first row says of the two columns, if it is not a sentence's."""

    def read(self) -> dict[str, Labelled]:
        root = find_root(self.data, self.name)
        places = [root, root / self.folder, root / "glue" / self.folder]
        place = next((folder for folder in places if _file(folder, "train")), root)
        return {side: self._rows(place, name) for side, name in _SIDES.items()}

    def _rows(self, folder: Path, name: str) -> Labelled:
        path = _file(folder, name)
        if path is None:
            raise FileNotFoundError(f"{folder} lacks {name}.tsv (or .gz) of {self.folder}")
        lines, labels = read_columns(path, *self.columns)
        first = 1
        if self.header is not None:
            found = (*lines[:1], *labels[:1])
            if found != self.header:
                raise ValueError(f"{path}, line 1: the columns must be {self.header}, got {found}")
            lines, labels, first = lines[1:], labels[1:], 2
        if not lines:
            raise ValueError(f"{path} holds no sentence")
        known = {str(label): label for label in range(self.num_classes)}
        for number, label in enumerate(labels, start=first):
            if label not in known:
                raise ValueError(
                    f"{path}, line {number}: the label must be one of {', '.join(known)}, "
                    f"got {label!r}"
                )
        return lines, [known[label] for label in labels]


def _file(folder: Path, name: str) -> Path | None:
    """The file of a side, plain or compressed, if there is one."""
    paths = [folder / f"{name}.tsv", folder / f"{name}.tsv.gz"]
    return next((path for path in paths if path.is_file()), None)

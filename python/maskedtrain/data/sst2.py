"""SST-2 (Socher et al. 2013) as GLUE has it: 67,349 phrases of film reviews, good or bad."""

from __future__ import annotations

from dataclasses import dataclass

from maskedtrain.data._glue import GLUEConfig

__all__ = ["Config"]


@dataclass(frozen=True)
class Config(GLUEConfig):
    """SST-2: sentiment of film reviews. Its test data are the 872 sentences of GLUE's dev side,
    whose test side has no public labels. Training phrases are parts of one another's sentences:
    validation, held out of them, flatters."""

    name = "sst2"
    folder = "SST-2"
    columns = 0, 1
    header = "sentence", "label"

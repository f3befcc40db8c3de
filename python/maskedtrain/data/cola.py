"""CoLA (Warstadt et al. 2019) as GLUE has it: 8,551 sentences, acceptable English or not."""

from __future__ import annotations

from dataclasses import dataclass

from maskedtrain.data._glue import GLUEConfig

__all__ = ["Config"]


@dataclass(frozen=True)
class Config(GLUEConfig):
    """CoLA: linguistic acceptability, by Matthews correlation. Its test data are the 1,043
    sentences of GLUE's dev side, whose test side has no public labels."""

    name = "cola"
    folder = "CoLA"
    columns = 3, 1
    score = "matthews"

    val_sentences: int = 500
    """Sentences held out of the training side to validate on."""

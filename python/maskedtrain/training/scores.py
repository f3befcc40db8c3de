"""What networks are compared by, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ACCURACY", "BLEU", "MATTHEWS", "Score"]


@dataclass(frozen=True)
class Score:
    """A field of an evaluation of which more is better; shown as ``scale`` times its value."""

    name: str
    label: str
    short: str
    scale: float = 1.0
    unit: str = ""

    def text(self, value: float, *, short: bool = False) -> str:
        """Such as "accuracy 93.4 %"."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.short if short else self.label} {self.scale * value:.1f}{unit}"

    @property
    def axis(self) -> str:
        """What an axis of a plot is called."""
        return f"validation {self.label}" + (f" ({self.unit})" if self.unit else "")


ACCURACY = Score("accuracy", "accuracy", "acc", 100.0, "%")
BLEU = Score("bleu", "BLEU", "BLEU")
MATTHEWS = Score("matthews", "Matthews correlation", "MCC", 100.0, "%")

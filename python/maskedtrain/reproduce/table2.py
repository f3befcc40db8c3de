"""Table 2 of "Masked Training of Neural Networks with Partial Gradients" (AISTATS 2022): narrow
cores of a Transformer, BLEU on IWSLT14 and WMT17.
"""

from __future__ import annotations

from maskedtrain.reproduce._translation import Ratio, large, small, translation_table, whole
from maskedtrain.reproduce.tables import Quoted, Scale, Table, TableConfig

__all__ = ["Config"]

_IWSLT14 = [
    Ratio(1 / 4, Quoted(31.29, 0.27), Quoted(31.59, 0.18), Quoted(31.95, 0.35)),
    Ratio(1 / 32, Quoted(23.58, 0.58), Quoted(23.84, 0.25), Quoted(30.41, 0.40)),
]
_IWSLT14_STANDARD = Quoted(32.48, 0.32)
_WMT17 = Ratio(1 / 32, Quoted(20.47, 0.34), Quoted(20.08, 0.40), Quoted(25.46, 0.17))
_WMT17_STANDARD = Quoted(26.41, 0.14)
_BESIDE = "Table 2a: IWSLT14, Transformer 6 + 6 layers, d = 512"


class Config(TableConfig):
    """Narrow cores in translation."""

    name = "table2"

    def tables(self, scale: Scale) -> list[Table]:
        if scale == "paper":
            return [
                translation_table(
                    "Table 2a, IWSLT14, narrow core",
                    _BESIDE,
                    preset_name="iwslt14-width",
                    kind="width",
                    ratios=_IWSLT14,
                    standard=_IWSLT14_STANDARD,
                    adapt=whole,
                ),
                translation_table(
                    "Table 2b, WMT17, narrow core",
                    "Table 2b: WMT17, Transformer 6 + 6 layers, d = 512",
                    preset_name="wmt17-lowrank",
                    kind="width",
                    ratios=[_WMT17],
                    standard=_WMT17_STANDARD,
                    adapt=whole,
                ),
            ]
        return [
            translation_table(
                "Table 2, Multi30k, narrow core",
                _BESIDE,
                preset_name="multi30k-lowrank",
                kind="width",
                # The hour goes to the smallest core, beside which the full network loses most.
                ratios=_IWSLT14[1:],
                standard=_IWSLT14_STANDARD,
                adapt=small if scale == "cpu" else large,
            )
        ]

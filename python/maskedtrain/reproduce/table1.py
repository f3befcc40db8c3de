"""Table 1 of "Masked Training of Neural Networks with Partial Gradients" (AISTATS 2022): low-rank
cores of a Transformer, BLEU on IWSLT14 and WMT17.
"""

from __future__ import annotations

from maskedtrain.reproduce._translation import Ratio, large, small, translation_table, whole
from maskedtrain.reproduce.tables import Quoted, Scale, Table, TableConfig

__all__ = ["Config"]

_IWSLT14 = {
    4: Ratio(1 / 4, Quoted(28.96, 0.04), Quoted(29.15, 0.63), Quoted(31.34, 0.36)),
    8: Ratio(1 / 8, Quoted(27.87, 0.11), Quoted(28.20, 0.48), Quoted(31.62, 0.13)),
    32: Ratio(1 / 32, Quoted(17.95, 3.65), Quoted(24.03, 0.77), Quoted(31.20, 0.58)),
}
_IWSLT14_STANDARD = Quoted(32.48, 0.32)
_WMT17 = Ratio(1 / 32, Quoted(23.20, 0.09), Quoted(23.18, 0.12), Quoted(25.50, 0.22))
_WMT17_STANDARD = Quoted(26.41, 0.14)
_BESIDE = "Table 1a: IWSLT14, Transformer 6 + 6 layers, d = 512"


class Config(TableConfig):
    """Low-rank cores in translation."""

    name = "table1"

    def tables(self, scale: Scale) -> list[Table]:
        if scale == "paper":
            return [
                translation_table(
                    "Table 1a, IWSLT14, low-rank core",
                    _BESIDE,
                    preset_name="iwslt14-lowrank",
                    kind="lowrank",
                    ratios=list(_IWSLT14.values()),
                    standard=_IWSLT14_STANDARD,
                    adapt=whole,
                ),
                translation_table(
                    "Table 1b, WMT17, low-rank core",
                    "Table 1b: WMT17, Transformer 6 + 6 layers, d = 512",
                    preset_name="wmt17-lowrank",
                    kind="lowrank",
                    ratios=[_WMT17],
                    standard=_WMT17_STANDARD,
                    adapt=whole,
                ),
            ]
        return [
            translation_table(
                "Table 1, Multi30k, low-rank core",
                _BESIDE,
                preset_name="multi30k-lowrank",
                kind="lowrank",
                ratios=[_IWSLT14[4], _IWSLT14[32]],
                standard=_IWSLT14_STANDARD,
                adapt=small if scale == "cpu" else large,
                twice=[_IWSLT14[32]] if scale == "cpu" else [],
            )
        ]

"""measure a figure of the papers, and say if it shows what they say"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence

from maskedtrain import reproduce
from maskedtrain.commands._options import parse
from maskedtrain.config import unknown_name
from maskedtrain.training.console import Console


def main(arguments: Sequence[str], console: Console) -> None:
    """The name of a figure, then its options."""
    figures = reproduce.configs()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    name, *rest = arguments
    if name not in figures:
        raise unknown_name("figure", name, figures)
    config = parse(figures[name], rest, command=f"reproduce {name}")
    reproduce.reproduce(config, console)


def _usage() -> str:
    lines = [
        "usage: maskedtrain reproduce FIGURE [options]    (FIGURE --help lists them)",
        "",
        "Measure a figure, write FIGURE.csv and FIGURE.png, and say what of the paper's",
        "statements about it holds.",
        "",
    ]
    for name, config in reproduce.configs().items():
        about = " ".join((inspect.getdoc(config) or "").split())
        lines += textwrap.wrap(
            f"  {name:<14} {about.split('. ')[0].rstrip('.')}",
            width=80,
            subsequent_indent=" " * 17,
        )
    return "\n".join(lines)

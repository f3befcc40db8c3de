"""train a network and its sub-networks together, or resume a run"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskedtrain import data, methods, models
from maskedtrain.commands._options import parse, take
from maskedtrain.config import NEUTRAL, TrainConfig, to_dict, unknown_name
from maskedtrain.presets import PRESETS, preset
from maskedtrain.training.console import Console
from maskedtrain.training.run import read_config
from maskedtrain.training.train import train

# Parts of the configuration that are chosen by name, by their flags.
_PARTS: dict[str, tuple[str, Callable[[], Mapping[str, Callable[[], Any]]]]] = {
    "dataset": ("data", data.configs),
    "model": ("model", models.configs),
    "method": ("method", methods.configs),
}

# What may differ when a run goes on: nothing that the next step depends on.
_FREE = NEUTRAL | {"max_steps", "eval_every"}


def main(arguments: Sequence[str], console: Console) -> None:
    """Options: ``--preset NAME``, ``--resume RUN``, a ``--part NAME`` for each of ``_PARTS``, then
    single values.
    """
    resumed, rest = take(arguments, "--resume")
    named, rest = take(rest, "--preset")
    chosen: dict[str, str] = {}
    for flag in _PARTS:
        name, rest = take(rest, f"--{flag}")
        if name is not None:
            chosen[flag] = name
    if resumed is None:
        default = TrainConfig() if named is None else preset(named)
    elif named is not None or chosen:
        flag = "preset" if named is not None else next(iter(chosen))
        raise ValueError(f"--resume goes on with a run as it was: no --{flag}")
    else:
        default = read_config(Path(resumed))
    for flag, name in chosen.items():
        part, configs = _PARTS[flag]
        if name not in configs():
            raise unknown_name(flag, name, configs())
        # What a preset says of this part stays if it is of the same name.
        if name != getattr(default, part).name:
            default = replace(default, **{part: configs()[name]()})
    config = parse(TrainConfig, rest, command="train", default=default, about=_about())
    if resumed is not None:
        _check_unchanged(default, config)
    found = train(config, console, resume=resumed is not None)
    console.print()
    console.results_table(found.results)
    for remark in found.remarks:
        console.print(remark)
    console.print(f"\nwritten to {config.run.out}")


def _check_unchanged(before: TrainConfig, after: TrainConfig) -> None:
    old, new = to_dict(before), to_dict(after)
    for group, values in old.items():
        for name, value in values.items():
            if name not in _FREE and new[group][name] != value:
                raise ValueError(
                    f"--{name.replace('_', '-')} cannot change when a run goes on: "
                    f"it is {value}, got {new[group][name]}"
                )


def _about() -> str:
    """The part of the help on what is not an option of the configuration."""
    entries = {
        "--preset NAME": f"Start from a preset: {', '.join(PRESETS)}",
        "--resume RUN": "Go on with the run in this folder, bitwise as if never stopped.",
        "--dataset NAME": f"Data set, its own options below: {', '.join(data.configs())}",
        "--model NAME": f"Model, its own options below: {', '.join(models.configs())}",
        "--method NAME": f"Training method, its own options below: {', '.join(methods.configs())}",
    }
    lines = ["Train a network and its sub-networks together, or resume a run."]
    for flag, text in entries.items():
        lines.append(f"  {flag}")
        lines += (" " * 6 + line for line in textwrap.wrap(text, 70, break_on_hyphens=False))
    return "\n".join(lines)

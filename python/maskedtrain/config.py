"""What a training run is: one typed configuration, made by a preset, the command line or a file."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from maskedtrain import data, methods, models
from maskedtrain.data import DataConfig
from maskedtrain.data.digits import Config as DigitsConfig
from maskedtrain.methods import MethodConfig
from maskedtrain.methods.ats import Config as ATSConfig
from maskedtrain.models import ModelConfig
from maskedtrain.models.resnet import Config as ResNetConfig
from maskedtrain.patterns import near

__all__ = [
    "NEUTRAL",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "flag",
    "flags",
    "from_dict",
    "to_dict",
    "unknown_name",
]


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """MaskedSGD or MaskedAdamW."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov momentum of sgd."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of adamw's moments."""
    eps: float = 1e-8
    """Added to the root of adamw's second moment."""
    weight_decay: float = 5e-4
    """Weight decay: coupled for sgd, decoupled for adamw."""
    label_smoothing: float = 0.0
    """Share of a target's probability that is spread evenly over the wrong classes."""
    schedule: Literal["cosine", "multistep", "constant", "inverse_sqrt"] = "cosine"
    """Learning rate after warm-up: to 0 by a cosine, divided by 10 at milestones, constant, or with
    the inverse square root of the step."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Milestones of the multistep schedule, as shares of all steps."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly to its peak; inverse_sqrt needs some."""
    warmup_init_lr: float = 0.0
    """Learning rate of the first step of inverse_sqrt's warm-up."""
    alpha: Literal["one", "auto"] = "one"
    """Step-size factor of partial SGD: 1, or auto for that of Theorem 1, measured on each step's
    mini-batch at the cost of the step's passes again and one of the whole network, where it is not
    1 anyway. It multiplies the learning rate; training FLOPs leave the measuring out."""
    clip_grad_norm: float | None = None
    """Largest norm of the gradient; larger ones are scaled down to it."""
    accumulate: int = 1
    """Mini-batches whose gradients are averaged for one step."""

    def __post_init__(self) -> None:
        _at_least(1, accumulate=self.accumulate)
        for name in ("lr", "warmup_steps", "warmup_init_lr", "weight_decay", "eps"):
            _at_least(0, **{name: getattr(self, name)})
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.schedule == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError("inverse_sqrt needs warmup_steps >= 1, got 0")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be > 0, got {self.clip_grad_norm}")


@dataclass(frozen=True)
class RunConfig:
    """Length, output, hardware."""

    out: Path = Path("runs/latest")
    """Folder of the run: checkpoints, metrics, plots."""
    epochs: float = 10.0
    """Length of the run and of its schedule, in passes over the training data."""
    init_from: Path | None = None
    """Weights to start from: the folder of a run (its newest checkpoint), or a safetensors file; of
    the same model, as extract writes them."""
    max_steps: int | None = None
    """Stop after so many steps, in the middle of the schedule; --resume goes on from there."""
    eval_every: int | None = None
    """Steps between evaluations; an epoch where not given."""
    save_every: int | None = None
    """Steps between checkpoints; an epoch where not given."""
    keep_last: int = 2
    """Checkpoints to keep, and to average at most."""
    select: Literal["last", "best"] = "last"
    """Weights that a network's results are of: the last, or its best ones on the validation data,
    which are kept beside the last checkpoints."""
    log_every: int = 10
    """Steps of each network between two lines of its loss in metrics.jsonl."""
    measure_every: int | None = None
    """Steps between measurements of the criteria of partial SGD (alpha, c_norm, c_sim, c_align, q,
    drift) for metrics.jsonl, each at the cost of two steps or so; never where not given."""
    measure_layers: bool = False
    """With them, those of every layer (the parameters of each module); at no cost but the lines."""
    measure_smoothness: bool = False
    """With them, an estimate of the smoothness L and whether Assumption 3 holds, at the cost of
    some twenty products with the Hessian, of two gradients or so each."""
    seed: int = 0
    """Seed of initialisation, batches and augmentation."""
    device: str = "auto"
    """Device, such as cpu or cuda; auto takes cuda where there is one."""
    bf16: bool = False
    """Forward passes in bfloat16 (autocast); parameters and optimizer stay float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Convolutions in channels-last layout."""
    threads: int | None = None
    """CPU threads; torch's own choice where not given."""

    def __post_init__(self) -> None:
        _at_least(1, keep_last=self.keep_last, log_every=self.log_every)
        for name in ("max_steps", "eval_every", "save_every", "measure_every", "threads"):
            if (value := getattr(self, name)) is not None:
                _at_least(1, **{name: value})
        if not self.epochs > 0:
            raise ValueError(f"epochs must be > 0, got {self.epochs}")
        for name in ("measure_layers", "measure_smoothness"):
            if getattr(self, name) and self.measure_every is None:
                raise ValueError(f"{name} needs measure_every, which says when")


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    data: DataConfig = field(default_factory=DigitsConfig)
    model: ModelConfig = field(default_factory=ResNetConfig)
    method: MethodConfig = field(default_factory=ATSConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


NEUTRAL = {"data", "device", "threads", "save_every", "keep_last", "log_every"}
"""Options, by name, that say where and how a training runs, and not what it does."""


def flags(config: TrainConfig, base: TrainConfig) -> list[str]:
    """Options of ``maskedtrain train`` that make ``config`` of ``base``.

    Raises:
        ValueError: their data set, model or method is another: no option changes that.
    """
    found: list[str] = []
    before = to_dict(base)
    for group, values in to_dict(config).items():
        for name, value in values.items():
            if value == before[group].get(name):
                continue
            if name == "name":
                raise ValueError(f"{group} must be {before[group][name]}, got {value}")
            found += flag(name, value)
    return found


def flag(name: str, value: Any) -> list[str]:
    """The words by which the command line takes an option, its value as ``to_dict`` has it."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    several = cast("list[Any]", value) if isinstance(value, list) else [value]
    return [f"--{dashed}", *map(str, several)]


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON-ready values; ``from_dict`` is the inverse."""
    result = cast("dict[str, Any]", _encode(config))
    for part in ("data", "model", "method"):
        result[part] = {"name": getattr(config, part).name, **result[part]}
    return result


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that ``to_dict`` wrote.

    Raises:
        ValueError: unknown names or values of the wrong type.
    """
    return cast(TrainConfig, _decode(TrainConfig, values, "config"))


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among the known ones, with the nearest of them."""
    known = sorted(known)
    return ValueError(f"unknown {kind} {name!r}{near(name, known)} (known: {', '.join(known)})")


# Parts of a configuration that are one of several classes, each known by a name.
_NAMED: dict[Any, Callable[[], Mapping[str, type[Any]]]] = {
    DataConfig: data.configs,
    ModelConfig: models.configs,
    MethodConfig: methods.configs,
}


def _at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_encode(item) for item in cast("tuple[Any, ...]", value)]
    return str(value) if isinstance(value, Path) else value


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _NAMED:
        known = _NAMED[kind]()
        name = value.get("name") if isinstance(value, Mapping) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if not isinstance(name, str):
            raise ValueError(f"{where} must be a table with a name, got {value!r}")
        if name not in known:
            raise unknown_name(where, name, known)
        rest = {
            key: item for key, item in cast("Mapping[str, Any]", value).items() if key != "name"
        }
        return _decode(known[name], rest, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table, got {value!r}")
        hints = typing.get_type_hints(kind)
        fields = {f.name for f in dataclasses.fields(kind)}
        for key in cast("Mapping[str, Any]", value):
            if key not in fields:
                raise unknown_name(f"option of {where}", key, fields)
        decoded = {
            key: _decode(hints[key], item, f"{where}.{key}")
            for key, item in cast("Mapping[str, Any]", value).items()
        }
        return cast(Any, kind)(**decoded)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {list(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        length = len(cast("list[Any]", value))
        if arguments[-1] is not Ellipsis and length != len(arguments):
            raise ValueError(f"{where} must hold {len(arguments)} values, got {value!r}")
        return tuple(_decode(arguments[0], item, where) for item in cast("list[Any]", value))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}")
    return value

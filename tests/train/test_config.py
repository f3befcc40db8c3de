"""Configurations: presets, there and back through JSON, and what is refused with which words."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from maskedtrain.config import (
    OptimConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    to_dict,
    unknown_name,
)
from maskedtrain.data import configs as data_sets
from maskedtrain.data.cifar10 import Config as CIFAR10Config
from maskedtrain.data.digits import Config as DigitsConfig
from maskedtrain.data.translation import TranslationConfig
from maskedtrain.discovery import find_configs
from maskedtrain.methods import MethodConfig
from maskedtrain.methods.ats import Config as ATSConfig
from maskedtrain.methods.slimmable import Config as SlimmableConfig
from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.models import configs as models
from maskedtrain.models import resnet18
from maskedtrain.models.resnet import Config as ResNetConfig
from maskedtrain.models.transformer import Config as TransformerConfig
from maskedtrain.presets import PRESETS, preset

EVERYTHING = TrainConfig(
    CIFAR10Config(data=Path("some where"), image_size=16, batch_size=7, augment=False),
    ResNetConfig(depth=50, stem="imagenet", width=16),
    SlimmableConfig(ratios=(0.75, 0.25), round_to=8),
    OptimConfig("adamw", lr=1e-3, betas=(0.8, 0.95), milestones=(), clip_grad_norm=1.5),
    RunConfig(
        Path("out"),
        epochs=0.5,
        init_from=Path("before"),
        max_steps=20,
        device="cpu",
        bf16=True,
        threads=2,
    ),
)
CONFIGS = {**PRESETS, "default": TrainConfig(), "everything": EVERYTHING}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back_through_json(config: TrainConfig) -> None:
    written = json.dumps(to_dict(config))
    read = from_dict(json.loads(written))
    assert read == config
    # Equality is blind to 1 for 1.0 and a list's tuple; what is written next is not.
    assert json.dumps(to_dict(read)) == written
    assert type(read.method) is type(config.method) and type(read.model) is type(config.model)


def test_what_is_written_is_readable() -> None:
    written = to_dict(EVERYTHING)
    assert written["data"]["data"] == "some where" and written["data"]["image_size"] == 16
    assert written["model"] == {"name": "resnet", "depth": 50, "stem": "imagenet", "width": 16}
    assert written["method"] == {
        "name": "slimmable", "core": "width", "ratios": [0.75, 0.25], "round_to": 8,
        "sandwich": None,
    }  # fmt: skip
    assert written["optim"]["betas"] == [0.8, 0.95] and written["run"]["max_steps"] == 20


def test_what_is_left_out_is_the_default() -> None:
    assert from_dict({}) == TrainConfig()
    read = from_dict({"method": {"name": "standard"}, "optim": {"lr": 1}, "run": {"out": "here"}})
    assert read == TrainConfig(
        method=StandardConfig(), optim=OptimConfig(lr=1.0), run=RunConfig(Path("here"))
    )
    assert type(read.optim.lr) is float


Change = Callable[[dict[str, Any]], Any]


def setting(path: str, value: Any) -> Change:
    def change(written: dict[str, Any]) -> None:
        *tables, key = path.split(".")
        for table in tables:
            written = written[table]
        written[key] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "run.epoch",
            3,
            r"unknown option of config\.run 'epoch'; did you mean epochs\? \(known: .*",
        ),
        ("optimizer", {}, r"unknown option of config 'optimizer'; did you mean optim\?"),
        ("method.ratio", 0.5, r"unknown option of config\.method 'ratio'; did you mean ratios\?"),
        (
            "method.name",
            "atss",
            r"unknown config\.method 'atss'; did you mean ats\? \(known: ats, ",
        ),
        ("model.name", "vgg", r"unknown config\.model 'vgg' \(known: .*mlp, resnet, .*wide_deep\)"),
        ("method", {"ratios": [0.5]}, r"config\.method must be a table with a name, got {'ratios'"),
        ("model", "resnet", r"config\.model must be a table with a name, got 'resnet'"),
        ("data", 3, r"config\.data must be a table with a name, got 3"),
        ("data.batch_size", "64", r"config\.data\.batch_size must be int, got '64'"),
        ("data.batch_size", 64.0, r"config\.data\.batch_size must be int, got 64\.0"),
        ("data.batch_size", True, r"config\.data\.batch_size must be int, got True"),
        ("data.batch_size", None, r"config\.data\.batch_size must be int, got None"),
        ("data.image_size", "16", r"config\.data\.image_size must be int, got '16'"),
        ("data.name", "mnist", r"unknown config\.data 'mnist' \(known: cifar10, cola, digits"),
        ("data.augment", 1, r"config\.data\.augment must be bool, got 1"),
        ("optim.lr", "0.1", r"config\.optim\.lr must be float, got '0\.1'"),
        ("optim.lr", True, r"config\.optim\.lr must be float, got True"),
        ("optim.betas", 0.9, r"config\.optim\.betas must be a list, got 0\.9"),
        ("optim.betas", [0.9], r"config\.optim\.betas must hold 2 values, got \[0\.9\]"),
        ("optim.betas", [0.9, "x"], r"config\.optim\.betas must be float, got 'x'"),
        (
            "optim.optimizer",
            "sdg",
            r"config\.optim\.optimizer must be one of \['sgd', 'adamw'\], got",
        ),
        ("model.depth", 20, r"config\.model\.depth must be one of \[8, 18, 34, 50\], got 20"),
        ("run.max_steps", 1.5, r"config\.run\.max_steps must be int, got 1\.5"),
    ],
)
def test_unknown_names_and_wrong_types(path: str, value: Any, message: str) -> None:
    written = to_dict(TrainConfig())
    setting(path, value)(written)
    before = copy.deepcopy(written)
    with pytest.raises(ValueError, match=f"^{message}"):
        from_dict(written)
    assert written == before


def test_a_configuration_is_a_table() -> None:
    with pytest.raises(ValueError, match=r"^config must be a table, got \[1\]"):
        from_dict([1])


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (DigitsConfig, {"batch_size": 0}, "batch_size must be >= 1, got 0"),
        (DigitsConfig, {"eval_batch_size": -1}, "eval_batch_size must be >= 1, got -1"),
        (OptimConfig, {"lr": -0.1}, "lr must be >= 0, got -0.1"),
        (OptimConfig, {"lr": NAN}, "lr must be >= 0, got nan"),
        (OptimConfig, {"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
        (OptimConfig, {"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        (OptimConfig, {"accumulate": 0}, "accumulate must be >= 1, got 0"),
        (OptimConfig, {"clip_grad_norm": 0.0}, "clip_grad_norm must be > 0, got 0.0"),
        (RunConfig, {"epochs": 0.0}, "epochs must be > 0, got 0.0"),
        (RunConfig, {"epochs": NAN}, "epochs must be > 0, got nan"),
        (RunConfig, {"max_steps": 0}, "max_steps must be >= 1, got 0"),
        (RunConfig, {"eval_every": 0}, "eval_every must be >= 1, got 0"),
        (RunConfig, {"save_every": -5}, "save_every must be >= 1, got -5"),
        (RunConfig, {"keep_last": 0}, "keep_last must be >= 1, got 0"),
        (RunConfig, {"log_every": 0}, "log_every must be >= 1, got 0"),
        (RunConfig, {"threads": 0}, "threads must be >= 1, got 0"),
    ],
)
def test_values_out_of_range(make: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(**values)
    section = {DigitsConfig: "data", OptimConfig: "optim", RunConfig: "run"}[make]
    named = {"name": "digits", **values} if section == "data" else values
    with pytest.raises(ValueError, match=f"{message}$"):
        from_dict({section: named})


def test_values_at_the_edge() -> None:
    DigitsConfig(batch_size=1)
    OptimConfig(lr=0.0, weight_decay=0.0, warmup_steps=0, accumulate=1, clip_grad_norm=1e-6)
    RunConfig(epochs=0.01, max_steps=1, keep_last=1, threads=1)


def test_configurations_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().run.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


# Presets


IMAGES = ("digits-resnet8", "cifar10-resnet18")
TEXT = (
    "sst2-width",
    "numbers-lowrank",
    "multi30k-lowrank",
    "iwslt14-lowrank",
    "iwslt14-width",
    "wmt17-lowrank",
)


def test_presets_are_the_rows_of_the_experiments() -> None:
    expected = {f"{name}-{row}" for name in IMAGES for row in ("core", "full", "ats", "slimmable")}
    expected |= {name + row for name in TEXT for row in ("", "-core", "-full")}
    assert set(PRESETS) == expected
    for name, config in PRESETS.items():
        assert preset(name) is config
        assert config.run.out == Path("runs", name)
        assert config.model.task == config.data.task


@pytest.mark.parametrize("name", TEXT)
def test_rows_of_a_translation_differ_by_method_alone(name: str) -> None:
    rows = {row: preset(name + row) for row in ("", "-core", "-full")}
    for config in rows.values():
        same = dataclasses.replace(config, method=rows[""].method, run=rows[""].run)
        assert same == rows[""]
        assert dataclasses.replace(config.run, out=Path()) == dataclasses.replace(
            rows[""].run, out=Path()
        )
    ats, core = rows[""].method, rows["-core"].method
    assert isinstance(ats, ATSConfig) and isinstance(core, StandardConfig)
    # The ratio of one is that of the other.
    assert (ats.core, ats.ratios) == (core.core, (core.ratio,)) == (name.split("-")[1], ats.ratios)
    assert rows["-full"].method == StandardConfig("full")


def test_the_papers_recipes_of_translation() -> None:
    iwslt, wmt = preset("iwslt14-lowrank"), preset("wmt17-lowrank")
    assert iwslt.model == TransformerConfig(
        d_model=512, ffn=1024, heads=4, encoder_layers=6, decoder_layers=6, norm="post", dropout=0.3
    )
    assert wmt.model == dataclasses.replace(
        iwslt.model, ffn=2048, heads=8, dropout=0.1, tie_output=False
    )
    o = iwslt.optim
    assert (o.optimizer, o.lr, o.betas, o.eps) == ("adamw", 5e-4, (0.9, 0.98), 1e-9)
    assert (o.schedule, o.warmup_steps, o.warmup_init_lr) == ("inverse_sqrt", 4000, 0.0)
    assert (o.weight_decay, o.label_smoothing) == (1e-4, 0.1)
    assert wmt.optim == dataclasses.replace(o, lr=7e-4, warmup_init_lr=1e-7, weight_decay=0.0)
    assert (iwslt.run.epochs, wmt.run.epochs) == (30, 22)
    for config, max_tokens, vocab in ((iwslt, 12_000, 10_000), (wmt, 18_000, 40_000)):
        assert isinstance(config.data, TranslationConfig)
        assert (config.data.max_tokens, config.data.vocab_size) == (max_tokens, vocab)
        assert (config.data.beam, config.data.length_penalty) == (5, 1.0)


@pytest.mark.parametrize("name", ["digits-resnet8", "cifar10-resnet18"])
def test_rows_of_an_experiment_differ_by_method_alone(name: str) -> None:
    rows = {row: preset(f"{name}-{row}") for row in ("core", "full", "ats", "slimmable")}
    for config in rows.values():
        same = dataclasses.replace(config, method=rows["ats"].method, run=rows["ats"].run)
        assert same == rows["ats"]
        assert dataclasses.replace(config.run, out=Path()) == dataclasses.replace(
            rows["ats"].run, out=Path()
        )
    assert rows["core"].method == StandardConfig("core")
    assert rows["full"].method == StandardConfig("full")
    assert rows["ats"].method == ATSConfig()
    assert rows["slimmable"].method == SlimmableConfig()


def test_the_papers_preset() -> None:
    config = preset("cifar10-resnet18-ats")
    assert config.model == ResNetConfig(depth=18, stem="cifar", width=64)
    optim = config.optim
    assert (optim.optimizer, optim.momentum, optim.weight_decay) == ("sgd", 0.9, 5e-4)
    method = config.method.build(resnet18())
    assert list(method.subnets) == ["full", "core"]


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"^unknown preset 'cifar-resnet18-ats'; did you mean cifar10-resnet18-ats\? "
        r"\(known: cifar10-resnet18-ats, ",
    ):
        preset("cifar-resnet18-ats")
    assert str(unknown_name("colour", "zzz", {"red", "blue"})) == (
        "unknown colour 'zzz' (known: blue, red)"
    )


# Discovery


def test_a_file_with_a_config_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "methods_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text("X = 1\n")
    (folder / "other.py").write_text("class Config: name = 'other'\n")
    (folder / "mine.py").write_text(
        "from maskedtrain.methods import MethodConfig\nclass Config(MethodConfig): name = 'mine'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = find_configs("methods_of_a_test", [str(folder)], MethodConfig)
    assert list(found) == ["mine"] and issubclass(found["mine"], MethodConfig)


def undocumented(config: Any) -> list[str]:
    """Fields without a docstring under them, which is what ``--help`` says of the flag."""
    sources = (inspect.getsource(c) for c in config.__mro__ if dataclasses.is_dataclass(c))
    bodies = (ast.parse(textwrap.dedent(source)).body[0].body for source in sources)  # pyright: ignore[reportAttributeAccessIssue]
    documented = {
        now.target.id
        for body in bodies
        for now, then in itertools.pairwise(body)
        if isinstance(now, ast.AnnAssign)
        and isinstance(now.target, ast.Name)
        and isinstance(then, ast.Expr)
        and isinstance(then.value, ast.Constant)
    }
    return [f.name for f in dataclasses.fields(config) if f.name not in documented]


@dataclass
class OneIsNot:
    size: int
    """Documented."""
    depth: int


def test_every_field_is_documented() -> None:
    assert undocumented(OneIsNot) == ["depth"]
    sections = (*data_sets().values(), OptimConfig, RunConfig)
    for config in (*sections, ATSConfig, SlimmableConfig, StandardConfig, *models().values()):
        assert undocumented(config) == []

"""``WideDeep``: what it computes, its core and narrower networks, runs of it on images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from maskedtrain import SubNetwork, cli, models
from maskedtrain.methods import ATS, Slimmable, Standard
from maskedtrain.methods.ats import Config as ATSConfig
from maskedtrain.methods.slimmable import Config as SlimmableConfig
from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.models import MLP, WideDeep
from maskedtrain.models.wide_deep import Config
from tests.train.toolbox import noise

DEEP = ["hidden.0.weight", "hidden.0.bias", "output.weight", "output.bias"]


def small() -> WideDeep:
    torch.manual_seed(0)
    return WideDeep(12, (32,), 3)


def test_it_is_a_deep_network_plus_a_linear_one() -> None:
    model = small()
    assert list(model.state_dict()) == [*(f"deep.{name}" for name in DEEP), "wide.1.weight"]
    weight = model.get_parameter("wide.1.weight")
    for x in (noise(5, 12), noise(5, 3, 2, 2)):
        assert torch.equal(model(x), model.deep(x) + x.flatten(1) @ weight.T)
    dropping = WideDeep(12, (32,), 3, dropout=0.5)
    x = noise(5, 12)
    assert not torch.equal(dropping(x), dropping(x))
    with pytest.raises(ValueError, match=r"must be >= 1, got \[12, 0, 3\]"):
        WideDeep(12, (0,), 3)


def test_its_core_is_the_deep_part() -> None:
    model = small()
    core = SubNetwork.full(model).without(model.extension)
    x = noise(5, 12)
    with core.activate():
        assert torch.equal(model(x), model.deep(x))
    assert core.flops(x) == 2 * 5 * (12 * 32 + 32 * 3)
    assert SubNetwork.full(model).flops(x) == core.flops(x) + 2 * 5 * 12 * 3
    extracted = core.extract()
    assert type(extracted) is MLP and type(extracted.output) is nn.Linear
    assert torch.equal(extracted(x), model.deep(x))


def test_narrow_networks_with_and_without_the_wide_part() -> None:
    model = small()
    narrow = SubNetwork.width(model, {"deep.hidden.0": 0.5}, name="narrow")
    tiny = narrow.without(model.extension, name="tiny")
    core = SubNetwork.full(model).without(model.extension)
    assert tiny.issubset(core) and tiny.issubset(narrow) and not narrow.issubset(core)
    x = noise(5, 12)
    extracted: Any = tiny.extract()
    assert extracted.output.in_features == 16
    wide = noise(5, 12) @ model.get_parameter("wide.1.weight").T
    with narrow.activate():
        assert torch.equal(model(x), extracted(x) + wide)
    ATS([SubNetwork.full(model), core, tiny])


# Options


@pytest.mark.parametrize("kind", [ATSConfig, SlimmableConfig])
def test_methods_train_the_part_that_the_model_names(kind: Any) -> None:
    method = kind("part").build(small())
    assert isinstance(method, ATS | Slimmable) and list(method.subnets) == ["full", "core"]
    core = method.subnets["core"]
    assert [name for name, mask in core.masks.items() if mask is None] == ["wide.1.weight"]
    with pytest.raises(ValueError, match=r"has one core that is a part .* \[0.5, 0.25\]"):
        kind("part", ratios=(0.5, 0.25)).build(small())
    with pytest.raises(ValueError, match="MLP names no extension: it has no core that is a part"):
        kind("part").build(MLP(12, (32,), 3))


def test_standard_training_of_the_part() -> None:
    method = StandardConfig("core", "part").build(small())
    assert isinstance(method, Standard)
    assert method.subnets["core"].numel() == 12 * 32 + 32 + 32 * 3 + 3


def test_a_run_on_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert models.configs()["wide_deep"] is Config
    model = "--model wide_deep --hidden 32 --method ats --core part --image-size 8 --batch-size 64"
    run = tmp_path / "run"
    options = f"{model} --epochs 10 --lr 0.05 --device cpu --measure-every 51".split()
    cli.main(["train", *options, "--out", str(run)])
    rows = json.loads((run / "summary.json").read_text())["results"]
    found = {row["network"]: row for row in rows}
    deep = 64 * 32 + 32 * 10
    assert found["core"]["forward_flops"] == 2 * deep
    assert found["full"]["forward_flops"] == 2 * (deep + 64 * 10)
    assert found["core"]["params"] == deep + 32 + 10
    # Guessing gives 0.1.
    assert all(row["accuracy"] > 0.8 for row in found.values())
    for name, keys in (("core", DEEP), ("full", list(WideDeep(64, (32,), 10).state_dict()))):
        files = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.pt2"
        cli.main(["extract", str(run), "--subnet", name, "--out", str(files[0])])
        assert set(load_file(files[0])) == set(keys)
        cli.main(["extract", str(run), "--subnet", name, "--export", str(files[1])])
        program: Any = torch.export.load(files[1]).module()
        assert program(noise(3, 1, 8, 8)).shape == (3, 10)

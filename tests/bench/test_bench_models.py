"""The linear layers of a user's model, and what is said of one that cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

import partial_kernels as pk
from maskedtrain.benchmark.models import linear_layers, load_model
from maskedtrain.layers import LFCLinear, MaskedLinear, PackedLinear

SOURCE = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))

def fails():
    raise RuntimeError("no weights here")

def number():
    return 7

class Group:
    build = staticmethod(build)

constant = 3
"""


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_model.py").write_text(SOURCE)
    (tmp_path / "broken_model.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "users_model", raising=False)
    return "users_model"


def test_layers_are_counted_by_shape():
    model = nn.Sequential(
        nn.Linear(128, 256),
        MaskedLinear(128, 256),
        nn.ModuleDict({"a": nn.Linear(512, 256), "b": LFCLinear(512, 256, rank=4)}),
        PackedLinear.from_linear(nn.Linear(256, 128), pk.Packed(range(5))),
        nn.Linear(256, 10),
        nn.Conv2d(3, 8, 3),
    )
    # A layer that is used twice is one layer.
    model.append(model[0])
    found = linear_layers(model)
    assert found.counts == {(256, 512): 2, (256, 128): 2, (128, 256): 1}
    assert found.small == 1
    assert 0.9 < found.share < 1


def test_a_model_without_large_layers():
    with pytest.raises(ValueError, match=r"no linear layer of at least 128 x 128 .* of 1 linear"):
        linear_layers(nn.Sequential(nn.Linear(10, 10), nn.Conv2d(3, 8, 3)))
    with pytest.raises(ValueError, match="lazy layers: call it once"):
        linear_layers(nn.Sequential(nn.LazyLinear(300)))


@pytest.mark.usefixtures("user_file")
@pytest.mark.parametrize("name", ["users_model:build", "users_model:Group.build"])
def test_a_users_model(name: str):
    assert linear_layers(load_model(name)).counts == {(256, 128): 1, (128, 256): 1}


@pytest.mark.usefixtures("user_file")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such_file:build", "cannot import 'no_such_file': ModuleNotFoundError"),
        ("broken_model:build", "cannot import 'broken_model': ModuleNotFoundError: .*of_this_name"),
        ("users_model:bild", "users_model has no 'bild'"),
        ("users_model:constant", "constant must be callable, got 3"),
        ("users_model:fails", r"fails\(\) raised RuntimeError: no weights here"),
        ("users_model:number", r"number\(\) must return an nn.Module, got int"),
        ("users_model", "must be MODULE:CALLABLE or a preset; unknown preset 'users_model'"),
        ("digits-resnet9-ats", "did you mean digits-resnet8-ats"),
    ],
)
def test_what_is_no_model(name: str, why: str):
    with pytest.raises(ValueError, match=why):
        load_model(name)


def test_a_presets_model_needs_no_data():
    found = linear_layers(load_model("multi30k-lowrank"))
    # Queries, keys, values and outputs of nine attentions; two feed-forward layers of six; the
    # output layer.
    assert found.counts == {(256, 256): 36, (512, 256): 6, (256, 512): 6, (4564, 256): 1}

"""A data set is one file in the folder."""

from __future__ import annotations

import sys

import pytest

from maskedtrain import data

TOY = """
from maskedtrain.data.base import DataConfig

class Config(DataConfig):
    name = "toy"

    def load(self):
        return "toys"
"""


def test_data_sets_are_files_with_a_config(tmp_path, monkeypatch):
    assert {"cifar10", "digits"} <= data.configs().keys()
    (tmp_path / "plaything.py").write_text(TOY)
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path)])
    try:
        assert data.configs()["toy"]().load() == "toys"
    finally:
        del sys.modules["maskedtrain.data.plaything"], data.plaything  # type: ignore[attr-defined]


@pytest.mark.parametrize(("given", "size"), [(None, 8), (24, 24)])
def test_a_data_set_has_its_own_image_size(given, size):
    assert data.configs()["digits"](image_size=given).load().image_shape == (1, size, size)


def test_what_data_sets_have_in_common_is_not_one():
    assert all(hasattr(config, "name") for config in data.configs().values())

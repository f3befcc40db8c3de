"""A data set is one file in the folder."""

from __future__ import annotations

import sys

import pytest

from maskedtrain import data


def test_data_sets_are_files_with_a_load_function(tmp_path, monkeypatch):
    assert {"cifar10", "digits"} <= set(data.available())
    assert "images" not in data.available()
    (tmp_path / "toy.py").write_text("def load(root=None, *, size=1): return root, size\n")
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path)])
    try:
        assert "toy" in data.available()
        assert data.load("toy", "here", size=3) == ("here", 3)
    finally:
        del sys.modules["maskedtrain.data.toy"], data.toy  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["mnist", "images", "_files", "", "os", "..digits"])
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(ValueError, match=r"must be one of cifar10, digits.*, got '"):
        data.load(name)


def test_an_unknown_option_lists_what_there_is():
    with pytest.raises(ValueError, match=r"must be among image_size, .*, got pixels"):
        data.load("digits", pixels=8)

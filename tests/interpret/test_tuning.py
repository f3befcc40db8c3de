"""Choosing tiles: every kernel that a step launches, timed by a clock of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from partial_kernels._core import tables, tiles
from partial_kernels._core.tiles import TABLES, Tile, choosing
from partial_kernels._core.tuning import tune
from partial_kernels.masks import Index
from partial_kernels.submatrix import cases, kernels

CASE = cases.Case("", (40,), 96, 80, Index(range(0, 96, 2)))
BEST = kernels.CANDIDATES["submatrix"][0]


def seconds(step: Callable[[], object]) -> float:
    """10 where every kernel has the best tile, 1 more for each that has not."""
    slow: list[str] = []

    def watch(key: str, default: Tile) -> Tile:
        tile = chosen(key, default)
        if tile != BEST:
            slow.append(key)
        return tile

    chosen = tiles._choose[-1]
    with choosing(watch):
        step()
    return 10 + len(set(slow))


def step() -> object:
    return cases.contest(CASE, impl="triton").ours()


def test_the_fastest_of_each_key_is_kept(tmp_path: Path) -> None:
    found: dict[str, Tile] = {}
    candidates = {"submatrix": [kernels.CANDIDATES["submatrix"][7], BEST]}
    told = list(tune(step, candidates, seconds, found))
    assert {key for key, _, _ in told} == set(found)
    assert len(found) == 3
    assert all(tile == BEST for tile in found.values())
    assert all(best < default for _, default, best in told)
    # What is known is not timed again.
    assert list(tune(step, candidates, seconds, found)) == []
    file = tmp_path / "folder" / TABLES.user_file("NVIDIA H200").name
    TABLES.write(file, found)
    assert file.name == "nvidia-h200.json"
    assert TABLES.read(file) == found
    TABLES.write(file, {"other": BEST})
    assert TABLES.read(file) == {**found, "other": BEST}


def test_what_cannot_run_is_passed_over() -> None:
    impossible = Tile({**BEST.sizes, "BM": 48}, num_warps=4, num_stages=3)
    found: dict[str, Tile] = {}
    assert len(list(tune(step, {"submatrix": [impossible]}, seconds, found))) == 3
    assert not found


def test_a_default_that_cannot_run_is_an_error() -> None:
    def refuse(step: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        list(tune(step, {"submatrix": [BEST]}, refuse, {}))


@pytest.mark.parametrize("contents", ["[", "[1]", '{"a": {"sizes": {}}}'])
def test_what_is_no_table_is_an_error(contents: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(contents)
    with pytest.raises(ValueError, match=r"table\.json is no table of tiles"):
        TABLES.read(file)


def test_tables_of_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's come before the shipped ones, and both before the default."""
    shipped, own = tmp_path / "shipped", tmp_path / "config"
    monkeypatch.setattr(TABLES, "shipped", shipped)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(own))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    first, second = (Tile({"BM": size}, 4, 3) for size in (16, 32))
    for folder, keys in ((shipped, "ab"), (own / "maskedtrain" / "tiles", "bc")):
        folder.mkdir(parents=True)
        tile = first if folder == shipped else second
        TABLES.write(folder / "some-gpu.json", {f"kernel {key}": tile for key in keys})
    device = torch.device("cuda")
    default = Tile({"BM": 64}, 4, 3)
    chosen = [tiles.tuned("kernel", key, device, default) for key in "abcd"]
    assert chosen == [first, second, second, default]
    TABLES.forget()
    tables._gpu_name.cache_clear()


def test_shipped_tables_can_be_read() -> None:
    for file in TABLES.shipped.glob("*.json"):
        json.loads(file.read_text())
        assert TABLES.read(file)

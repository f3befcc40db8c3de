"""Where "auto" changes to the dense product: tables, measuring, and that it follows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import partial_kernels as pk
from maskedtrain.benchmark.crossings import crossing, crossings, tune
from maskedtrain.commands import doctor
from partial_kernels._core import discovery
from partial_kernels._core.contest import Step
from partial_kernels._core.crossovers import TABLES, Crossing, crossover
from partial_kernels._core.ops import Choice
from partial_kernels._core.tables import device_name
from partial_kernels._native import native_status

CPU = torch.device("cpu")
read, write = TABLES.read, TABLES.write
needs_library = pytest.mark.skipif(
    native_status().info is None, reason="needs the compiled library"
)


def user_file(device: torch.device) -> Path:
    return TABLES.user_file(device_name(device))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    TABLES.forget()


@pytest.fixture(autouse=True)
def forget() -> object:
    yield
    TABLES.forget()


def test_a_table_comes_back(tmp_path: Path):
    file = user_file(CPU)
    assert file.is_relative_to(tmp_path / "maskedtrain" / "crossovers")
    write(file, {"a native float32": 0.25})
    write(file, {"b native float32": 1.0})
    assert read(file) == {"a native float32": 0.25, "b native float32": 1.0}
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert crossover("a native float32", CPU, 0.5) == 0.25
    assert crossover("c native float32", CPU, 0.5) == 0.5


def test_the_users_table_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TABLES, "shipped", tmp_path / "shipped")
    write(tmp_path / "shipped" / user_file(CPU).name, {"a": 0.1, "b": 0.2})
    write(user_file(CPU), {"b": 0.3})
    assert [crossover(key, CPU, 0.9) for key in ("a", "b", "c")] == [0.1, 0.3, 0.9]


def test_another_number_of_threads_has_another_table(monkeypatch: pytest.MonkeyPatch):
    write(user_file(CPU), {"a": 0.1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert crossover("a", CPU, 0.9) == 0.9


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting"),
        ("[1]", "it is no JSON object"),
        ('{"a": 1.5}', r"'a': must be in \[0, 1\], got 1.5"),
        ('{"a": true}', "got True"),
        ('{"a": null}', "got None"),
        ('{"a": NaN}', "got nan"),
    ],
)
def test_a_damaged_table_is_one_clear_error(text: str, why: str):
    file = user_file(CPU)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match=f"is no table of crossovers: .*{why}"):
        crossover("a", CPU, 0.5)
    with pytest.raises(ValueError, match="is no table of crossovers"):
        write(file, {"b": 0.5})
    assert file.read_text() == text


@needs_library
@pytest.mark.parametrize("size", [16, 24, 32])
def test_auto_follows_the_table_for_blocks(size: int):
    bitmap = torch.zeros(4, 4, dtype=torch.bool)
    bitmap[:2] = True
    x, weight, mask = (
        torch.ones(3, 4 * size),
        torch.ones(4 * size, 4 * size),
        pk.Block(bitmap, size),
    )

    def chosen() -> Choice:
        return pk.explain("masked_linear", x, weight, mask=mask)

    key = f"blocksparse native {16 if size == 24 else size} float32"
    write(user_file(CPU), {key: 0.5})
    assert chosen().backend == "native"
    write(user_file(CPU), {key: 0.49})
    choice = chosen()
    assert choice.backend == "reference"
    assert choice.reasons["native"] == "a dense product is faster where 8 of 16 blocks are kept"
    assert pk.explain("masked_linear", x, weight, mask=mask, impl="native").backend == "native"


@needs_library
def test_auto_follows_the_table_for_rows_of_few():
    x, weight = torch.ones(3, 20), torch.ones(40, 20)

    def backend(k: int) -> str | None:
        return pk.explain("topk_linear", x, weight, k=k).backend

    for limit in (1 / 40, 0.25, 0.5):
        write(user_file(CPU), {"topk native float32": limit})
        most = round(40 * limit)
        assert (backend(most), backend(most + 1)) == ("native", "reference")
    write(user_file(CPU), {"topk native float32": 0.0})
    assert backend(1) == "reference"


@needs_library
def test_a_damaged_table_ends_the_call_that_would_follow_it():
    file = user_file(CPU)
    file.parent.mkdir(parents=True)
    file.write_text("[]")
    mask = pk.Block(torch.ones(2, 2, dtype=torch.bool), 16)
    with pytest.raises(ValueError, match="is no table of crossovers"):
        pk.masked_linear(torch.ones(3, 32), torch.ones(32, 32), mask=mask)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        # The logarithms are 1 and -1 here.
        ({0.2: 2.0, 0.4: 0.5}, 0.3),
        ({0.1: 9.0, 0.2: 2.0, 0.6: 0.5, 1.0: 0.1}, 0.4),
        ({0.5: 3.0, 1.0: 1.5}, 1.0),
        ({0.1: 0.9, 0.5: 2.0}, 0.0),
        ({0.1: 2.0, 0.5: 1.0}, 0.5),
    ],
)
def test_where_the_speedup_crosses_one(speedups: dict[float, float], expected: float):
    assert crossing(speedups) == pytest.approx(expected)


def made_up(key: str) -> Crossing:
    def steps(density: float) -> tuple[Step, Step]:
        return lambda: density, lambda: 0.5

    return Crossing(key, (0.25, 0.5, 0.75), steps)


def speedup(ours: Step, dense: Step) -> float:
    """Of steps that say how long they take."""
    times = ours(), dense()
    assert all(isinstance(time, float) for time in times)
    return times[1] / times[0]  # pyright: ignore[reportOperatorIssue]


def test_tuning_writes_what_it_finds():
    found = list(tune([made_up("a"), made_up("b")], CPU, speedup))
    assert [(key, density) for key, density, _ in found] == [("a", 0.5), ("b", 0.5)]
    assert found[0][2] == {0.25: 2.0, 0.5: 1.0, 0.75: 0.5 / 0.75}
    assert read(user_file(CPU)) == {"a": 0.5, "b": 0.5}


def test_a_tuning_that_is_stopped_keeps_what_it_had():
    def stopped(density: float) -> tuple[Step, Step]:
        raise KeyboardInterrupt

    write(user_file(CPU), {"old": 0.1})
    with pytest.raises(KeyboardInterrupt):
        list(tune([made_up("a"), Crossing("b", (0.5,), stopped)], CPU, speedup))
    assert read(user_file(CPU)) == {"old": 0.1, "a": 0.5}


@needs_library
def test_what_is_measured_is_what_the_kernels_look_up(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def note(key: str, device: torch.device, default: float) -> float:
        asked.append(key)
        return default

    for family in ("blocksparse", "topk"):
        native = __import__(f"partial_kernels.{family}.native", fromlist=["crossover"])
        monkeypatch.setattr(native, "crossover", note)
    for size in (8, 16, 32, 64, 128, 200):
        mask = pk.Block(torch.ones(1, 1, dtype=torch.bool), size)
        pk.explain("masked_linear", torch.ones(1, size), torch.ones(size, size), mask=mask)
    pk.explain("topk_linear", torch.ones(1, 4), torch.ones(8, 4), k=1)
    wanted = {item.key for item in crossings(discovery.families(), "cpu")}
    assert set(asked) == wanted


@needs_library
def test_both_steps_of_a_crossing_compute_the_same():
    for family, module in discovery.cases():
        for item in module.crossings("cpu", 8) if hasattr(module, "crossings") else ():
            ours, dense = (step() for step in item.steps(item.densities[-2]))
            for a, b in zip(ours, dense, strict=True):  # pyright: ignore[reportArgumentType]
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3, msg=f"{family} {item.key}")


def test_doctor_says_which_tables_are_in_force():
    assert dict(doctor._lines())["crossovers"] == "cpu: as shipped"
    write(user_file(CPU), {"a": 0.5})
    assert dict(doctor._lines())["crossovers"] == f"cpu: {user_file(CPU)}"
    assert json.loads(user_file(CPU).read_text()) == {"a": 0.5}

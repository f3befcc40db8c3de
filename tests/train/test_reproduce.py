"""Figures of the papers: measured, judged and written, all or nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from maskedtrain import cli
from maskedtrain.layers import SwitchNorm
from maskedtrain.methods.dropout import NeuronDropout
from maskedtrain.optim import MaskedSGD
from maskedtrain.reproduce import (
    Claim,
    FigureConfig,
    Rows,
    configs,
    figure2,
    figure3,
    figure4,
    ist_quadratic,
    mast,
    read_rows,
    reproduce,
)
from maskedtrain.reproduce._dropout import without_batch_norm
from maskedtrain.reproduce.base import with_columns
from maskedtrain.training.console import Console
from tests.train.toolbox import assert_equal, noise, small_resnet, snapshot

TINY: dict[str, list[str]] = {
    "figure2": ["--steps", "4", "--every", "2", "--device", "cpu"],
    "figure3": ["--steps", "4", "--every", "2", "--device", "cpu"],
    "figure4": ["--steps", "4", "--every", "2", "--device", "cpu"],
    "ist-quadratic": ["--steps", "2", "--runs", "4"],
    "mast": ["--steps", "4", "--every", "2", "--runs", "2"],
}


def png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_every_figure_is_tried_here():
    assert configs().keys() == TINY.keys()


@pytest.mark.parametrize("name", TINY)
def test_a_figure_is_measured_judged_and_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    cli.main(["reproduce", name, *TINY[name], "--out", str(tmp_path / "new")])
    output = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f"{name}.csv", f"{name}.png"]
    assert png(tmp_path / "new" / f"{name}.png")
    rows = read_rows(tmp_path / "new" / f"{name}.csv")
    # What was printed can be said of the file alone.
    claims = configs()[name]().claims(rows)
    assert claims
    printed = [line for line in output.splitlines() if line.startswith("[")]
    assert printed == [str(claim) for claim in claims]


def test_a_figure_is_a_function_of_its_seed():
    def measured(seed: int) -> Rows:
        config = figure2.Config(steps=4, every=2, device="cpu", seed=seed)
        return config.rows(Console(StringIO()))

    assert measured(0) == measured(0) != measured(1)


def test_both_trainings_of_figure3_are_measured_with_the_same_masks():
    rows = figure3.Config(steps=2, every=1, device="cpu").rows(Console(StringIO()))
    first = {row["training"]: row["alignment"] for row in rows if row["step"] == 0}
    # The weights are the same at the first step: so is the alignment, where masks are.
    assert first["with dropout"] == first["without dropout"]
    last = {row["training"]: row["alignment"] for row in rows if row["step"] == 1}
    assert last["with dropout"] != last["without dropout"]


# Judging: rows of a training, the quantities constant but for those of single steps.


def trained(quantities: Mapping[str, Mapping[str, float]], **single: float) -> Rows:
    rows = [
        {"training": training, "step": step, "loss": 1.0, **values}
        for training, values in quantities.items()
        for step in range(40)
    ]
    return [rows[0] | single, *rows[1:]]


@pytest.mark.parametrize(
    ("c_sim", "c_align", "first", "holds"),
    [
        (0.5, 2.0, 2.0, [True, True]),
        (11.0, 2.0, 2.0, [False, True]),
        (0.5, math.inf, 2.0, [True, False]),
        # One mini-batch of forty.
        (0.5, 2.0, math.inf, [True, True]),
    ],
)
def test_figure2_holds_where_its_criteria_are_small(
    c_sim: float, c_align: float, first: float, holds: list[bool]
):
    rows = trained({"with dropout": {"c_sim": c_sim, "c_align": c_align}}, c_align=first)
    claims = figure2.Config().claims(rows)
    assert [claim.holds for claim in claims] == holds
    if math.inf in (first, c_align):
        assert "the largest is inf" in claims[1].measured


@pytest.mark.parametrize(("without", "with_", "holds"), [(0.1, 0.5, True), (0.5, 0.1, False)])
def test_figure3_holds_where_dropout_aligns(without: float, with_: float, holds: bool):
    rows = trained(
        {"without dropout": {"alignment": without}, "with dropout": {"alignment": with_}}
    )
    (claim,) = figure3.Config().claims(rows)
    assert claim.holds is holds
    assert f"without dropout {without}, with dropout {with_}" in claim.measured


def test_figure4_holds_where_ats_does_better():
    worse = {"overlap": 1.4, "norm_similarity": 0.2, "alignment": 4.0}
    better = {"overlap": 1.1, "norm_similarity": 0.9, "alignment": 1.3}

    def holds(standard: dict[str, float], ats: dict[str, float], first: float) -> list[bool | None]:
        rows = trained({"ATS": ats, "standard": standard}, overlap=first)
        return [claim.holds for claim in figure4.Config().claims(rows)]

    assert holds(worse, better, 1.2) == [True] * 5
    assert holds(better, worse, 1.2) == [False, False, False, True, False]
    above = better | {"norm_similarity": 1.2}
    assert holds(worse, above, 1.2) == [True, True, True, False, True]


def test_mast_holds_below_its_bound_and_where_variance_reduction_converges():
    def holds(distance: float, reduced: float, accuracy: float) -> list[bool | None]:
        last = {"SGD": 0.1, "L-SVRDSG": 1e-12, "S-PAGE": reduced}
        rows = [
            {"panel": "bound", "method": "Rand-K K=16", "distance_sq": distance, "bound": 1.0},
            *({"panel": "variance", "method": m, "distance_sq": d} for m, d in last.items()),
            {"panel": "accuracy", "method": "MAST", "kept": 8, "accuracy": accuracy},
            {"panel": "accuracy", "method": "ERM", "kept": 8, "accuracy": 0.6},
        ]
        return [claim.holds for claim in mast.Config().claims(with_columns(rows))]

    assert holds(0.9, 1e-12, 0.7) == [True, True, True]
    assert holds(1.1, 1e-3, 0.5) == [False, False, False]


def test_ist_holds_where_every_panel_shows_it():
    def holds(**changed: float) -> list[bool | None]:
        value = {
            "plain f": 1e-3, "preconditioned f": 1e-9, "plain change": 7.0,
            "preconditioned change": -2.0, "preconditioned x": 1e-30, "bias": 1e-6, "far": 1.0,
        } | {name.replace("_", " "): v for name, v in changed.items()}  # fmt: skip
        rows: list[dict[str, Any]] = []
        for kind in ("plain", "preconditioned"):
            x = value["preconditioned x"] if kind == "preconditioned" else 0.7
            of = {"method": kind}
            rows += [
                *({"panel": "homogeneous", "f": f, **of} for f in (1.0, value[f"{kind} f"])),
                {"panel": "counter-example", "change": value[f"{kind} change"], **of},
                *({"panel": "one step", "distance_sq": d, **of} for d in (1.0, x)),
                {"panel": "bias", "distance_sq": value["bias"], "error_sq": 1e-6,
                 "to_minimiser_sq": value["far"], **of},
            ]  # fmt: skip
        return [claim.holds for claim in ist_quadratic.Config().claims(with_columns(rows))]

    assert holds() == [True] * 5
    assert holds(plain_f=0.5) == [False, True, True, True, True]
    assert holds(preconditioned_change=0.1) == [True, False, True, True, True]
    assert holds(preconditioned_x=0.1) == [True, True, False, True, True]
    assert holds(bias=1e-2) == [True, True, True, False, False]
    assert holds(far=1e-6) == [True, True, True, False, False]


def test_a_claim_says_whether_it_holds():
    assert str(Claim("it falls", "to 1", True)) == "[holds] it falls (to 1)"
    assert str(Claim("it falls", "to 9", False)) == "[DOES NOT HOLD] it falls (to 9)"


# Writing: a figure of three rows.


@dataclass(frozen=True)
class Toy(FigureConfig):
    """Nothing of any paper."""

    name = "toy"

    def rows(self, console: Console) -> Rows:
        return [{"kind": "a", "x": 1, "y": 0.1}, {"kind": "b", "x": 2, "y": math.inf}]

    def claims(self, rows: Rows) -> list[Claim]:
        return [Claim("y is finite", "it is not", False)]

    def draw(self, figure: Any, rows: Rows) -> None:
        figure.subplots().plot([row["x"] for row in rows])


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_rows_come_back_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = Toy(out=tmp_path)
    claims = reproduce(config, Console())
    assert [dict(row) for row in read_rows(tmp_path / "toy.csv")] == config.rows(Console())
    assert claims == config.claims([])
    assert "[DOES NOT HOLD] y is finite (it is not)" in capsys.readouterr().out


def test_earlier_files_are_replaced_on_demand_only(tmp_path: Path):
    (tmp_path / "toy.png").write_text("earlier")
    with pytest.raises(ValueError, match=r"toy.png would be overwritten: choose another --out"):
        reproduce(Toy(out=tmp_path), Console())
    assert [p.name for p in tmp_path.iterdir()] == ["toy.png"]
    pytest.importorskip("matplotlib")
    reproduce(Toy(out=tmp_path, overwrite=True), Console())
    assert png(tmp_path / "toy.png")


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_nothing_is_written_where_measuring_ends_early(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "toy.csv").write_text("earlier")
    monkeypatch.setattr(Toy, "rows", failing(error))
    with pytest.raises(type(error)):
        reproduce(Toy(out=tmp_path, overwrite=True), Console())
    assert [p.name for p in tmp_path.iterdir()] == ["toy.csv"]
    assert (tmp_path / "toy.csv").read_text() == "earlier"


def test_a_drawing_that_ends_early_leaves_the_rows_and_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    figures = pytest.importorskip("matplotlib.figure")

    def interrupted(_: Any, file: Any, **options: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    (tmp_path / "toy.png").write_text("earlier")
    monkeypatch.setattr(figures.Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce(Toy(out=tmp_path, overwrite=True), Console())
    # Nor an earlier drawing beside other rows.
    assert [p.name for p in tmp_path.iterdir()] == ["toy.csv"]


def test_without_matplotlib_there_are_the_rows_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for module in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reproduce(Toy(out=tmp_path), Console())
    assert [p.name for p in tmp_path.iterdir()] == ["toy.csv"]
    assert "toy.csv (no drawing: matplotlib is not installed)" in capsys.readouterr().out


# The command line.


def test_without_a_name_there_is_help(capsys: pytest.CaptureFixture[str]):
    cli.main(["reproduce"])
    text = capsys.readouterr().out
    assert all(f"\n  {name}" in text for name in configs())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("figure5", "unknown figure or table 'figure5'; did you mean figure4? (known: all,"),
        ("figure2 --keep 0", "keep must be in (0, 1], got 0"),
        ("figure3 --keep 1.5", "keep must be in (0, 1], got 1.5"),
        ("figure4 --every 0", "every must be >= 1 and steps at least twice as many, got 0 and 300"),
        ("figure4 --steps 9", "every must be >= 1 and steps at least twice as many, got 5 and 9"),
        ("figure4 --threads 0", "threads must be >= 1, got 0"),
        ("figure4 --keep 0.5", "Unrecognized options: --keep"),
        ("figure2 --data nowhere", "no such file or folder: nowhere"),
        ("figure2 --device tpu", "device 'tpu' cannot be used: "),
        ("mast --runs 0", "every and runs must be >= 1 and steps at least every, got 30, 0 and"),
        ("mast --steps 3 --every 4", "steps at least every, got 4, 20 and 3"),
        ("ist-quadratic --runs 1", "steps and runs must be >= 2, got 200 and 1"),
        ("mast --out file", "cannot write file: "),
    ],
)
def test_a_mistake_is_one_clear_line(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *line.split()])
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert errors.startswith("maskedtrain: error: ") and errors.count("\n") == 1
    assert message in errors
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "file"]


# The network without batch norm.


def test_without_batch_norm_an_image_has_no_influence_on_another():
    model = without_batch_norm(small_resnet()).train()
    for module in model.modules():
        if isinstance(module, SwitchNorm):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    before, x = snapshot(model), noise(4, 3, 8, 8)
    # To rounding: convolutions of another batch size may add up in another order.
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)
    assert_equal(before, snapshot(model))


def test_without_batch_norm_scales_and_shifts_remain():
    model = without_batch_norm(small_resnet())
    norm, x = model.bn1, noise(2, 8, 4, 4)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


def test_without_batch_norm_blocks_begin_as_their_skip_connections():
    model = without_batch_norm(small_resnet()).train()
    x = noise(2, 8, 4, 4).abs()
    assert torch.equal(model.get_submodule("layer1.0")(x), x)


def test_dropout_of_neurons_drops_those_without_batch_norm_too():
    model = without_batch_norm(small_resnet())
    method = NeuronDropout(model, 0.5, count="bernoulli", rescale=False)
    before = snapshot(model)
    plan = method.plan(0)
    plan.backward(lambda: model(noise(2, 3, 8, 8)).square().sum())
    MaskedSGD(model.parameters(), lr=1.0).step(plan.update, lr_scale=plan.lr_scale)
    mask = plan.update.mask_of(model.bn1.weight)
    assert mask is not None
    kept = mask.dense(model.bn1.weight.shape, torch.device("cpu"))
    assert 0 < kept.sum() < len(kept)
    moved = before["bn1.weight"] != model.bn1.weight
    assert torch.equal(moved, kept)

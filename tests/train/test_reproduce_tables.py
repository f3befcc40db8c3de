"""Tables of the paper: their plans, their trainings, and a report whose cells are the results'."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
import statistics
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from maskedtrain import cli
from maskedtrain.commands._options import parse, take
from maskedtrain.config import TrainConfig, to_dict
from maskedtrain.data.cifar10 import Config as CIFAR10Config
from maskedtrain.files import write_json
from maskedtrain.presets import preset
from maskedtrain.reproduce import figure2, report, table3, tables
from maskedtrain.reproduce.base import Claim, to_csv
from maskedtrain.reproduce.plan import Store, execute
from maskedtrain.reproduce.tables import Entry, Sample, Scale, Table, beats, reaches
from maskedtrain.reproduce.trainings import FORMAT, Figure, Place, Training
from maskedtrain.training.console import Console, format_count, format_duration
from maskedtrain.training.loop import Trainer
from maskedtrain.training.train import train

ALL = [
    pytest.param(table, id=f"{scale}: {table.title}")
    for scale in get_args(Scale)
    for config in tables().values()
    for table in config().tables(scale)
]


def tiny(seed: int = 0, **options: Any) -> Training:
    """A training of a second."""
    config = preset("digits-resnet8-ats")
    config = replace(config, model=replace(config.model, width=16))  # pyright: ignore[reportCallIssue]
    run = replace(config.run, **{"epochs": 0.2, "log_every": 1, "seed": seed, **options})
    return Training("digits-resnet8-ats", replace(config, run=run), "tiny")


@pytest.mark.parametrize("table", ALL)
def test_a_runs_command_trains_what_the_plan_says(table: Table):
    trainings = table.trainings(range(2))
    assert len({training.id for training in trainings}) == len(trainings)
    # One of the other seed will do.
    for training in trainings[: len(trainings) // 2 + 1]:
        program, command, *arguments = shlex.split(training.command)
        name, options = take(arguments, "--preset")
        assert (program, command) == ("maskedtrain", "train")
        parsed = parse(TrainConfig, options, command="train", default=preset(str(name)))
        assert parsed == training.anywhere
        assert parsed.run.seed == training.config.run.seed


@pytest.mark.parametrize("table", ALL)
def test_a_statement_is_judged_once_its_entries_are_there(table: Table):
    samples = {entry.key: Sample((1.0, 1.1)) for entry in table.entries}
    flops = {entry.key: 1.0 for entry in table.entries}
    whole = table.judge(samples, flops)
    assert whole
    assert table.judge({}, {}) == []
    for entry in table.entries:
        some = table.judge({key: s for key, s in samples.items() if key != entry.key}, flops)
        assert all(claim in whole for claim in some)
    # Nothing is said of a training by itself.
    assert all(table.judge({key: s}, {}) == [] for key, s in samples.items())


@pytest.mark.parametrize("table", ALL)
def test_the_papers_own_figures_do_not_refute_it(table: Table):
    samples = {
        entry.key: Sample(
            (paper.mean - (paper.std or 0.0), paper.mean, paper.mean + (paper.std or 0.0))
        )
        for entry in table.entries
        if (paper := entry.paper) is not None
    }
    assert [claim for claim in table.judge(samples, {}) if claim.holds is False] == []


@pytest.mark.parametrize("table", ALL)
def test_a_result_that_was_written_is_found(table: Table, tmp_path: Path):
    (tmp_path / "results").mkdir()
    for training in table.trainings(range(1)):
        result = fixture(training, {"full": 0.5, "core": 0.4})
        write_json(tmp_path / "results" / f"{training.id}.json", result)
        assert Store(tmp_path).result(training) is not None


def test_an_id_is_of_what_a_training_does_alone():
    same = [tiny(), tiny(out=Path("elsewhere"), device="cpu", threads=3, keep_last=7)]
    assert len({training.id for training in same}) == 1
    others = [tiny(1), tiny(bf16=True), tiny(epochs=0.3)]
    assert len({training.id for training in (*same, *others)}) == 1 + len(others)
    assert {training.kind for training in (*same, tiny(1))} == {tiny().kind}


def test_a_result_of_other_options_is_not_a_runs(tmp_path: Path):
    result = fixture(tiny(), {"full": 0.5, "core": 0.4})
    assert tiny().matches(result)
    assert not tiny(1).matches(result)
    assert not tiny().matches({**result, "format": FORMAT + 1})
    assert not tiny().matches({k: v for k, v in result.items() if k != "evaluations"})
    # Where a default has changed since, what is written counts.
    old = json.loads(json.dumps(result))
    old["config"]["optim"]["momentum"] = 0.8
    assert not tiny().matches(old)
    # An option that there was not yet has its default.
    del old["config"]["optim"]["momentum"]
    assert tiny().matches(old)


def test_a_training_leaves_what_a_report_needs(tmp_path: Path):
    store, training = Store(tmp_path), tiny()
    training = replace(training, place=Place(device="cpu", threads=1))
    assert execute([training], store, Console(StringIO())) == {}
    result = store.result(training)
    assert result is not None
    assert {row["network"] for row in result["results"]} == {"full", "core"}
    assert {record["subnet"] for record in result["evaluations"]} == {"full", "core"}
    assert result["seconds"] > 0
    assert result["environment"]["threads"] == 1
    # Nothing of the place it was made in.
    assert str(tmp_path) not in json.dumps(result)
    assert store.result(tiny()) == result
    config = tiny().config
    entries = tuple(
        Entry(name, "ATS", name, "digits-resnet8-ats", config)  # pyright: ignore[reportArgumentType]
        for name in ("core", "full")
    )
    table = Table("tiny", "none", "accuracy", entries, lambda samples, flops: [], same=False)
    found = report.collect("command", [table], [], range(1), store)
    shown = {row[1]: row[2] for row in found.sections[0].rows}
    assert shown == {r["network"]: f"{100 * r['accuracy']:.2f}" for r in result["results"]}
    assert "images/s" in found.runs[0].speed
    assert report.to_html(found)


def test_a_folder_of_other_options_is_not_gone_on_with(tmp_path: Path):
    place = Place(device="cpu", threads=1)
    other = replace(tiny(), place=place)
    optim = replace(other.config.optim, momentum=0.8)
    other = replace(other, config=replace(other.config, optim=optim))
    other.run(tmp_path / "work", "other", Console(StringIO()))
    output = StringIO()
    training = replace(tiny(), place=place)
    found = training.run(tmp_path / "work", "this", Console(output))
    assert "of other options: starting anew" in output.getvalue()
    assert json.loads((tmp_path / "work" / "config.json").read_text())["optim"]["momentum"] == 0.9
    # Nor is one whose checkpoints are damaged.
    for weights in (tmp_path / "work" / "checkpoints").glob("*/weights.safetensors"):
        weights.write_bytes(b"")
    again = training.run(tmp_path / "work", "this", Console(output))
    assert [r["accuracy"] for r in again["results"]] == [r["accuracy"] for r in found["results"]]


def test_a_training_goes_on_where_it_was_stopped(tmp_path: Path, capsys: Any):
    training = replace(tiny(), place=Place(device="cpu", threads=1))
    whole = training.run(tmp_path / "whole", "whole", Console(StringIO()))
    config = training._placed(tmp_path / "halves")
    train(replace(config, run=replace(config.run, max_steps=2)), Console(StringIO()))
    # As a signal leaves it: where to stop was no option of the run.
    write_json(tmp_path / "halves" / "config.json", to_dict(config))
    output = StringIO()
    both = training.run(tmp_path / "halves", "half", Console(output))
    assert "at step 2" in output.getvalue()

    def scores(result: dict[str, Any]) -> list[Any]:
        return [(row["network"], row["accuracy"], row["train_flops"]) for row in result["results"]]

    assert scores(both) == scores(whole)


def test_statements_are_judged_against_the_spread():
    def verdict(claims: list[Claim]) -> bool | None:
        (claim,) = claims
        return claim.holds

    samples = {
        "low": Sample((10.0, 10.2, 9.8)),
        "high": Sample((12.0, 12.2, 11.8)),
        "near": Sample((10.1, 10.3, 9.9)),
        "once": Sample((99.0,)),
    }
    assert verdict(beats(samples, "high", "low", "")) is True
    assert verdict(beats(samples, "low", "high", "")) is False
    assert verdict(beats(samples, "near", "low", "")) is None
    assert verdict(beats(samples, "once", "low", "")) is None
    assert verdict(reaches(samples, "low", "high", 1.0, "")) is False
    assert verdict(reaches(samples, "low", "near", 1.0, "")) is True
    assert verdict(reaches(samples, "low", "high", 2.0, "")) is None
    (claim,) = beats(samples, "high", "low", "more")
    # Standard errors are 0.2 / sqrt(3) each.
    assert claim.measured == "12.00 against 10.00, difference +2.00 ± 0.16"
    assert str(claim).startswith("[holds] more (")
    assert "one seed: no spread" in beats(samples, "once", "low", "")[0].measured
    assert beats(samples, "high", "missing", "") == []


def test_chance_decides_one_case_in_twenty_at_most():
    random = np.random.default_rng(0)
    for count in (2, 3, 5):
        draws = random.normal(size=(2000, 2, count)).tolist()
        decided = [
            beats({"a": Sample(tuple(a)), "b": Sample(tuple(b))}, "a", "b", "")[0].holds is not None
            for a, b in draws
        ]
        assert np.mean(decided) <= 0.055
    same = {"a": Sample((1.0, 1.0)), "b": Sample((1.0, 1.0))}
    assert beats(same, "a", "b", "")[0].holds is None


def test_sample():
    assert Sample((1.0,)).std is None
    assert math.isinf(Sample((1.0,)).error)
    assert Sample((1.0, 3.0)).mean == 2.0
    assert Sample((1.0, 3.0)).error == pytest.approx(1.0)


def test_flops_of_table3_are_the_papers():
    (section,) = tables()["table3"]().counted()
    assert [row[3] for row in section.rows] == ["31.3 T", "62.7 T"]
    for row in section.rows:
        here, paper = (float(cell.removesuffix(" T")) for cell in row[2:4])
        assert abs(here / paper - 1) <= 0.005
    assert all(claim.holds for claim in section.claims)


# A report of made-up results, and what is on its page.


def fixture(
    training: Training, scores: dict[str, float], *, seconds: float = 60.0
) -> dict[str, Any]:
    """A result of a training with these accuracies, or BLEU scores where they are above 1."""

    def row(network: str, value: float) -> dict[str, Any]:
        score = (
            {"accuracy": None, "bleu": value} if value > 1 else {"accuracy": value, "bleu": None}
        )
        known = {"network": network, "unit": "image", "train_flops": 1e9 * value}
        return {**known, "seconds": seconds, **score}

    evaluations = [
        {
            "subnet": network,
            "train_flops": 1e9 * step,
            "accuracy": value * step / 2,
            "bleu": value * step / 2,
        }
        for network, value in scores.items()
        for step in (1, 2)
    ]
    return {
        "format": FORMAT,
        "config": to_dict(training.anywhere),
        "results": [row(*item) for item in scores.items()],
        "remarks": ["a <remark>"],
        "evaluations": evaluations,
        "rates": {"full": {"targets_per_s": 1234.5, "flop_utilization": 0.25}},
        "seconds": seconds,
        "environment": {
            "device": "a <processor>",
            "threads": 1,
            "torch": "2.0",
            "maskedtrain": "1.0",
            "python": "3.11",
        },
    }


class Page(HTMLParser):
    """Cells of every table of a page, and its other text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.images: list[str] = []
        self.addresses: list[str] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._cell = tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self._cell:
            self.tables[-1][-1].append("")
        for name, value in attrs:
            if name in ("src", "href"):
                self.addresses.append(value or "")
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data


def made_up(table: Table, seeds: range, folder: Path) -> Iterator[tuple[Training, dict[str, Any]]]:
    """Results of all but the last training of a table, written as runs leave them."""
    trainings = table.trainings(seeds)
    top = 30.0 if table.score == "bleu" else 0.8
    for number, training in enumerate(trainings[:-1]):
        value = top + number / 100
        scores = {"full": value, "core": value - 0.005}
        kept = getattr(training.config.method, "network", None)
        scores = {name: score for name, score in scores.items() if kept in (None, name)}
        result = fixture(training, scores, seconds=60.0 + number)
        write_json(folder / "results" / f"{training.id}.json", result)
        yield training, result


@pytest.mark.parametrize("name", ["table1", "table3"])
def test_every_cell_of_a_report_is_that_of_the_runs(name: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    table = tables()[name]().tables("cpu")[0]
    seeds = range(3)
    (tmp_path / "results").mkdir()
    done = {training.id: result for training, result in made_up(table, seeds, tmp_path)}
    store = Store(tmp_path)
    missing = table.trainings(seeds)[-1]
    (tmp_path / "work").mkdir()
    store.fail(missing, "it <failed>")
    found = report.collect("the command", [table], [], seeds, store)
    path = report.write(tmp_path, found)
    page = Page(path.read_text(encoding="utf-8"))
    shown, runs = page.tables
    assert len(shown) == 1 + len(table.entries)
    for entry, cells in zip(table.entries, shown[1:], strict=True):
        results = [done[id] for seed in seeds if (id := table.training(entry, seed).id) in done]
        rows = [row for r in results for row in r["results"] if row["network"] == entry.network]
        values = [row["bleu"] or 100 * row["accuracy"] for row in rows]
        mean, std = statistics.mean(values), statistics.stdev(values)
        paper = entry.paper
        quoted = "–"
        if paper is not None:
            quoted = f"{paper.mean:.2f}" + ("" if paper.std is None else f" ({paper.std:.2f})")
        assert cells == [
            entry.method,
            entry.network,
            f"{mean:.2f} ({std:.2f})",
            str(len(values)),
            quoted,
            "–" if paper is None else f"{mean - paper.mean:+.2f}",
            format_count(statistics.mean(row["train_flops"] for row in rows)),
            format_duration(statistics.mean(row["seconds"] for row in rows)),
        ]
    assert len(runs) == 1 + len(table.trainings(seeds))
    for training, (label, scores, seconds, speed, place, state) in zip(
        table.trainings(seeds), runs[1:], strict=True
    ):
        assert label == training.label
        if training == missing:
            assert (scores, seconds, speed, place) == ("–",) * 4
            assert state == "failed: it <failed>"
            continue
        result = done[training.id]
        for row in result["results"]:
            value = row["bleu"] or 100 * row["accuracy"]
            assert f"{row['network']} {value:.2f} " in scores
        assert seconds == format_duration(result["seconds"])
        assert speed == "full 1,234 images/s, 25% of the product rate"
        assert place.startswith("a <processor>, 1 thread, torch 2.0, maskedtrain 1.0")
        assert state == "done"
    for claim in found.sections[0].claims:
        assert claim.paper in page.text
        assert claim.measured in page.text
    assert f"{len(done)} of {len(runs) - 1}" in page.text
    assert "a <remark>" in page.text
    # The tables of the Markdown page have the same cells.
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    cells = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
    assert [row for row in cells if row[0] != "---"] == [*shown, *runs]


def test_further_seeds_count_where_they_are_there(tmp_path: Path):
    table = tables()["table3"]().tables("cpu")[0]
    (tmp_path / "results").mkdir()
    # The last training of the last seed is missing.
    assert list(made_up(table, range(3), tmp_path))
    found = report.collect("command", [table], [], range(1), Store(tmp_path))
    counts = {(row[0], row[1]): row[3] for row in found.sections[0].rows}
    assert set(counts.values()) == {"2", "3"}
    assert counts["slimmable", "full"] == "2"
    assert {run.state for run in found.runs} == {"done"}
    assert len(found.runs) == len(table.trainings(range(3))) - 1


def test_a_report_needs_no_other_file(tmp_path: Path):
    pytest.importorskip("matplotlib")
    table = tables()["table3"]().tables("cpu")[0]
    (tmp_path / "results").mkdir()
    assert list(made_up(table, range(2), tmp_path))
    found = report.collect("command", [table], [], range(2), Store(tmp_path))
    page = Page(report.to_html(found))
    assert len(page.images) == 1
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    html = report.to_html(found)
    assert not re.search(r"url\(|@import|https?:", html)
    # The same results make the same page.
    assert report.to_html(found) == report.to_html(
        report.collect("command", [table], [], range(2), Store(tmp_path))
    )


def test_a_figure_is_drawn_and_judged_from_its_rows(tmp_path: Path):
    pytest.importorskip("matplotlib")
    figure = Figure(figure2.Config(steps=4, every=2))
    rows = [
        {"training": "with dropout", "step": step, "loss": 1.0, "c_sim": 0.5, "c_align": value}
        for step, value in ((0, 2.0), (2, math.inf))
    ]
    result = {**fixture(tiny(), {}), "options": figure._options(), "csv": to_csv(rows)}
    write_json(tmp_path / f"{figure.id}.json", result)
    (tmp_path / "results").mkdir()
    (tmp_path / f"{figure.id}.json").rename(tmp_path / "results" / f"{figure.id}.json")
    assert not Figure(figure2.Config(steps=8, every=2)).matches(result)
    found = report.collect("command", [], [figure], range(1), Store(tmp_path))
    (section,) = found.sections
    assert section.title == "Figure 2"
    assert section.drawing is not None
    assert list(section.claims) == figure.config.claims(rows)
    assert found.runs[0].command == "maskedtrain reproduce figure2 --steps 4 --every 2"
    other = Figure(figure2.Config(batch_norm=False, data=Path("somewhere")))
    assert other.command == "maskedtrain reproduce figure2 --no-batch-norm --data FOLDER"
    assert other.id != figure.id


def test_a_report_without_drawings_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = tables()["table3"]().tables("cpu")[0]
    (tmp_path / "results").mkdir()
    assert list(made_up(table, range(2), tmp_path))
    monkeypatch.setattr(report, "new_figure", lambda **size: None)
    found = report.collect("command", [table], [], range(2), Store(tmp_path))
    assert found.sections[0].drawing is None
    assert "matplotlib is not installed" in Page(report.to_html(found)).text


def test_a_report_of_nothing_says_so(tmp_path: Path):
    table = tables()["table3"]().tables("cpu")[0]
    found = report.collect("command", [table], [], range(1), Store(tmp_path))
    page = Page(report.to_html(found))
    assert "0 of 4" in " ".join(page.text.split())
    assert {state for *_, state in page.tables[1][1:]} == {"not done"}
    assert not page.images


def test_the_command_makes_a_report_of_what_is_there(tmp_path: Path, capsys: Any):
    cli.main(["reproduce", "table3", "--report-only", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert "[holds] ATS: an epoch takes 31.3 T FLOPs" in output
    assert re.search(r"^ATS +core +– +– +93.94 ", output, re.MULTILINE)
    assert (tmp_path / "report.html").exists()


def test_rows_are_chosen_by_their_training(tmp_path: Path, capsys: Any):
    command = ["reproduce", "table1", "--report-only", "--out", str(tmp_path)]
    cli.main([*command, "--rows", "*: core*1/32", "*: ATS, r = 1/32"])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    rows = [("core alone, r = 1/32", "core"), ("ATS, r = 1/32", "core"), ("ATS, r = 1/32", "full")]
    assert [tuple(row[:2]) for row in page.tables[0][1:]] == rows
    assert len(page.tables[1]) == 1 + 2 * 3
    assert "--seeds 3 --rows '*: core*1/32' '*: ATS, r = 1/32'" in page.text
    with pytest.raises(SystemExit):
        cli.main([*command, "--rows", "SGD*"])
    error = capsys.readouterr().err
    assert "rows: 'SGD*' matches no row of the plan, which has Table 1, Multi30k, " in error


@pytest.fixture
def tiny_table(monkeypatch: pytest.MonkeyPatch) -> Table:
    """What ``reproduce table3`` trains, in small: an entry that fails, and two of one training."""
    config = tiny().config
    bad = replace(config, data=CIFAR10Config(data=Path("/nowhere")))
    entries = (
        Entry("bad", "bad", "full", "digits-resnet8-ats", bad),
        Entry("core", "good", "core", "digits-resnet8-ats", config),
        Entry("full", "good", "full", "digits-resnet8-ats", config),
    )
    table = Table("tiny", "none", "accuracy", entries, lambda samples, flops: [], same=False)
    monkeypatch.setattr(table3.Config, "tables", lambda self, scale: [table])
    # The command cannot be that of a preset with other data.
    monkeypatch.setattr(Training, "command", "a command")
    return table


def test_a_failed_run_is_in_the_report_and_the_exit_code(
    tiny_table: Table, tmp_path: Path, capsys: Any
):
    command = ["reproduce", "table3", "--seeds", "1", "--device", "cpu", "--threads", "1"]
    for done in (False, True):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--out", str(tmp_path)])
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert ("1 of 2 runs are done already" in captured.out) == done
        assert "1 of 2 runs failed: tiny: bad, seed 0: " in captured.err
        assert captured.err.count("\n") == 1
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    states = {label: state for label, *_, state in page.tables[-1][1:]}
    assert states["tiny: good, seed 0"] == "done"
    assert states["tiny: bad, seed 0"].startswith("failed: ")


def test_ctrl_c_leaves_a_report_and_a_run_to_go_on_with(
    tiny_table: Table, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    command = ["reproduce", "table3", "--seeds", "1", "--device", "cpu", "--threads", "1"]
    command += ["--out", str(tmp_path)]
    step = Trainer.train_step

    def interrupted(self: Trainer, batches: Any) -> Any:
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 128 + signal.SIGINT
    assert "stopped in tiny: good, seed 0; the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "report.html").exists()
    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "at step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel3"], "unknown figure or table 'tabel3'; did you mean table3?"),
        (["table3", "--seeds", "0"], "seeds must be >= 1, got 0"),
        (["table3", "--scale", "huge"], "scale"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: Any):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

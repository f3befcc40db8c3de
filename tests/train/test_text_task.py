"""Runs on labelled sentences from end to end: train, resume, evaluate, extract; their scores."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file

from maskedtrain import cli
from maskedtrain.data.sst2 import Config as SST2
from maskedtrain.data.vocabulary import EOS, Vocabulary
from maskedtrain.methods.base import Pass, Plan
from maskedtrain.tasks.text import Task, matthews_correlation
from maskedtrain.training.console import Console
from maskedtrain.training.loop import evaluate, training_mode
from maskedtrain.training.losses import cross_entropy
from maskedtrain.training.metrics import read_metrics
from maskedtrain.training.run import Run

pytest.importorskip("tokenizers", reason="vocabularies need tokenizers")

# 120 sentences, in some 20 batches an epoch.
TINY = """--model text_classifier --method ats --ratios 0.5 --round-to 2 --d-model 8 --heads 2
    --ffn 16 --encoder-layers 1 --hidden 16 --optimizer adamw --lr 0.01 --vocab-size 300
    --val-sentences 30 --max-tokens 64 --device cpu --log-every 1"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 and CoLA of sentences with one word that tells the label."""
    folder = tmp_path_factory.mktemp("glue")
    rng = np.random.default_rng(0)
    for name, count in (("train", 120), ("dev", 40)):
        rows = []
        for i in range(count):
            words = rng.choice(["the", "a", "film", "plot", "seen"], rng.integers(1, 8)).tolist()
            words.insert(int(rng.integers(0, len(words) + 1)), ("bad", "good")[i % 2])
            rows.append((" ".join(words), i % 2))
        for task in ("SST-2", "CoLA"):
            (folder / task).mkdir(exist_ok=True)
        sst2 = "".join(f"{text}\t{label}\n" for text, label in rows)
        (folder / "SST-2" / f"{name}.tsv").write_text(f"sentence\tlabel\n{sst2}")
        cola = "".join(f"x\t{label}\t\t{text}\n" for text, label in rows)
        (folder / "CoLA" / f"{name}.tsv").write_text(cola)
    return folder


def train(folder: Path, data: Path, options: str) -> None:
    given = shlex.split(f"{TINY} {options}")
    cli.main(["train", *given, "--data", str(data), "--out", str(folder)])


RUNS = {
    "bag": "--dataset sst2 --encoder bag --lr 0.05 --epochs 4",
    "transformer": "--dataset cola --core lowrank --ratios 0.25 --epochs 4 --select best",
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained") / request.param
    train(folder, data, RUNS[request.param])
    return folder


def restored(folder: Path) -> tuple[Run, Task]:
    run = Run.restore(folder, Console(io.StringIO()))
    run.load_weights()
    assert isinstance(run.task, Task)
    return run, run.task


# Runs


def test_what_a_run_writes(trained: Path):
    vocabulary = Vocabulary.load(trained / "vocabulary.json")
    description = json.loads((trained / "task.json").read_text())
    assert description["vocab_size"] == len(vocabulary) <= 300
    assert description["vocabulary"] == vocabulary.digest and description["num_classes"] == 2
    summary = json.loads((trained / "summary.json").read_text())
    cola = trained.name == "transformer"
    for row in summary["results"]:
        assert 0 <= row["accuracy"] <= 1 and row["unit"] == "sentence"
        assert (row["matthews"] is not None) == cola
    logged = [r for r in read_metrics(trained / "metrics.jsonl") if r["kind"] == "eval"]
    assert logged and all(record["count"] == 30 for record in logged)
    assert all(("matthews" in record) == cola for record in logged)


def test_the_bag_learns_what_a_word_says(data: Path, tmp_path: Path):
    train(tmp_path / "run", data, RUNS["bag"])
    results = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    assert [row["network"] for row in results] == ["full", "core"]
    # Of 40 balanced sentences; by chance it is 0.5 ± 0.08.
    assert all(row["accuracy"] > 0.9 for row in results)


def test_best_weights_are_chosen_by_the_score(data: Path, tmp_path: Path):
    folder = tmp_path / "run"
    train(folder, data, RUNS["transformer"])
    scores: dict[str, list[float]] = {"full": [], "core": []}
    for record in read_metrics(folder / "metrics.jsonl"):
        if record["kind"] == "eval":
            scores[record["subnet"]].append(record["matthews"])
    run, task = restored(folder)
    for name, found in scores.items():
        run.load_best(name)
        best = task.evaluate(run.model, run.subnet(name), "val")["matthews"]
        assert len(found) == 4 and best == max(found)


def test_a_run_cut_in_an_epoch_goes_on_bitwise(
    trained: Path, data: Path, tmp_path: Path, assert_identical: Any
):
    folder = tmp_path / "cut"
    train(folder, data, f"{RUNS[trained.name]} --max-steps 7")
    cli.main(["train", "--resume", str(folder), "--max-steps", "1000000"])
    found, expected = (restored(place)[0].checkpoints.load() for place in (folder, trained))
    assert found.step == expected.step > 14
    assert_identical(found.weights, expected.weights)
    for part in ("trainer", "loader", "train_flops"):
        assert_identical(found.state[part], expected.state[part])


def test_eval_prints_what_the_run_found(trained: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    cli.main(["eval", str(trained)])
    printed = capsys.readouterr().out
    score = "matthews" if trained.name == "transformer" else "accuracy"
    assert ("MCC" in printed) == (score == "matthews")
    for row in json.loads((trained / "summary.json").read_text())["results"]:
        assert f"{100 * row[score]:.2f}" in printed


def test_a_run_does_not_go_on_with_another_vocabulary(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    config["data"]["split_seed"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", str(folder)])
    message = capsys.readouterr().err
    assert "the data are not those of the run" in message


@pytest.mark.parametrize("subnet", ["full", "core"])
def test_what_was_extracted_classifies_alike(subnet: str, trained: Path, tmp_path: Path):
    """From text: with the vocabulary, weights and program that are on disk, and no data."""
    program, weights = tmp_path / "network.pt2", tmp_path / "network.safetensors"
    out = ["--out", str(weights), "--export", str(program), "--weights", "last"]
    cli.main(["extract", str(trained), "--subnet", subnet, *out])
    network: Any = torch.export.load(program).module()
    network.load_state_dict(load_file(weights))
    run, task = restored(trained)
    vocabulary = Vocabulary.load(trained / "vocabulary.json")
    run.model.eval()
    for split in ("val", "test"):
        for tokens, _ in task.eval_batches(split):
            lines = [vocabulary.decode(row[row > EOS].tolist()) for row in tokens]
            assert set(lines) <= set(getattr(task.dataset, split).source_lines)
            with torch.no_grad(), run.subnet(subnet).activate():
                expected = run.model(tokens)
            # The same sums, perhaps by other kernels.
            torch.testing.assert_close(network(tokens), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(network(tokens[:2]), expected[:2], rtol=1e-5, atol=1e-5)


def test_extracting_needs_no_data(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def load(self: SST2, vocabulary: Any = None) -> Any:
        raise AssertionError("the data were loaded")

    monkeypatch.setattr("maskedtrain.data.text.TextConfig.load", load)
    cli.main(["extract", str(trained), "--out", str(tmp_path / "core.safetensors")])
    assert (tmp_path / "core.safetensors").is_file()


def test_images_and_sentences_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["train", "--dataset", "sst2", "--out", str(tmp_path / "run")])
    assert (
        "data set sst2 is for text, model resnet for images: choose another --model"
        in capsys.readouterr().err
    )


# Costs

# Each of some 60 tokens at least, as usual batches are: of fewer, low-rank layers use another form.
SHAPES = ((30, 2), (21, 3), (40, 13), (1, 64))


def test_flops_by_the_formula_are_those_that_torch_counts(trained: Path):
    run, task = restored(trained)
    for subnet in run.method.subnets.values():
        plan = Plan((Pass(subnet),), update=subnet)
        flops = task.batch_flops(plan)
        for shape in SHAPES:
            tokens = torch.full(shape, EOS)
            with training_mode(run.model):
                assert flops(tokens) == plan.flops(tokens), (subnet.name, shape)
    full, core = (task.unit_flops(s) for s in run.method.subnets.values())
    assert 0 < core < full


def test_training_flops_add_up(trained: Path):
    run, task = restored(trained)
    counts = {
        name: task.batch_flops(Plan((Pass(s),), update=s)) for name, s in run.method.subnets.items()
    }
    stream = task.train_batches().stream()
    total = 0
    logged = [r for r in read_metrics(trained / "metrics.jsonl") if r["kind"] == "train"]
    for record in logged:
        tokens, _ = next(stream)
        total += counts[record["subnet"]](tokens)
        assert record["train_flops"] == total
    assert [r["subnet"] for r in logged[:4]] == ["full", "core"] * 2


# Scores


@pytest.mark.parametrize("subnet", ["full", "core"])
def test_evaluation_is_of_every_sentence(subnet: str, trained: Path):
    run, task = restored(trained)
    network = run.subnet(subnet)
    found = task.evaluate(run.model, network, "test", final=True)
    plain = evaluate(run.model, network, task.eval_batches("test"), cross_entropy)
    assert (found["loss"], found["accuracy"], found["count"]) == (plain.loss, plain.accuracy, 40)
    guesses, labels = [], []
    run.model.eval()
    with torch.no_grad(), network.activate():
        for tokens, targets in task.eval_batches("test"):
            guesses += run.model(tokens).argmax(-1).tolist()
            labels += targets.tolist()
    assert found["accuracy"] == np.mean(np.equal(guesses, labels))
    if trained.name == "transformer":
        metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
        expected = metrics.matthews_corrcoef(labels, guesses)
        assert found["matthews"] == pytest.approx(expected, abs=1e-12)


confusions = st.integers(2, 5).flatmap(
    lambda classes: arrays(np.int64, (classes, classes), elements=st.integers(0, 20))
)


@given(confusions)
def test_matthews_is_scikit_learns(confusion: np.ndarray):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    labels, guesses = (
        np.repeat(index.ravel(), confusion.ravel()) for index in np.indices(confusion.shape)
    )
    found = matthews_correlation(torch.from_numpy(confusion))
    if len({*labels, *guesses}) < 2:
        # Which scikit-learn warns of, or refuses.
        assert found == 0
        return
    # Float64: of numbers up to 1e5, a few roundings.
    assert found == pytest.approx(metrics.matthews_corrcoef(labels, guesses), abs=1e-12)


def test_matthews_on_worked_numbers():
    assert matthews_correlation(torch.tensor([[3, 0], [0, 5]])) == 1
    assert matthews_correlation(torch.tensor([[0, 3], [5, 0]])) == -1
    # 6 and 2 of label 0, 1 and 3 of label 1: (6 * 3 - 2 * 1) / sqrt(8 * 7 * 5 * 4).
    found = matthews_correlation(torch.tensor([[6, 2], [1, 3]]))
    assert found == pytest.approx(16 / np.sqrt(8 * 7 * 5 * 4))
    # All of one class, as guesses or as labels.
    assert matthews_correlation(torch.tensor([[4, 0], [5, 0]])) == 0
    assert matthews_correlation(torch.tensor([[4, 5], [0, 0]])) == 0


def test_matthews_of_many_counts_is_exact():
    count = 10**7
    confusion = torch.tensor([[6, 2], [1, 3]]) * count
    assert matthews_correlation(confusion) == pytest.approx(16 / np.sqrt(1120), rel=1e-14)

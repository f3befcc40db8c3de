"""Runs on translation from end to end: train, resume, evaluate, translate, extract."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maskedtrain import cli
from maskedtrain.data.numbers import Config as NumbersConfig
from maskedtrain.data.vocabulary import EOS, Vocabulary
from maskedtrain.methods import Pass, Plan
from maskedtrain.tasks.translation import Task
from maskedtrain.training.console import Console
from maskedtrain.training.loop import evaluate
from maskedtrain.training.losses import cross_entropy
from maskedtrain.training.metrics import read_metrics
from maskedtrain.training.run import Run

# Some 18 batches an epoch of 300 numbers, which even a tiny network begins to learn.
TINY = """--preset numbers-lowrank --lr 0.02 --d-model 16 --heads 2 --ffn 32 --encoder-layers 1
    --decoder-layers 1 --largest 999 --train-pairs 300 --eval-pairs 20 --max-tokens 256
    --vocab-size 300 --ratios 0.25 --warmup-steps 10 --device cpu --log-every 1"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, cache, "--epochs 8 --select best")
    return folder


def train(folder: Path, cache: Path, options: str = "") -> None:
    given = shlex.split(f"{TINY} {options}")
    cli.main(["train", *given, "--cache", str(cache), "--out", str(folder)])


class Translate:
    """Runs the command on an input and returns the lines it wrote; ``written`` is all of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.written: Any = None

    def __call__(self, folder: Path, given: bytes, *options: str) -> list[str]:
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        self.capsys.readouterr()
        try:
            cli.main(["translate", str(folder), *options])
        finally:
            self.written = self.capsys.readouterr()
        assert self.written.out.endswith("\n") or not self.written.out
        return self.written.out.split("\n")[:-1]


@pytest.fixture
def translate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Translate:
    return Translate(monkeypatch, capsys)


def restored(folder: Path) -> tuple[Run, Task]:
    run = Run.restore(folder, Console(io.StringIO()))
    run.load_weights()
    assert isinstance(run.task, Task)
    return run, run.task


def test_what_a_run_writes(trained: Path):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"source.json", "target.json", "task.json", "best", "summary.json"}
    summary = json.loads((trained / "summary.json").read_text())
    (remark,) = summary["remarks"]
    assert remark.startswith("BLEU: sacreBLEU nrefs:1|case:mixed|eff:no|tok:char|smooth:exp|")
    for row in summary["results"]:
        assert 0 <= row["bleu"] <= 100 and 0 <= row["exact_match"] <= 1
        assert row["accuracy"] is None and row["unit"] == "token"
    logged = [r for r in read_metrics(trained / "metrics.jsonl") if r["kind"] == "eval"]
    for record in logged:
        assert record["perplexity"] == pytest.approx(torch.tensor(record["loss"]).exp().item())
        # The targets of 20 numbers, each with its eos.
        assert record["count"] > 20


def test_a_run_cut_in_an_epoch_goes_on_bitwise(
    trained: Path, tmp_path: Path, cache: Path, assert_identical: Any
):
    folder = tmp_path / "cut"
    train(folder, cache, "--epochs 8 --select best --max-steps 7")
    cli.main(["train", "--resume", str(folder), "--max-steps", "1000000"])
    found, expected = (restored(place)[0].checkpoints.load() for place in (folder, trained))
    assert found.step == expected.step > 14
    assert_identical(found.weights, expected.weights)
    for part in ("trainer", "loader", "train_flops"):
        assert_identical(found.state[part], expected.state[part])


def test_a_run_on_few_shapes_goes_on_bitwise_and_counts_what_is_padded(
    tmp_path: Path, cache: Path, assert_identical: Any
):
    options = "--epochs 2 --buckets 3"
    train(tmp_path / "whole", cache, options)
    train(tmp_path / "cut", cache, f"{options} --max-steps 7")
    cli.main(["train", "--resume", str(tmp_path / "cut"), "--max-steps", "1000000"])
    whole, cut = (restored(tmp_path / name)[0].checkpoints.load() for name in ("whole", "cut"))
    assert_identical(cut.weights, whole.weights)
    for part in ("trainer", "loader", "train_flops"):
        assert_identical(cut.state[part], whole.state[part])
    run, task = restored(tmp_path / "whole")
    assert task.shapes == 3 and task.eval_batches("val").buckets is None
    stream, shapes, total = task.train_batches().stream(), set[tuple[int, ...]](), 0
    for step in range(whole.step):
        (source, target), _ = next(stream)
        shapes.add((*source.shape, target.shape[1]))
        total += list(run.method.subnets.values())[step % 2].flops(source, target, training=True)
    assert len(shapes) == 3 and whole.state["train_flops"] == total


def test_flops_by_the_formula_are_those_that_torch_counts(trained: Path):
    run, task = restored(trained)
    for name, subnet in run.method.subnets.items():
        flops = task.batch_flops(Plan((Pass(subnet),), update=subnet))
        for sentences, source, target in ((40, 13, 11), (30, 9, 20), (64, 6, 5)):
            inputs = task._inputs(sentences, source, target)
            assert flops(inputs) == subnet.flops(*inputs, training=True), name
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
        inputs, _ = next(stream)
        total += counts[record["subnet"]](inputs)
        assert record["train_flops"] == total
    assert [r["subnet"] for r in logged[:4]] == ["full", "core"] * 2


def test_evaluation_is_of_whole_sentences(trained: Path):
    run, task = restored(trained)
    core = run.subnet("core")
    found = task.evaluate(run.model, core, "test", final=True)
    plain = evaluate(run.model, core, task.eval_batches("test"), cross_entropy)
    assert (found["loss"], found["count"]) == (plain.loss, plain.count)
    lines = task.dataset.test
    assert found["count"] == lines.target.lengths.sum() + len(lines)
    translated = [best.text for best, *_ in task.translate(run.model, core, lines.source_lines)]
    same = sum(a == b for a, b in zip(translated, lines.target_lines, strict=True))
    assert found["exact_match"] == same / 20


def test_the_loss_is_smoothed_in_training_alone(trained: Path):
    _, task = restored(trained)
    logits, targets = torch.randn(4, 7), torch.tensor([1, 2, -100, 6])
    assert torch.equal(task.loss(logits, targets), cross_entropy(logits, targets, 0.1))


NUMBERS = ["seven", "", "twenty-one", "three hundred and five"]


@pytest.mark.parametrize("subnet", ["core", "full"])
def test_lines_are_translated_in_their_order(subnet: str, trained: Path, translate: Translate):
    given = "\n".join(NUMBERS).encode()
    found = translate(trained, given, "--subnet", subnet, "--weights", "last")
    run, task = restored(trained)
    alone = [task.translate(run.model, run.subnet(subnet), [line])[0][0].text for line in NUMBERS]
    assert found == alone
    assert found[1] == "" and all(found[i] for i in (0, 2, 3))
    # Whatever is read at once, and however lines end.
    windows = ("\r\n".join(NUMBERS) + "\r\n").encode()
    options = ["--subnet", subnet, "--weights", "last", "--buffer", "1"]
    assert translate(trained, windows, *options) == found
    assert translate(trained, b"") == []


def test_several_translations_have_scores(trained: Path, translate: Translate):
    lines = translate(trained, "\n".join(NUMBERS).encode(), "--nbest", "3", "--beam", "4")
    cells = [line.split("\t") for line in lines]
    assert [int(number) for number, *_ in cells] == [1] * 3 + [2] + [3] * 3 + [4] * 3
    for number in (1, 3, 4):
        scores = [float(score) for n, score, _ in cells if int(n) == number]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3


def test_lines_before_bad_bytes_are_translated(trained: Path, translate: Translate):
    with pytest.raises(SystemExit) as stop:
        translate(trained, b"seven\ntwenty\nbad \xff\nthree\n")
    assert stop.value.code == 2
    assert len(translate.written.out.splitlines()) == 2
    assert translate.written.err == (
        "maskedtrain: error: standard input, line 3: not UTF-8 (invalid start byte)\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--subnet", "cor"], "unknown sub-network 'cor'; did you mean core?"),
        (["--nbest", "6"], "nbest must be <= beam = 5, got 6"),
        (["--beam", "0"], "beam must be >= 1, got 0"),
        (["--average", "9"], "average must be <= 2, the checkpoints of"),
        (["--weights", "best", "--step", "3"], "--weights best is one checkpoint: no --step"),
    ],
)
def test_mistakes(options: list[str], message: str, trained: Path, translate: Translate):
    with pytest.raises(SystemExit):
        translate(trained, b"seven\n", *options)
    assert message in translate.written.err


def test_a_run_on_images_cannot_translate(tmp_path: Path, translate: Translate):
    options = "--preset digits-resnet8-full --depth 8 --width 4 --image-size 8 --max-steps 1"
    cli.main(["train", *options.split(), "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        translate(tmp_path, b"seven\n")
    assert "is a run on images: it cannot translate" in translate.written.err


def test_translating_needs_no_data(
    trained: Path, translate: Translate, monkeypatch: pytest.MonkeyPatch
):
    def load(self: NumbersConfig) -> Any:
        raise AssertionError("the data were loaded")

    monkeypatch.setattr(NumbersConfig, "load", load)
    assert len(translate(trained, b"seven\n")) == 1


def test_a_run_does_not_go_on_with_another_vocabulary(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    config["data"]["split_seed"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", str(folder)])
    message = capsys.readouterr().err
    assert "the data are not those of the run" in message and "vocabulary must be" in message
    assert (folder / "metrics.jsonl").read_bytes() == before

    Vocabulary.train(["one two"], 260).save(folder / "source.json")
    with pytest.raises(
        ValueError, match=r"source\.json is not the vocabulary of the run: its digest"
    ):
        Run.restore(folder, Console(io.StringIO()))


@pytest.mark.parametrize("subnet", ["core", "full"])
def test_what_was_extracted_translates_alike(subnet: str, trained: Path, tmp_path: Path):
    program, weights = tmp_path / "network.pt2", tmp_path / "network.safetensors"
    out = ["--out", str(weights), "--export", str(program), "--weights", "last"]
    cli.main(["extract", str(trained), "--subnet", subnet, *out])
    run, task = restored(trained)
    network: Any = torch.export.load(program).module()
    network.load_state_dict(load_file(weights))
    ids = task.vocabularies[0].encode(["three hundred and five"])[0]
    source = torch.tensor([[*ids, EOS]])
    target = torch.tensor([[1, 7, 8, 9]])
    with torch.no_grad(), run.subnet(subnet).activate():
        expected = run.model.eval()(source, target)
    # The same sums, perhaps by other kernels.
    torch.testing.assert_close(network(source, target), expected, rtol=1e-5, atol=1e-5)
    suffixes = {name.split(".")[-1] for name in load_file(weights)}
    assert suffixes == {"weight", "bias"}


def test_data_and_model_must_be_for_one_thing(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit):
        cli.main(["train", "--dataset", "numbers", "--out", str(tmp_path / "run")])
    assert (
        "data set numbers is for translation, model resnet for images: choose another --model"
        in capsys.readouterr().err
    )

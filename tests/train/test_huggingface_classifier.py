"""Classifiers of ``transformers``, small and untrained, with a tokenizer of their own: offline."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskedtrain import SubNetwork, cli, lowrank
from maskedtrain.data.sst2 import Config as SST2
from maskedtrain.data.vocabulary import EOS, PAD
from maskedtrain.layers import MaskedModule
from maskedtrain.methods.base import Pass, Plan
from maskedtrain.models.huggingface import FIRST, Config, HuggingFaceClassifier
from maskedtrain.training.console import Console
from maskedtrain.training.loop import training_mode
from maskedtrain.training.run import Run

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "##s"]
CLS, SEP = FIRST + 2, FIRST + 3
LONGEST = 16


def save_tokenizer(folder: Path, **options: Any) -> None:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")  # pyright: ignore[reportCallIssue]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # Padding of its own, which batches here do without.
    tokenizer.enable_padding(length=LONGEST)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        **options,
    ).save_pretrained(folder)


def bert(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        # Larger than BERT's: a few steps are to change its mind.
        initializer_range=0.3,
        **{**sizes, **options},
    )
    return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    save_tokenizer(folder)
    bert().save_pretrained(folder)
    return folder


def classifier(pretrained: Path) -> HuggingFaceClassifier:
    config = Config(path=str(pretrained))
    return config.build(vocab=len(config.vocabulary()), num_classes=2).eval()


def batch(*sentences: list[int], extra: int = 0) -> Tensor:
    """What ``TextBatches`` gives."""
    rows = [torch.tensor([*ids, EOS] + [PAD] * extra) for ids in sentences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


GOOD, LONG = [CLS, FIRST + 5, SEP], [CLS, FIRST + 8, FIRST + 7, FIRST + 5, SEP]

# The vocabulary


def test_ids_are_the_tokenizers_behind_the_special_ones(pretrained: Path):
    vocabulary = Config(path=str(pretrained)).vocabulary()
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)
    assert len(vocabulary) == FIRST + len(WORDS)
    for line in ("the good films", "bad", "", "zzz bad"):
        (ids,) = vocabulary.encode([line])
        assert ids == [FIRST + i for i in tokenizer(line, padding=False)["input_ids"]]
    ids = vocabulary.encode(["the good films"])[0]
    assert ids == [CLS, FIRST + 8, FIRST + 5, FIRST + 7, FIRST + 9, SEP]
    assert "good" in vocabulary.decode(ids) and vocabulary.decode([PAD, EOS]) == ""


def test_what_looks_like_a_special_token_is_text(pretrained: Path):
    (ids,) = Config(path=str(pretrained)).vocabulary().encode(["good [SEP] bad"])
    assert ids.count(SEP) == 1 and ids[-1] == SEP


@pytest.mark.parametrize(("limit", "expected"), [(None, LONGEST), (10, 10), (1000, LONGEST)])
def test_sentences_are_cut_to_what_the_model_takes(
    limit: int | None, expected: int, tmp_path: Path
):
    save_tokenizer(tmp_path, **({} if limit is None else {"model_max_length": limit}))
    bert().config.save_pretrained(tmp_path)
    (ids,) = Config(path=str(tmp_path)).vocabulary().encode(["good " * 40])
    assert len(ids) == expected and ids[-1] == SEP


# The model


def test_logits_are_the_networks_own(pretrained: Path):
    model = classifier(pretrained).double()
    found = model(batch(LONG, GOOD))
    for row, ids in enumerate((LONG, GOOD)):
        own = torch.tensor([[i - FIRST for i in ids]])
        expected = model.network(input_ids=own, attention_mask=torch.ones_like(own)).logits[0]
        # float64: the same sums in another order.
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)


def test_padding_changes_no_result(pretrained: Path):
    model = classifier(pretrained).double()
    expected = model(batch(LONG, GOOD))
    for extra in (1, 5):
        found = model(batch(LONG, GOOD, extra=extra))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_sentences_without_any_token(pretrained: Path):
    """Which tokenizers without [CLS] make of empty lines: one token of padding each."""
    model = classifier(pretrained).double()
    alone = model(batch([]))
    assert alone.isfinite().all()
    found = model(batch(LONG, [], GOOD))
    torch.testing.assert_close(found[1:2], alone, rtol=1e-12, atol=1e-12)


def test_parameters_are_float32_and_those_of_the_files(pretrained: Path, tmp_path: Path):
    half = bert().bfloat16()
    save_tokenizer(tmp_path)
    half.save_pretrained(tmp_path)
    parameters = dict(classifier(tmp_path).network.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    for name, tensor in half.named_parameters():
        assert torch.equal(parameters[name], tensor.float()), name


@pytest.mark.parametrize("name", ["full", "core"])
def test_what_is_extracted_gives_the_same(name: str, pretrained: Path):
    model = classifier(pretrained).double()
    subnets = {"core": lowrank(model, model.lowrank_targets, 0.25)}
    subnets["full"] = SubNetwork.full(model)
    tokens = batch(LONG, GOOD)
    with subnets[name].activate():
        expected = model(tokens)
    plain = subnets[name].extract()
    assert not any(isinstance(module, MaskedModule) for module in plain.modules())
    # Merged weights W + V U round otherwise: float64.
    torch.testing.assert_close(plain(tokens), expected, rtol=1e-12, atol=1e-12)
    assert 0 < subnets["core"].flops(tokens) < subnets["full"].flops(tokens)


# What is refused


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    save_tokenizer(tmp_path)
    transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=7,
            hidden_size=8,
            num_attention_heads=1,
            intermediate_size=8,
            num_hidden_layers=1,
        )
    ).save_pretrained(tmp_path)
    message = r"must have an embedding of its tokenizer's 10 tokens, got 7"
    with pytest.raises(ValueError, match=message):
        classifier(tmp_path)


def test_slow_tokenizers_are_refused(pretrained: Path, monkeypatch: pytest.MonkeyPatch):
    class Slow:
        model_max_length = 10

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: Slow())
    with pytest.raises(ValueError, match=r"has no fast tokenizer, got Slow"):
        Config(path=str(pretrained)).vocabulary()


def test_without_transformers_there_is_a_hint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"need transformers: pip install .*maskedtrain\[hub\]"):
        Config().vocabulary()


# A run

TINY = """--dataset sst2 --model huggingface --method ats --core lowrank --ratios 0.25
    --optimizer adamw --lr 0.01 --epochs 8 --val-sentences 20 --max-tokens 48 --device cpu
    --log-every 1"""


@pytest.fixture(scope="module")
def trained(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("trained") / "run"
    rows = "".join(
        f"the {('bad', 'good')[i % 2]} film{'s' * (i % 3 > 0)}\t{i % 2}\n" for i in range(60)
    )
    for name in ("train", "dev"):
        (data / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}")
    train(folder, pretrained, data, "")
    return folder


def train(folder: Path, pretrained: Path, data: Path, options: str) -> None:
    places = ["--path", str(pretrained), "--data", str(data), "--out", str(folder)]
    cli.main(["train", *TINY.split(), *options.split(), *places])


def test_a_run_learns(trained: Path):
    rows = json.loads((trained / "summary.json").read_text())["results"]
    assert [row["network"] for row in rows] == ["full", "core"]
    # 60 balanced sentences that a word settles.
    assert all(row["accuracy"] > 0.9 for row in rows)


def test_a_run_cut_in_an_epoch_goes_on_bitwise(
    trained: Path, pretrained: Path, tmp_path: Path, assert_identical: Any
):
    def state(folder: Path) -> Any:
        return Run.restore(folder, Console(io.StringIO())).checkpoints.load()

    data = json.loads((trained / "config.json").read_text())["data"]["data"]
    train(tmp_path, pretrained, Path(data), "--max-steps 3")
    cli.main(["train", "--resume", str(tmp_path), "--max-steps", "1000000"])
    found, expected = state(tmp_path), state(trained)
    assert found.step == expected.step > 6
    assert_identical(found.weights, expected.weights)
    for part in ("trainer", "loader", "train_flops"):
        assert_identical(found.state[part], expected.state[part])


def test_flops_by_the_formula_are_those_that_torch_counts(trained: Path):
    run = Run.restore(trained, Console(io.StringIO()))
    for subnet in run.method.subnets.values():
        plan = Plan((Pass(subnet),), update=subnet)
        flops = run.task.batch_flops(plan)
        for shape in ((40, 2), (9, LONGEST + 1)):
            tokens = torch.full(shape, EOS)
            with training_mode(run.model):
                assert flops(tokens) == plan.flops(tokens), (subnet.name, shape)


@pytest.mark.parametrize("subnet", ["full", "core"])
def test_what_was_extracted_classifies_alike(subnet: str, trained: Path, tmp_path: Path):
    program = tmp_path / "network.pt2"
    cli.main(["extract", str(trained), "--subnet", subnet, "--export", str(program)])
    network: Any = torch.export.load(program).module()
    run = Run.restore(trained, Console(io.StringIO()))
    run.load_weights()
    run.model.eval()
    for tokens in (batch(LONG, GOOD), batch(GOOD), batch(GOOD, LONG, GOOD, extra=4)):
        with torch.no_grad(), run.subnet(subnet).activate():
            # The same sums, perhaps by other kernels.
            expected = run.model(tokens)
            torch.testing.assert_close(network(tokens), expected, rtol=1e-5, atol=1e-5)


def test_the_vocabulary_is_saved_with_the_run(trained: Path, pretrained: Path):
    saved = json.loads((trained / "task.json").read_text())
    vocabulary = Config(path=str(pretrained)).vocabulary()
    assert saved["vocabulary"] == vocabulary.digest and saved["vocab_size"] == len(vocabulary)
    tokenizer = tokenizers.Tokenizer.from_file(str(trained / "vocabulary.json"))
    expected = vocabulary.encode(["the good films"])[0]
    assert [FIRST + i for i in tokenizer.encode("the good films").ids] == expected


def test_vocab_size_has_no_meaning(trained: Path, pretrained: Path):
    data = json.loads((trained / "config.json").read_text())["data"]["data"]
    vocabulary = Config(path=str(pretrained)).vocabulary()
    one, other = (
        SST2(data=Path(data), vocab_size=size, val_sentences=20).load(vocabulary)
        for size in (1, 8000)
    )
    assert one.train.digest == other.train.digest and one.vocabulary is vocabulary

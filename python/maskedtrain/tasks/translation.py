"""Translation of sentences: token-budget batches, BLEU of beam search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from maskedtrain.data.translation import TokenBatches, TranslationConfig, TranslationDataset
from maskedtrain.data.vocabulary import EOS, PAD, Vocabulary
from maskedtrain.generation import beam_search
from maskedtrain.methods.base import Plan
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.tasks import base
from maskedtrain.training.loop import evaluate, evaluation_mode, training_mode
from maskedtrain.training.losses import cross_entropy
from maskedtrain.training.scores import BLEU

__all__ = ["Task", "Translated"]

SIDES = ("source", "target")


@dataclass(frozen=True)
class Translated:
    """A translation, and its log probability by token."""

    text: str
    score: float


class Task(base.Task):
    unit = "token"
    score = BLEU

    def describe(self, dataset: TranslationDataset) -> dict[str, Any]:
        return {
            "source_language": dataset.source_language,
            "target_language": dataset.target_language,
            "source_vocabulary": dataset.source_vocabulary.digest,
            "target_vocabulary": dataset.target_vocabulary.digest,
            "mean_lengths": list(dataset.train.mean_lengths),
            "bleu_tokenizer": dataset.bleu_tokenizer,
        }

    def save(self, folder: Path) -> None:
        super().save(folder)
        for side, vocabulary in zip(SIDES, self.vocabularies, strict=True):
            vocabulary.save(folder / f"{side}.json")

    @cached_property
    def vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """Those of source and target."""
        if self.saved is None:
            return self.dataset.source_vocabulary, self.dataset.target_vocabulary
        found = [Vocabulary.load(self.saved / f"{side}.json") for side in SIDES]
        for side, vocabulary in zip(SIDES, found, strict=True):
            expected = self.description[f"{side}_vocabulary"]
            if vocabulary.digest != expected:
                path = self.saved / f"{side}.json"
                raise ValueError(
                    f"{path} is not the vocabulary of the run: its digest must be {expected}, "
                    f"got {vocabulary.digest}"
                )
        source, target = found
        return source, target

    @property
    def options(self) -> TranslationConfig:
        return cast(TranslationConfig, self.config.data)

    def model_arguments(self) -> dict[str, Any]:
        source, target = self.vocabularies
        return {"source_vocab": len(source), "target_vocab": len(target)}

    def train_batches(self) -> TokenBatches:
        return TokenBatches(
            self.dataset.train,
            self.options.max_tokens,
            seed=self.config.run.seed,
            device=self.device,
            shuffle=True,
            buckets=self.options.buckets,
        )

    @property
    def shapes(self) -> int | None:
        return self.options.buckets

    def eval_batches(self, split: base.Split) -> TokenBatches:
        return TokenBatches(
            getattr(self.dataset, split), self.options.eval_max_tokens, device=self.device
        )

    def evaluate(
        self, model: nn.Module, subnet: SubNetwork, split: base.Split, *, final: bool = False
    ) -> dict[str, float]:
        batches = self.eval_batches(split)
        found = evaluate(model, subnet, batches, cross_entropy, autocast=self.autocast)
        lines = getattr(self.dataset, split)
        beam = self.options.beam if final else self.options.val_beam
        translated = self.translate(model, subnet, lines.source_lines, beam=beam)
        texts = [best.text for best, *_ in translated]
        # White space is not translated: vocabularies make one space of any.
        pairs = zip(texts, lines.target_lines, strict=True)
        exact = sum(text == " ".join(line.split()) for text, line in pairs) / len(texts)
        bleu = self._bleu.corpus_score(texts, [lines.target_lines]).score
        return {
            **asdict(found),
            "perplexity": math.exp(found.loss) if found.loss < 700 else math.inf,
            "bleu": bleu,
            "exact_match": exact,
        }

    @cached_property
    def _bleu(self) -> Any:
        try:
            from sacrebleu.metrics.bleu import BLEU as SacreBLEU
        except ImportError as error:
            raise ImportError(
                'BLEU needs sacrebleu: pip install "maskedtrain[text]"', name=error.name
            ) from error
        tokenizer = self.description["bleu_tokenizer"]
        # It warns of tokenised text, which it is meant to get with "none".
        return SacreBLEU(tokenize=tokenizer, force=tokenizer == "none")

    def notes(self) -> Sequence[str]:
        return self.dataset.notes

    def remarks(self) -> Sequence[str]:
        return [f"BLEU: sacreBLEU {self._bleu.get_signature()}, beam {self.options.beam}"]

    def translate(
        self,
        model: nn.Module,
        subnet: SubNetwork,
        lines: Sequence[str],
        *,
        beam: int | None = None,
        nbest: int = 1,
    ) -> list[list[Translated]]:
        """The ``nbest`` best translations of each line by a sub-network, best first.

        An empty line is translated by an empty one.
        """
        source_vocabulary, target_vocabulary = self.vocabularies
        sources = [torch.tensor([*ids, EOS]) for ids in source_vocabulary.encode(lines)]
        found = [[Translated("", 0.0)] for _ in lines]
        model_device = next(model.parameters()).device
        beam = self.options.beam if beam is None else beam
        with subnet.activate():
            for batch in _by_length(sources, self.options.eval_max_tokens // beam):
                source = pad_sequence(
                    [sources[i] for i in batch], batch_first=True, padding_value=PAD
                ).to(model_device)
                with torch.autocast(
                    model_device.type, self.autocast, enabled=self.autocast is not None
                ):
                    results = beam_search(
                        model,
                        source,
                        beam=beam,
                        length_penalty=self.options.length_penalty,
                        nbest=nbest,
                    )
                for i, hypotheses in zip(batch, results, strict=True):
                    found[i] = [
                        Translated(target_vocabulary.decode(h.tokens), h.score) for h in hypotheses
                    ]
        return found

    def batch_flops(self, plan: Plan) -> Callable[[tuple[Tensor, Tensor]], int]:
        """A polynomial in the batch's sides, through counts of torch's: exact as long as the layers
        compute by the same form as in batches of the usual size.
        """
        B, S, T = self._usual_shape()
        shapes = [(B, S, T), (2 * B, S, T), (B, 2 * S, T), (B, S, 2 * T)]
        shapes += [(B, 2 * S, 2 * T), (B, 3 * S, T)]
        with training_mode(plan.update.model):
            counts = [plan.flops(*self._inputs(*shape)) for shape in shapes]
        coefficients = np.linalg.solve([_monomials(*shape) for shape in shapes], counts)

        def flops(inputs: tuple[Tensor, Tensor]) -> int:
            (sentences, source), target = inputs[0].shape, inputs[1].shape[1]
            return round(float(coefficients @ _monomials(sentences, source, target)))

        return flops

    def unit_flops(self, subnet: SubNetwork) -> float:
        B, S, T = self._usual_shape()
        with evaluation_mode(subnet.model):
            return subnet.flops(*self._inputs(B, S, T)) / (B * T)

    def _usual_shape(self) -> tuple[int, int, int]:
        """Sentences, and source and target tokens of each, of a batch of mean lengths."""
        source, target = (max(1, round(length)) for length in self.description["mean_lengths"])
        return max(1, self.options.max_tokens // max(source, target)), source, target

    def _inputs(self, sentences: int, source: int, target: int) -> tuple[Tensor, Tensor]:
        def ones(length: int) -> Tensor:
            return torch.ones(sentences, length, dtype=torch.int64, device=self.device)

        return ones(source), ones(target)

    def example(self) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        batch = torch.export.Dim("batch")
        source, target = (torch.export.Dim(f"{side}_length", min=2) for side in SIDES)
        inputs = tuple(torch.full((2, length), EOS) for length in (7, 5))
        return inputs, ({0: batch, 1: source}, {0: batch, 1: target})


def _monomials(sentences: int, source: int, target: int) -> list[int]:
    """What costs are sums of: once a pass, linear layers, attention."""
    B, S, T = sentences, source, target
    return [1, B * S, B * T, B * S * S, B * T * T, B * S * T]


def _by_length(sources: Sequence[Tensor], max_tokens: int) -> Iterator[list[int]]:
    """Indices of the sentences that are not empty, in batches of at most ``max_tokens`` padded
    tokens; the longest first, so that memory that will not do is found at once.
    """
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    order = [i for i in order if len(sources[i]) > 1]
    while order:
        count = max(1, max_tokens // len(sources[order[0]]))
        yield order[:count]
        order = order[count:]

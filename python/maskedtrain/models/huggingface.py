"""Classifiers of the package ``transformers``, pretrained ones for instance, with their own
tokenizers.

# B sentences, S tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from maskedtrain.data.vocabulary import EOS, PAD, SPECIAL, Vocabulary
from maskedtrain.models._transformer_layers import attended
from maskedtrain.models.text_classifier import TextModelConfig

__all__ = ["Config", "HuggingFaceClassifier", "HuggingFaceVocabulary"]

FIRST = len(SPECIAL)


class HuggingFaceVocabulary(Vocabulary):
    """The tokens of a ``tokenizers.Tokenizer`` of others, after the special ones that every
    vocabulary here has: id i is i + 4. What it puts around a sentence ([CLS], [SEP]) is part of it.
    """

    def __len__(self) -> int:
        return FIRST + super().__len__()

    def encode_each(self, lines: Sequence[str]) -> Iterator[list[int]]:
        for ids in super().encode_each(lines):
            yield [FIRST + i for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([i - FIRST for i in ids if i >= FIRST])


class HuggingFaceClassifier(nn.Module):
    """A model of ``transformers`` for sequence classification, as ``network``, on this package's
    batches: ids of a ``HuggingFaceVocabulary`` in, logits out.

    Special tokens of this package, padding and the end of a sentence, are kept from the network.

    Args:
        network: such as ``AutoModelForSequenceClassification.from_pretrained(...)`` gives.
        lowrank_targets: layers that low-rank cores have as factors, as patterns.
    """

    def __init__(self, network: nn.Module, *, lowrank_targets: Sequence[str] = ()) -> None:
        super().__init__()
        self.network = network
        self.lowrank_targets = tuple(lowrank_targets)
        config: Any = network.config
        self.pad = config.pad_token_id or 0

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of int64 ``tokens [B, S]``, ending with eos, padded with 0."""
        tokens = tokens.masked_fill(tokens == EOS, PAD)
        # The last column was ends and padding. Sentences without any token keep it, of length 1.
        if tokens.shape[1] > 1:
            tokens = tokens[:, :-1]
        ids_BS = (tokens - FIRST).masked_fill(tokens == PAD, self.pad)
        return self.network(input_ids=ids_BS, attention_mask=attended(tokens).long()).logits


@dataclass(frozen=True)
class Config(TextModelConfig):
    """A model of the package transformers for sequence classification, with its own tokenizer in
    the place of the learned vocabulary."""

    name = "huggingface"

    path: str = "bert-base-uncased"
    """Folder of the model and its tokenizer, or their name on the Hugging Face hub."""
    lowrank_targets: tuple[str, ...] = ("*.query", "*.key", "*.intermediate.dense")
    """Layers that low-rank cores have as factors, as patterns; the default is BERT's."""

    def vocabulary(self) -> HuggingFaceVocabulary:
        transformers = _transformers()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.path)
        config = transformers.AutoConfig.from_pretrained(self.path)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{self.path} has no fast tokenizer, got {type(tokenizer).__name__}")
        backend.no_padding()
        # One without a limit has a huge number, or none.
        limits = tokenizer.model_max_length, getattr(config, "max_position_embeddings", 2**31)
        backend.enable_truncation(min(limits))
        return HuggingFaceVocabulary(backend)

    def build(self, *, vocab: int, num_classes: int) -> HuggingFaceClassifier:
        auto = _transformers().AutoModelForSequenceClassification
        # Whatever the files are in: parameters are trained in float32.
        network = auto.from_pretrained(self.path, num_labels=num_classes).float()
        rows = network.get_input_embeddings().num_embeddings
        if vocab - FIRST > rows:
            raise ValueError(
                f"{self.path} must have an embedding of its tokenizer's {vocab - FIRST} tokens, "
                f"got {rows}"
            )
        return HuggingFaceClassifier(network, lowrank_targets=self.lowrank_targets)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'these models need transformers: pip install "maskedtrain[hub]"', name=error.name
        ) from error
    return transformers

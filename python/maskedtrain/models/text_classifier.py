"""Classifiers of sentences: a bag of words or a Transformer's encoder, and a linear head.

# B sentences, S tokens, D model width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor, nn

from maskedtrain.data.vocabulary import PAD, Vocabulary
from maskedtrain.layers import MaskedLinear
from maskedtrain.models._transformer_layers import (
    Encoder,
    EncoderLayer,
    Norm,
    Options,
    attended,
    width_masks,
)
from maskedtrain.models.base import ModelConfig
from maskedtrain.models.mlp import MLP
from maskedtrain.widths import Kept
from partial_kernels import Mask

__all__ = ["Config", "TextClassifier", "TextModelConfig"]


class TextClassifier(nn.Module):
    """Token ids to the logits of classes.

    Padding is 0 (``maskedtrain.data.vocabulary.PAD``), on the right, and never changes a result.

    Args:
        vocab: size of the vocabulary.
        classes: outputs.
        encoder: "bag" is the mean of the embeddings, and its ``head`` an ``MLP``; "transformer" the
            mean of an encoder's outputs, and its ``head`` a linear layer.
        d_model: width of embeddings and layers.
        dropout: share that is dropped in training: of the transformer's embeddings and layers'
            outputs, of the bag's hidden neurons.
        hidden: neurons of each of the bag's hidden layers.
        heads: attention heads of the transformer.
        ffn: hidden neurons of its feed-forward layers.
        encoder_layers: its layers.
        norm: "post" normalises each residual sum, "pre" each layer's input and the stack's output.
    """

    lowrank_targets: tuple[str, ...]
    """Layers that low-rank cores have as factors: the bag's hidden layers, or feed-forward, query
    and key projections."""

    def __init__(
        self,
        vocab: int,
        classes: int,
        *,
        encoder: Literal["bag", "transformer"] = "transformer",
        d_model: int = 128,
        dropout: float = 0.1,
        hidden: Sequence[int] = (128,),
        heads: int = 4,
        ffn: int = 512,
        encoder_layers: int = 2,
        norm: Norm = "pre",
    ) -> None:
        super().__init__()
        if encoder == "bag":
            self.encoder = nn.Embedding(vocab, d_model, PAD)
            self.head = MLP(d_model, hidden, classes, dropout=dropout)
            self.lowrank_targets = ("head.hidden.*",)
        elif encoder == "transformer":
            options = Options(d_model, heads, ffn, norm, dropout, 0.0, 0.0, MaskedLinear)
            self.encoder = Encoder(
                vocab, [EncoderLayer(options) for _ in range(encoder_layers)], options
            )
            self.head = MaskedLinear(d_model, classes)
            self.lowrank_targets = ("*.fc1", "*.fc2", "*.q_proj", "*.k_proj")
        else:
            raise ValueError(f'encoder must be "bag" or "transformer", got {encoder!r}')

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of int64 ``tokens [B, S]``, padded with 0."""
        mask_BS = attended(tokens)
        if isinstance(self.encoder, Encoder):
            x_BSD = self.encoder(tokens, mask_BS[:, None, None])
        else:
            x_BSD = self.encoder(tokens)
        mean_BD = (x_BSD * mask_BS[..., None]).sum(1) / mask_BS.sum(1, keepdim=True)
        return self.head(mean_BD)

    def width_masks(self, kept: Kept) -> dict[str, Mask]:
        """Masks of a narrower network.

        The widths are the bag's ``head.hidden.0`` ..., or the transformer's feed-forward layers,
        such as ``encoder.layers.0.fc1``, and the dimensions of its attention heads, such as
        ``encoder.layers.0.self_attn``.
        """
        if isinstance(self.head, MLP):
            masks = self.head.width_masks(lambda name, total: kept(f"head.{name}", total))
            return {f"head.{name}": mask for name, mask in masks.items()}
        return width_masks(self, kept)


@dataclass(frozen=True)
class TextModelConfig(ModelConfig):
    """What models of text have in common."""

    task = "text"

    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary that the model was made for; None if it takes any."""
        return None


@dataclass(frozen=True)
class Config(TextModelConfig):
    """A classifier of sentences: a bag of words or a Transformer's encoder."""

    name = "text_classifier"

    encoder: Literal["bag", "transformer"] = "transformer"
    """The mean of embeddings with hidden layers behind it, or of a Transformer's outputs."""
    d_model: int = 128
    """Width of embeddings and layers."""
    dropout: float = 0.1
    """Share that is dropped in training: of the transformer's embeddings and layers' outputs, of
    the bag's hidden neurons."""
    hidden: tuple[int, ...] = (128,)
    """Neurons of each of the bag's hidden layers."""
    heads: int = 4
    """Attention heads of the transformer."""
    ffn: int = 512
    """Hidden neurons of the transformer's feed-forward layers."""
    encoder_layers: int = 2
    """Layers of the transformer."""
    norm: Literal["post", "pre"] = "pre"
    """Layer norm after each residual sum, or before each layer."""

    def build(self, *, vocab: int, num_classes: int) -> TextClassifier:
        return TextClassifier(vocab, num_classes, **asdict(self))

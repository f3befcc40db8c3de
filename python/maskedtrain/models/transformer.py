"""Encoder-decoder Transformer (Vaswani et al. 2017) whose widths or ranks can be a sub-network's.

Semantics and parameter names are fairseq's (``encoder.layers.0.self_attn.q_proj`` ...).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from maskedtrain.layers import MaskedLinear
from maskedtrain.models._transformer_layers import (
    Decoder,
    DecoderLayer,
    DecoderState,
    Encoder,
    EncoderLayer,
    MakeLinear,
    Norm,
    Options,
    attended,
    width_masks,
)
from maskedtrain.models.base import ModelConfig
from maskedtrain.widths import Kept
from partial_kernels import Mask

__all__ = ["Config", "Transformer"]


class Transformer(nn.Module):
    """Translates token ids into logits of the target's next tokens.

    Padding is 0 (``maskedtrain.data.vocabulary.PAD``), on the right, and never changes a result.

    Args:
        source_vocab: size of the source's vocabulary.
        target_vocab: size of the target's.
        d_model: width of embeddings and layers.
        heads: attention heads.
        ffn: hidden neurons of the feed-forward layers.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        norm: "post" normalises each residual sum, "pre" each layer's input and the stacks' outputs.
        dropout: share of embeddings and of layers' outputs that are dropped in training.
        attention_dropout: share of attention weights.
        activation_dropout: share of the feed-forward layers' hidden neurons.
        tie_output: the output layer's weight is the decoder's embedding.
        share_embeddings: encoder and decoder have one embedding; needs one vocabulary.
        linear: ``linear(in_features, out_features)`` makes the layers of attention and feed-forward
            parts: ``MaskedLinear``, ``nn.Linear``, ``partial(LFCLinear, rank_ratio=1/32)`` ...
    """

    lowrank_targets: ClassVar[tuple[str, ...]] = ("*.fc1", "*.fc2", "*.q_proj", "*.k_proj")
    """Layers that low-rank cores have as factors: feed-forward, query and key projections."""

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        *,
        d_model: int = 512,
        heads: int = 4,
        ffn: int = 1024,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        norm: Norm = "post",
        dropout: float = 0.3,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        tie_output: bool = True,
        share_embeddings: bool = False,
        linear: MakeLinear = MaskedLinear,
    ) -> None:
        super().__init__()
        options = Options(
            d_model, heads, ffn, norm, dropout, attention_dropout, activation_dropout, linear
        )
        self.encoder = Encoder(
            source_vocab, [EncoderLayer(options) for _ in range(encoder_layers)], options
        )
        self.decoder = Decoder(
            target_vocab,
            [DecoderLayer(options) for _ in range(decoder_layers)],
            options,
            tie_output=tie_output,
        )
        if share_embeddings:
            if source_vocab != target_vocab:
                raise ValueError(
                    "share_embeddings needs one vocabulary, got sizes "
                    f"{source_vocab} and {target_vocab}"
                )
            self.encoder.embed_tokens.weight = self.decoder.embed_tokens.weight

    def forward(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of the tokens that follow each of ``decoder_input``.

        Args:
            source: int64 ``[B, S]``, ending with eos, padded with 0.
            decoder_input: int64 ``[B, T]``, beginning with bos, padded with 0.
        """
        memory, mask = self.encode(source)
        return self.decoder(decoder_input, memory, mask)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's outputs ``[B, S, D]``, and bool ``[B, 1, 1, S]``: which of them are no
        padding.
        """
        mask = attended(source)[:, None, None]
        return self.encoder(source, mask), mask

    def start(self, source: Tensor) -> DecoderState:
        """The state from which ``step`` writes."""
        memory, mask = self.encode(source)
        keys = [layer.encoder_attn.keys(memory) for layer in self.decoder.layers]
        return DecoderState(keys, mask)

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Logits ``[B, K, V]`` of the tokens that follow ``tokens [B, K]``, the last ones of K
        hypotheses of each sentence; the state moves on.
        """
        return self.decoder.step(tokens, state)

    def width_masks(self, kept: Kept) -> dict[str, Mask]:
        """Masks of a narrower network: fewer hidden neurons and fewer query and key dimensions.

        The widths are the feed-forward layers', such as ``encoder.layers.0.fc1``, and those of a
        head's dimensions, such as ``decoder.layers.0.encoder_attn``, of which every head keeps the
        same.
        """
        return width_masks(self, kept)


@dataclass(frozen=True)
class Config(ModelConfig):
    """An encoder-decoder Transformer."""

    name = "transformer"
    task = "translation"

    d_model: int = 512
    """Width of embeddings and layers."""
    heads: int = 4
    """Attention heads."""
    ffn: int = 1024
    """Hidden neurons of the feed-forward layers."""
    encoder_layers: int = 6
    """Layers of the encoder."""
    decoder_layers: int = 6
    """Layers of the decoder."""
    norm: Literal["post", "pre"] = "post"
    """Layer norm after each residual sum, or before each layer."""
    dropout: float = 0.3
    """Share of embeddings and of each layer's outputs that are dropped."""
    attention_dropout: float = 0.0
    """Share of attention weights that are dropped."""
    activation_dropout: float = 0.0
    """Share of the feed-forward layers' hidden neurons that are dropped."""
    tie_output: bool = True
    """The output layer is the decoder's embedding."""
    share_embeddings: bool = False
    """Encoder and decoder have one embedding; needs one vocabulary."""

    def build(self, *, source_vocab: int, target_vocab: int) -> Transformer:
        return Transformer(source_vocab, target_vocab, **asdict(self))

"""Encoder-decoder Transformer (Vaswani et al. 2017) whose widths or ranks can be a sub-network's.

Semantics and parameter names are fairseq's (``encoder.layers.0.self_attn.q_proj`` ...).

# B sentences, S source tokens, T target tokens, D model width, H heads, d dimensions of a head
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain.data.vocabulary import PAD
from maskedtrain.layers import LFCLinear, MaskedLinear
from maskedtrain.models.base import ModelConfig
from maskedtrain.subnetwork import Kept
from partial_kernels import Index, Mask, Prefix

__all__ = ["Config", "Transformer"]

MakeLinear = Callable[..., nn.Linear]
Norm = Literal["post", "pre"]


@dataclass(frozen=True)
class Options:
    """What the layers of a Transformer share."""

    d_model: int
    heads: int
    ffn: int
    norm: Norm
    dropout: float
    attention_dropout: float
    activation_dropout: float
    linear: MakeLinear

    def __post_init__(self) -> None:
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads = {self.heads}, got {self.d_model}"
            )
        if self.d_model % 2:
            raise ValueError(f"d_model must be even, for sines and cosines, got {self.d_model}")
        if self.norm not in ("post", "pre"):
            raise ValueError(f'norm must be "post" or "pre", got {self.norm!r}')


class Attention(nn.Module):
    """Multi-head attention with a linear layer for each of query, key, value and output.

    A sub-network may have fewer query and key dimensions, the same ones in every head: scores are
    sums over those that are there, scaled by the whole head's ``1 / sqrt(d)``.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        width = options.d_model
        self.heads = options.heads
        self.head_dim = width // options.heads
        self.scale = self.head_dim**-0.5
        self.dropout = options.attention_dropout
        # As fairseq: query, key and value are drawn as parts of one larger layer.
        self.q_proj = _initialised(options.linear(width, width), 2**-0.5)
        self.k_proj = _initialised(options.linear(width, width), 2**-0.5)
        self.v_proj = _initialised(options.linear(width, width), 2**-0.5)
        self.out_proj = _initialised(options.linear(width, width))

    def split(self, x_BTE: Tensor) -> Tensor:
        """Heads as an axis: [B, H, T, E / H]."""
        return x_BTE.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is attended to."""
        return self.split(self.k_proj(memory_BSD)), self.split(self.v_proj(memory_BSD))

    def forward(
        self,
        x_BTD: Tensor,
        keys: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        k, v = keys
        dropout = self.dropout if self.training else 0.0
        q = self.split(self.q_proj(x_BTD))
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=self.scale)
        return self.out_proj(y.transpose(1, 2).flatten(-2))


def _initialised(linear: nn.Linear, gain: float = 1.0) -> nn.Linear:
    """The layer with Xavier's uniform weights and no bias yet."""
    nn.init.xavier_uniform_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    if isinstance(linear, LFCLinear):
        linear.split_variance()
    return linear


class Layer(nn.Module):
    """What encoder and decoder layers share: residual sums with a norm after or before them, and
    the feed-forward part.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        width = options.d_model
        self.pre_norm = options.norm == "pre"
        self.dropout = nn.Dropout(options.dropout)
        self.activation_dropout = nn.Dropout(options.activation_dropout)
        self.self_attn = Attention(options)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = _initialised(options.linear(width, options.ffn))
        self.fc2 = _initialised(options.linear(options.ffn, width))
        self.final_layer_norm = nn.LayerNorm(width)

    def residual(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        """``norm(x + part(x))`` or ``x + part(norm(x))``, with dropout on the part."""
        if self.pre_norm:
            return x + self.dropout(part(norm(x)))
        return norm(x + self.dropout(part(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.residual(x, self.final_layer_norm, self._hidden)

    def _hidden(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_dropout(F.relu(self.fc1(x))))


class EncoderLayer(Layer):
    def forward(self, x_BSD: Tensor, mask: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, self.self_attn.keys(x), mask=mask)

        return self.feed_forward(self.residual(x_BSD, self.self_attn_layer_norm, attend))


class DecoderLayer(Layer):
    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.encoder_attn = Attention(options)
        self.encoder_attn_layer_norm = nn.LayerNorm(options.d_model)

    def forward(
        self, x_BTD: Tensor, memory_keys: tuple[Tensor, Tensor], memory_mask: Tensor
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            # Targets are padded on the right: no token sees padding that causality does not hide.
            return self.self_attn(x, self.self_attn.keys(x), causal=True)

        x = self.residual(x_BTD, self.self_attn_layer_norm, attend)
        return self._rest(x, memory_keys, memory_mask)

    def step(self, x_BKD: Tensor, state: DecoderState, layer: int) -> Tensor:
        """The next token of each of K hypotheses of B sentences."""

        def attend(x_BKD: Tensor) -> Tensor:
            x = x_BKD.flatten(0, 1)[:, None]
            y = self.self_attn(x, state.extended(layer, self.self_attn.keys(x)))
            return y.view_as(x_BKD)

        x = self.residual(x_BKD, self.self_attn_layer_norm, attend)
        # The hypotheses of a sentence are queries to the same keys.
        return self._rest(x, state.memory_keys[layer], state.memory_mask)

    def _rest(self, x: Tensor, memory_keys: tuple[Tensor, Tensor], memory_mask: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.encoder_attn(x, memory_keys, mask=memory_mask)

        return self.feed_forward(self.residual(x, self.encoder_attn_layer_norm, attend))


class DecoderState:
    """Keys and values of what has been read and written, for B sentences of K hypotheses each."""

    def __init__(self, memory_keys: list[tuple[Tensor, Tensor]], memory_mask: Tensor) -> None:
        self.memory_keys = memory_keys
        self.memory_mask = memory_mask
        self.length = 0
        self._own: list[tuple[Tensor, Tensor] | None] = [None] * len(memory_keys)
        self._order: Tensor | None = None

    def extended(self, layer: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A layer's own keys and values with those of the next token, which are kept."""
        own = self._own[layer]
        if own is not None:
            # Reordered where they are copied anyway.
            k, v = own if self._order is None else (t[self._order] for t in own)
            new = torch.cat([k, new[0]], 2), torch.cat([v, new[1]], 2)
        self._own[layer] = new
        return new

    def advanced(self) -> None:
        """All layers have been extended."""
        self.length += 1
        self._order = None

    def select(self, sentences: Tensor | None, order: Tensor) -> None:
        """Go on with these sentences (None: all), and with these hypotheses of all B * K."""
        self._order = order
        if sentences is not None:
            self.memory_keys = [(k[sentences], v[sentences]) for k, v in self.memory_keys]
            self.memory_mask = self.memory_mask[sentences]


class Stack(nn.Module):
    """Embedding, positions and layers: what encoder and decoder share."""

    def __init__(self, vocab: int, layers: list[Layer], options: Options) -> None:
        super().__init__()
        width = options.d_model
        self.embed_tokens = nn.Embedding(vocab, width, PAD)
        nn.init.normal_(self.embed_tokens.weight, 0, width**-0.5)
        with torch.no_grad():
            self.embed_tokens.weight[PAD] = 0
        self.scale = math.sqrt(width)
        self.dropout = nn.Dropout(options.dropout)
        self.layers: Any = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(width) if options.norm == "pre" else nn.Identity()

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Embeddings, scaled, plus the positions from ``start`` on."""
        x = self.scale * self.embed_tokens(tokens)
        positions = sinusoids(start, tokens.shape[1], x.shape[-1], tokens.device)
        return self.dropout(x + positions.to(x.dtype))


def sinusoids(start: int, count: int, width: int, device: torch.device) -> Tensor:
    """Positions ``start`` ... as sines, then cosines, ``[count, width]``; fairseq's layout, which
    counts from 1 beyond the padding's index.
    """
    half = width // 2
    # Wavelengths from 2 pi to 10000 * 2 pi; a single one is the first.
    exponents = torch.arange(half, device=device) / max(1, half - 1)
    positions = torch.arange(count, device=device) + (PAD + 1 + start)
    angles = positions[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], 1)


class Encoder(Stack):
    def forward(self, source_BS: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(source_BS)
        for layer in self.layers:
            x = layer(x, mask)
        return self.layer_norm(x)


class Decoder(Stack):
    def __init__(
        self, vocab: int, layers: list[Layer], options: Options, *, tie_output: bool
    ) -> None:
        super().__init__(vocab, layers, options)
        self.output_projection = nn.Linear(options.d_model, vocab, bias=False)
        if tie_output:
            self.output_projection.weight = self.embed_tokens.weight
        else:
            nn.init.normal_(self.output_projection.weight, 0, options.d_model**-0.5)

    def forward(self, target_BT: Tensor, memory_BSD: Tensor, memory_mask: Tensor) -> Tensor:
        x = self.embed(target_BT)
        for layer in self.layers:
            x = layer(x, layer.encoder_attn.keys(memory_BSD), memory_mask)
        return self.output_projection(self.layer_norm(x))

    def step(self, tokens_BK: Tensor, state: DecoderState) -> Tensor:
        # K hypotheses stand at one position.
        x = self.embed(tokens_BK.flatten()[:, None], state.length).view(*tokens_BK.shape, -1)
        for i, layer in enumerate(self.layers):
            x = layer.step(x, state, i)
        state.advanced()
        return self.output_projection(self.layer_norm(x))


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
        mask = source != PAD
        # A row of padding alone attends to its first token: over nothing, a softmax is NaN.
        mask = (mask | (torch.arange(source.shape[1], device=source.device) == 0))[:, None, None]
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
        first.
        """
        masks: dict[str, Mask] = {}
        for name, module in self.named_modules():
            if isinstance(module, Layer):
                rows = kept(f"{name}.fc1", module.fc1.out_features)
                masks[f"{name}.fc1.weight"] = Prefix(rows)
                masks[f"{name}.fc2.weight"] = Prefix(None, rows)
            elif isinstance(module, Attention):
                dims = kept(name, module.head_dim)
                index = torch.arange(module.q_proj.out_features).view(module.heads, -1)[:, :dims]
                for projection in ("q_proj", "k_proj"):
                    masks[f"{name}.{projection}.weight"] = Index(index.flatten())
        return masks


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

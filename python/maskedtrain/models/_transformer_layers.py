"""Attention, layers and stacks of the Transformer; names and semantics are fairseq's.

# B sentences, S source tokens, T target tokens, K hypotheses of a sentence, D model width, H heads
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain.data.vocabulary import PAD
from maskedtrain.layers import LFCLinear
from maskedtrain.widths import Kept, region
from partial_kernels import Full, Index, Mask

__all__ = [
    "Attention",
    "Decoder",
    "DecoderLayer",
    "DecoderState",
    "Encoder",
    "EncoderLayer",
    "Layer",
    "MakeLinear",
    "Norm",
    "Options",
    "attended",
    "width_masks",
]

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
        if self.heads < 1:
            raise ValueError(f"heads must be >= 1, got {self.heads}")
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads = {self.heads}, got {self.d_model}"
            )
        if self.d_model % 2:
            raise ValueError(f"d_model must be even, for sines and cosines, got {self.d_model}")
        if self.norm not in ("post", "pre"):
            raise ValueError(f'norm must be "post" or "pre", got {self.norm!r}')
        # The other two are checked by nn.Dropout; attention has none.
        if not 0 <= self.attention_dropout <= 1:
            raise ValueError(f"attention_dropout must be in [0, 1], got {self.attention_dropout}")


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


def attended(tokens_BS: Tensor) -> Tensor:
    """Bool ``[B, S]``: which tokens are no padding."""
    # A row of padding alone attends to its first token: over nothing, a softmax is NaN.
    return (tokens_BS != PAD) | (torch.arange(tokens_BS.shape[1], device=tokens_BS.device) == 0)


def width_masks(model: nn.Module, kept: Kept) -> dict[str, Mask]:
    """Masks of a network with fewer hidden neurons and fewer query and key dimensions in every
    ``Layer`` and ``Attention`` of the model, by the names of these.
    """
    masks: dict[str, Mask] = {}
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            rows = kept(f"{name}.fc1", module.fc1.out_features)
            masks[f"{name}.fc1.weight"] = region(rows)
            masks[f"{name}.fc2.weight"] = region(None, rows)
        elif isinstance(module, Attention):
            dims = kept(name, module.head_dim)
            index = torch.arange(module.q_proj.out_features).view(module.heads, -1)
            index = index[:, dims if isinstance(dims, Tensor) else slice(dims)]
            # An index of all rows would be copied at every call, and is no view to share.
            whole = index.shape[1] == module.head_dim
            mask = Full() if whole else Index(index.flatten())
            for projection in ("q_proj", "k_proj"):
                masks[f"{name}.{projection}.weight"] = mask
    return masks

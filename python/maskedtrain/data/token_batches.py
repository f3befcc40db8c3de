"""Batches of sentence pairs within a budget of tokens.

# B pairs, S source tokens, T target tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskedtrain.data._buckets import Shape, make_buckets
from maskedtrain.data._prefetch import prefetched
from maskedtrain.data.vocabulary import BOS, EOS, PAD

if TYPE_CHECKING:
    from maskedtrain.data.translation import TranslationSplit

__all__ = ["TokenBatches"]

TranslationBatch = tuple[tuple[Tensor, Tensor], Tensor]
IGNORED = -100


class TokenBatches:
    """Batches ``((source, decoder_input), targets)`` of pairs of about the same lengths.

    source ``[B, S]`` ends with eos, decoder_input ``[B, T]`` begins with bos, and targets ``[B,
    T]`` are the same one token on, up to eos; int64, padded on the right with 0, targets with -100.
    A batch has as many pairs as ``B * max(S, T) <= max_tokens`` allows; a pair that is longer than
    that is one by itself.

    With ``buckets`` batches have at most so many shapes, the ones of which an epoch has the fewest
    tokens: pairs are padded to their bucket's lengths, and the last batch of each bucket is filled
    up with empty pairs of which no target counts. Means over the targets that count are the same.

    :meth:`stream` is for training: endless, advances the position (`epoch`, `batch`); on CUDA a
    thread prepares batches ahead. ``for ... in batches`` is one pass, the longest pairs first; it
    leaves the position alone.

    Pairs are sorted by length, in an order of equals that ``shuffle`` draws anew each epoch along
    with the order of the batches: a function of (seed, epoch) alone, so that the position is all a
    checkpoint has to keep. In a bucket all pairs are equals. ``state_dict()`` counts the batches
    handed out.

    Raises ValueError for arguments out of range, or where there are no pairs.
    """

    epoch: int
    """Epoch of the next batch of the stream."""
    batch: int
    """Its index within the epoch, in [0, len(batches))."""

    def __init__(
        self,
        split: TranslationSplit,
        max_tokens: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        shuffle: bool = False,
        buckets: int | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if buckets is not None and buckets < 1:
            raise ValueError(f"buckets must be >= 1, got {buckets}")
        if len(split) == 0:
            raise ValueError("there is no pair of sentences to make batches of")
        self.split = split
        self.max_tokens = max_tokens
        self.seed = seed
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.buckets = buckets
        self._source, self._target = (side.lengths + 1 for side in (split.source, split.target))
        # Places in an epoch's order that each batch is of, the same in every epoch, and its shape,
        # unless that is the smallest for its pairs.
        self._spans: list[tuple[slice, Shape | None]] = []
        if buckets is None:
            self._keys = self._source, self._target, np.maximum(self._source, self._target)
            self._cut_by_length()
        else:
            bucket, shapes = make_buckets(self._source, self._target, max_tokens, buckets)
            self._keys = (bucket,)
            self._cut_by_bucket(np.bincount(bucket), shapes)
        self.epoch = self.batch = 0

    def _cut_by_length(self) -> None:
        longest, start = np.sort(self._keys[-1])[::-1], 0
        while start < len(longest):
            stop = start + max(1, self.max_tokens // int(longest[start]))
            self._spans.append((slice(start, stop), None))
            start = stop

    def _cut_by_bucket(self, counts: NDArray[np.int64], shapes: list[Shape]) -> None:
        start = 0
        # From long to short, as the order is.
        for count, shape in zip(counts[::-1], shapes[::-1], strict=True):
            stop = start + int(count)
            self._spans += [
                (slice(i, min(i + shape[0], stop)), shape) for i in range(start, stop, shape[0])
            ]
            start = stop

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._spans)

    def __iter__(self) -> Iterator[TranslationBatch]:
        for index, shape in self._batches(self.epoch):
            yield self._load(index, shape)

    def stream(self) -> Iterator[TranslationBatch]:
        """Batches without end, from the position on; each moves the position past itself."""
        ahead = self._positions(self.epoch, self.batch)
        if self.device.type == "cuda":
            # Copies on a stream of the thread's own would not be in order with their use.
            stream = torch.cuda.current_stream(self.device)
            ahead = prefetched(ahead, within=torch.cuda.stream(stream))
        for epoch, batch, loaded in ahead:
            # Before the yield: between two steps the consumer sees this batch already counted.
            self.epoch, self.batch = divmod(epoch * len(self) + batch + 1, len(self))
            yield loaded

    def _positions(self, epoch: int, batch: int) -> Iterator[tuple[int, int, TranslationBatch]]:
        while True:
            batches = self._batches(epoch)
            for i in range(batch, len(self)):
                yield epoch, i, self._load(*batches[i])
            epoch, batch = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it must be combined with to mean the same batches."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "max_tokens": self.max_tokens,
            "num_pairs": len(self.split),
            "digest": self.split.digest,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "buckets": self.buckets,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a saved position; ValueError, and no move, if it belongs to other batches.

        Streams begun before go on as they were.
        """
        own = self.state_dict()
        # What was saved before there were buckets had none.
        state = {"buckets": None, **state}
        if state.keys() != own.keys():
            raise ValueError(f"loader state must have keys {list(own)}, got {list(state)}")
        for name in own:
            if name not in ("epoch", "batch") and state[name] != own[name]:
                raise ValueError(
                    f"loader state must match these batches: {name} must be {own[name]}, "
                    f"got {state[name]}"
                )
        epoch, batch = state["epoch"], state["batch"]
        if epoch < 0 or not 0 <= batch < len(self):
            raise ValueError(
                f"position must have epoch >= 0 and batch in [0, {len(self)}), "
                f"got epoch {epoch}, batch {batch}"
            )
        self.epoch, self.batch = epoch, batch

    def _batches(self, epoch: int) -> list[tuple[NDArray[np.int64], Shape | None]]:
        """Indices of the pairs of each batch, and its shape, where that is settled."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
        count = len(self.split)
        ties = rng.permutation(count) if self.shuffle else np.arange(count)
        # By the longer side, then by each: within a batch neither side is padded much.
        order = np.lexsort((ties, *self._keys))[::-1]
        batches = [(order[span], shape) for span, shape in self._spans]
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def _load(self, index: NDArray[np.int64], shape: Shape | None) -> TranslationBatch:
        rows, lengths = np.arange(len(index)), (self._source[index], self._target[index])
        B, S, T = shape or (len(index), *(int(side.max()) for side in lengths))
        source = _filled(self.split.source.padded(index, fill=PAD, width=S), B, PAD)
        source[rows, lengths[0] - 1] = EOS
        # An empty sentence still has its end: no model sees a row of nothing.
        source[len(index) :, 0] = EOS
        targets = _filled(self.split.target.padded(index, fill=IGNORED, width=T), B, IGNORED)
        decoder_input = np.full_like(targets, BOS)
        decoder_input[:, 1:] = np.where(targets[:, :-1] == IGNORED, PAD, targets[:, :-1])
        targets[rows, lengths[1] - 1] = EOS
        placed = (self._placed(array) for array in (source, decoder_input, targets))
        source, decoder_input, targets = placed
        return (source, decoder_input), targets

    def _placed(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def _filled(rows: NDArray[np.int64], count: int, fill: int) -> NDArray[np.int64]:
    """The rows, and so many more of ``fill`` alone that there are ``count``."""
    missing = count - len(rows)
    return np.pad(rows, ((0, missing), (0, 0)), constant_values=fill) if missing else rows

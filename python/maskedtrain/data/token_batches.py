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

    :meth:`stream` is for training: endless, advances the position (`epoch`, `batch`); on CUDA a
    thread prepares batches ahead. ``for ... in batches`` is one pass, the longest pairs first; it
    leaves the position alone.

    Pairs are sorted by length, in an order of equals that ``shuffle`` draws anew each epoch along
    with the order of the batches: a function of (seed, epoch) alone, so that the position is all a
    checkpoint has to keep. ``state_dict()`` counts the batches handed out.

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
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if len(split) == 0:
            raise ValueError("there is no pair of sentences to make batches of")
        self.split = split
        self.max_tokens = max_tokens
        self.seed = seed
        self.device = torch.device(device)
        if self.device == torch.device("cuda"):
            # The thread that prepares batches has a current device of its own.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.shuffle = shuffle
        self._source, self._target = (side.lengths + 1 for side in (split.source, split.target))
        longest = np.sort(np.maximum(self._source, self._target))[::-1]
        starts = [0]
        # Lengths in descending order are the same in every epoch, and so are the batches' ends.
        while starts[-1] < len(split):
            starts.append(starts[-1] + max(1, max_tokens // int(longest[starts[-1]])))
        self._starts = starts
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[TranslationBatch]:
        for index in self._batches(self.epoch):
            yield self._load(index)

    def stream(self) -> Iterator[TranslationBatch]:
        """Batches without end, from the position on; each moves the position past itself."""
        ahead = self._positions(self.epoch, self.batch)
        if self.device.type == "cuda":
            ahead = prefetched(ahead)
        for epoch, batch, loaded in ahead:
            # Before the yield: between two steps the consumer sees this batch already counted.
            self.epoch, self.batch = divmod(epoch * len(self) + batch + 1, len(self))
            yield loaded

    def _positions(self, epoch: int, batch: int) -> Iterator[tuple[int, int, TranslationBatch]]:
        while True:
            batches = self._batches(epoch)
            for i in range(batch, len(self)):
                yield epoch, i, self._load(batches[i])
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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a saved position; ValueError, and no move, if it belongs to other batches.

        Streams begun before go on as they were.
        """
        own = self.state_dict()
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

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Indices of the pairs of each batch."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
        count = len(self.split)
        ties = rng.permutation(count) if self.shuffle else np.arange(count)
        # By the longer side, then by each: within a batch neither side is padded much.
        keys = ties, self._source, self._target, np.maximum(self._source, self._target)
        order = np.lexsort(keys)[::-1]
        batches = [order[a:b] for a, b in zip(self._starts[:-1], self._starts[1:], strict=True)]
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def _load(self, index: NDArray[np.int64]) -> TranslationBatch:
        columns = np.arange(len(index))
        S, T = int(self._source[index].max()), int(self._target[index].max())
        source = self.split.source.padded(index, fill=PAD, width=S)
        source[columns, self._source[index] - 1] = EOS
        targets = self.split.target.padded(index, fill=IGNORED, width=T)
        decoder_input = np.full_like(targets, BOS)
        decoder_input[:, 1:] = np.where(targets[:, :-1] == IGNORED, PAD, targets[:, :-1])
        targets[columns, self._target[index] - 1] = EOS
        placed = (self._placed(array) for array in (source, decoder_input, targets))
        source, decoder_input, targets = placed
        return (source, decoder_input), targets

    def _placed(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

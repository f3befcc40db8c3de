"""Parts of a network for n workers: its neurons and blocks, shuffled and dealt out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from maskedtrain.layers import MaskedModule
from maskedtrain.methods._draws import seeded
from maskedtrain.methods._neurons import neurons_of
from maskedtrain.patterns import matching_names
from maskedtrain.subnetwork import SubNetwork

__all__ = ["Dealer"]


class Dealer:
    """Deals the neurons of some widths, and some blocks, of a model out to n workers.

    In each round every width, and the blocks together, are permuted by a generator that is seeded
    by ``(seed, round)`` alone; worker w of round r gets ``permutation[(w + r) % n :: n]``, in
    order. Hands differ by one at most, and the larger ones go round. A worker's part has the rows
    of its neurons in the layers that make them (weights, biases, norms) and their columns in the
    layers that take them, its own blocks, and everything that is not dealt.

    Args:
        model: with ``width_masks(kept)`` where widths are dealt.
        workers: n.
        widths, blocks: patterns (``fnmatch``) of widths of neurons, and of modules that can be
            left out (``MaskedModule.droppable``). Where neither is given: the blocks that the
            model names as ``ist_blocks``, or all widths.
        seed: of the permutations.

    Raises:
        ValueError: workers < 2, a pattern matches nothing, or a width has fewer neurons than there
            are workers.
        TypeError: widths are dealt, and the model has no ``width_masks(kept)``.
    """

    def __init__(
        self,
        model: nn.Module,
        workers: int,
        *,
        widths: Sequence[str] = (),
        blocks: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if workers < 2:
            raise ValueError(f"workers must be >= 2, got {workers}")
        if not widths and not blocks:
            blocks = getattr(model, "ist_blocks", ())
            widths = () if blocks else ("*",)
        self.model, self.workers, self.seed = model, workers, seed
        self.widths: dict[str, int] = {}
        if widths:
            neurons = neurons_of(model)
            chosen = matching_names("widths", widths, neurons, "width of neurons")
            self.widths = {width: neurons[width].total for width in chosen}
        known = dict(_droppable(model))
        self.blocks = (
            matching_names("blocks", blocks, known, "block that can be left out") if blocks else []
        )
        for width, total in self.widths.items():
            if total < workers:
                raise ValueError(
                    f"{width} must have a neuron for each of {workers} workers, got {total}"
                )
        for block in self.blocks:
            if any(inner.startswith(f"{block}.") for inner in self.blocks):
                raise ValueError(f"blocks: {block} holds others that are dealt out, too")

    def parts(self, round: int) -> list[SubNetwork]:
        """The workers' networks in a round, called "worker0", "worker1" ..."""
        generator = seeded("cpu", self.seed, round)
        widths = {w: self._hands(n, round, generator) for w, n in self.widths.items()}
        blocks = self._hands(len(self.blocks), round, generator)
        return [
            self._part(
                f"worker{worker}",
                {width: hands[worker] for width, hands in widths.items()},
                [self.blocks[position] for position in blocks[worker]],
            )
            for worker in range(self.workers)
        ]

    def _hands(self, total: int, round: int, generator: torch.Generator) -> list[Tensor]:
        order = torch.randperm(total, generator=generator)
        firsts = ((worker + round) % self.workers for worker in range(self.workers))
        return [order[first :: self.workers].sort().values for first in firsts]

    def _part(self, name: str, kept: dict[str, Tensor], blocks: list[str]) -> SubNetwork:
        whole = (
            SubNetwork.neurons(self.model, kept, name=name)
            if kept
            else SubNetwork.full(self.model, name=name)
        )
        others = [f"{block}.*" for block in self.blocks if block not in blocks]
        return whole.without(others, name=name) if others else whole


def _droppable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with parameters that a sub-network can leave out, by name."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedModule):
            for child, block in module.droppable().items():
                if any(True for _ in block.parameters()):
                    yield f"{name}.{child}" if name else child, block

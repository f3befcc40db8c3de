"""FISH mask: fine-tune the few parameters with the largest Fisher information."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from torch import Tensor, nn

from maskedtrain.layers.sparse_tuning import (
    Place,
    can_be_tuned,
    tune_elements,
    tuned_index,
    tuned_tensor,
)
from maskedtrain.layers.topk import kept_count
from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.fisher import Kind, fisher_scores, single_examples
from maskedtrain.methods.largest import largest, only
from maskedtrain.optim.base import MaskedOptimizer
from maskedtrain.patterns import linears_of, matching_names
from maskedtrain.subnetwork import SubNetwork
from partial_kernels import Full, Mask, Packed

__all__ = ["Config", "FishMask"]


class FishMask(Method):
    """Run the whole network, train its head and the elements with the largest Fisher information.

    ``prepare(batches)`` scores every element over single examples (``fisher_scores``: empirical
    ``sum_n (d log p(y_n | x_n) / d theta)^2``, or its expectation over the classes) and keeps the
    largest of all parameters but the head, ties by order; p_t is 1 there and on the head. What is
    outside stays as it is, bit for bit, weight decay and momentum included; what is inside is
    trained as torch.optim would.

    ``packed=True`` has modules train these elements alone, in place (``SparselyTuned``): each takes
    20 bytes beside the parameters and activations with AdamW in fp32 (the element, its gradient,
    two moments, its position), and linear layers and embeddings form no gradient of their weight's
    size. A step costs F/3 each for forward and dx, and of dW its share. The parameters become other
    ones: make the optimizer after ``prepare``. Modules that cannot be tuned so
    (``can_be_tuned``) get a dense gradient and dense optimizer states, under a mask, as all do with
    ``packed=False``. Scoring takes two further copies of the parameters in either case.

    ``redraw_every`` draws the mask anew after so many steps, from further examples, at the weights
    there are then. The optimizer's state starts anew with it: moments are those of the mask's own
    steps, as in an optimizer made on it.

    Args:
        model: the network, already trained; ``[B, C]`` or ``[B, ..., C]`` logits.
        ratio: share of the trained parameters that the mask keeps, the head among them, in (0, 1].
            The paper's are 0.0002 to 0.1.
        examples: how many are scored, >= 1; the authors find 256 to 1024 enough.
        kind: "empirical" or "true"; the latter takes a backward for each class.
        head: patterns (``fnmatch``) of the modules that are always trained as a whole; None is the
            output layer, the last linear layer of ``model.named_modules()``.
        redraw_every: steps from one mask to the next, >= 1; None keeps the first.
        packed: whether gradients and optimizer states hold what is trained alone.

    Raises:
        ValueError: an option is out of range, a pattern matches no trained parameter, or the head
            has more parameters than the mask may keep.

    Source: Sung et al., "Training Neural Networks with Fixed Sparse Masks" (arXiv 2111.09839).

    Example:
        >>> method = FishMask(model, ratio=0.005)
        >>> method.prepare(batches)
        >>> optimizer = MaskedAdamW(model.parameters(), lr=1e-3)
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float = 0.005,
        *,
        examples: int = 512,
        kind: Kind = "empirical",
        head: Sequence[str] | None = None,
        redraw_every: int | None = None,
        packed: bool = True,
    ) -> None:
        _check(ratio, examples, kind, redraw_every)
        self.full = SubNetwork.full(model)
        super().__init__([self.full])
        self.model, self.ratio, self.examples = model, ratio, examples
        self.kind: Kind = kind
        self.redraw_every = redraw_every
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._head = _head(model, head)
        others = {p: name for name, p in trained.items() if p not in self._head}
        self._others = _places(model, others)
        self._packed = {
            name
            for name, places in self._others.items()
            if packed and all(can_be_tuned(module) for module, _ in places)
        }
        total, in_head = (sum(p.numel() for p in some) for some in (trained.values(), self._head))
        self.budget = kept_count(float(ratio), total)
        if in_head > self.budget:
            raise ValueError(
                f"the head has {in_head:,} parameters, and ratio {ratio} of {total:,} keeps "
                f"{self.budget:,}: it must be >= {in_head / total:.2g}, or the head a smaller one"
            )
        self._count = self.budget - in_head
        self._draws = 0
        self._stream: Iterator[Any] = iter(())
        self._plan: Plan | None = None

    def prepare(self, batches: Iterable[tuple[Any, Tensor]]) -> None:
        self._stream = single_examples(batches)
        if self._plan is None:
            self._draw()
        elif self.redraw_every is not None:
            # What earlier masks were drawn from.
            for _ in islice(self._stream, self._draws * self.examples):
                pass
        if self.redraw_every is None:
            self._stream = iter(())

    def plan(self, step: int) -> Plan:
        if self._plan is None:
            raise RuntimeError("FishMask draws its mask from data: call prepare(batches) first")
        return self._plan

    def after_step(self, step: int, plan: Plan, optimizer: MaskedOptimizer) -> None:
        if self.redraw_every is not None and (step + 1) % self.redraw_every == 0:
            self._draw()
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})

    def _draw(self) -> None:
        """Score all but the head and train the largest from now on."""
        with self._whole() as tensors:
            scores = fisher_scores(
                self.model,
                self._stream,
                examples=self.examples,
                kind=self.kind,
                parameters=tensors,
            )
        masks = largest(list(scores.values()), self._count)
        self._draws += 1
        self._train(dict(zip(scores, masks, strict=True)))

    @contextmanager
    def _whole(self) -> Generator[Mapping[str, Tensor]]:
        """Within it all elements but the head's get gradients; by name, the tensors that do."""
        tensors = {name: tuned_tensor(places[0]) for name, places in self._others.items()}
        buffers = [tensor for tensor in tensors.values() if not isinstance(tensor, nn.Parameter)]
        for tensor in buffers:
            tensor.requires_grad_(True)
        try:
            yield tensors
        finally:
            for tensor in buffers:
                tensor.requires_grad_(False)

    def _train(self, masks: Mapping[str, Packed]) -> None:
        """Train the head and these elements from now on."""
        kept: dict[nn.Parameter, Mask | None] = dict.fromkeys(self._head, Full())
        for name, mask in masks.items():
            some, places = len(mask.index) > 0, self._others[name]
            if name in self._packed:
                kept[tune_elements(places, mask)] = Full() if some else None
            else:
                kept[cast(nn.Parameter, tuned_tensor(places[0]))] = mask if some else None
        SubNetwork.layers_changed(module for n in self._packed for module, _ in self._others[n])
        self._plan = Plan((Pass(self.full),), update=only(self.model, kept, "mask"))

    def state_dict(self) -> dict[str, Any]:
        """How often masks were drawn, and the positions of the last, by parameter."""
        positions = {} if self._plan is None else {n: self._positions(n) for n in self._others}
        return {"draws": self._draws, "positions": positions}

    def _positions(self, name: str) -> Tensor:
        place = self._others[name][0]
        if name in self._packed:
            return tuned_index(place)
        mask = self.plan(0).update.mask_of(cast(nn.Parameter, tuned_tensor(place)))
        return cast(Packed, mask or Packed([])).index

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Train the elements that were trained then; layers become what they were."""
        if set(state) != {"draws", "positions"}:
            raise ValueError(f"the state must hold draws and positions, got {sorted(state)}")
        positions: Mapping[str, Tensor] = state["positions"]
        if not state["draws"] and self._plan is None:
            return
        if set(positions) != set(self._others):
            raise ValueError(
                f"the state must hold positions in {list(self._others)}, got {sorted(positions)}"
            )
        self._train({name: Packed(positions[name].long()) for name in self._others})
        self._draws = state["draws"]


def _head(model: nn.Module, patterns: Sequence[str] | None) -> set[nn.Parameter]:
    """The trained parameters of the head."""
    if patterns is None:
        linears = list(linears_of(model))
        if not linears:
            raise ValueError("the model has no linear layer to be its head; name one")
        patterns = linears[-1:]
    if not patterns:
        return set()
    trained = {
        name: [parameter for parameter in module.parameters() if parameter.requires_grad]
        for name, module in model.named_modules(remove_duplicate=False)
        if name
    }
    names = [name for name, parameters in trained.items() if parameters]
    found = matching_names("head", patterns, names, "module with a trained parameter")
    return {parameter for name in found for parameter in trained[name]}


def _places(model: nn.Module, names: Mapping[nn.Parameter, str]) -> dict[str, list[Place]]:
    """By their names, in order, the modules that have these parameters and what these call them."""
    found: dict[str, list[Place]] = {name: [] for name in names.values()}
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in names:
                found[names[parameter]].append((module, own))
    return found


def _check(ratio: float, examples: int, kind: str, redraw_every: int | None) -> None:
    """Raise ValueError if an option is out of range."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    if examples < 1:
        raise ValueError(f"examples must be >= 1, got {examples}")
    if kind not in ("empirical", "true"):
        raise ValueError(f'kind must be "empirical" or "true", got {kind!r}')
    if redraw_every is not None and redraw_every < 1:
        raise ValueError(f"redraw_every must be >= 1 or None, got {redraw_every}")


@dataclass(frozen=True)
class Config(MethodConfig):
    """FISH mask: train the head and the parameters with the largest Fisher information alone."""

    name = "fish"

    ratio: float = 0.005
    """Share of the parameters that is trained, the head among them."""
    examples: int = 512
    """Training examples that parameters are scored on."""
    kind: Kind = "empirical"
    """Fisher information of the given labels, or its expectation over all classes."""
    head: tuple[str, ...] | None = None
    """Patterns of the modules that are always trained as a whole; the output layer, the model's
    last linear one, where not given."""
    redraw_every: int | None = None
    """Steps from one mask to the next; the first one stays where not given."""
    packed: bool = True
    """Gradients and optimizer states hold what is trained alone."""

    def __post_init__(self) -> None:
        _check(self.ratio, self.examples, self.kind, self.redraw_every)

    def build(self, model: nn.Module) -> FishMask:
        return FishMask(
            model,
            self.ratio,
            examples=self.examples,
            kind=self.kind,
            head=self.head,
            redraw_every=self.redraw_every,
            packed=self.packed,
        )

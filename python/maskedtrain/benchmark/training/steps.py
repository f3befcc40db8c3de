"""Training steps on random data, as something to time and to weigh."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskedtrain.benchmark.training.experiments import Experiment, round_of
from maskedtrain.training.loop import Trainer
from maskedtrain.training.losses import cross_entropy
from maskedtrain.training.memory import peak_bytes, reset_peak
from maskedtrain.training.optimizer import make_optimizer

__all__ = ["Memory", "Steps"]


@dataclass(frozen=True)
class Memory:
    """Bytes held from step to step (parameters, buffers, optimizer state), and the most that a step
    takes beside them (activations, gradients, what operators return).

    On CUDA the allocator counts the latter. Elsewhere it is the tensors that are alive at once: the
    memory of the process says little of a step, since what is freed is kept for the next one;
    workspace that an operator frees before it returns is left out.
    """

    held_bytes: int
    step_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All that a training needs."""
        return self.held_bytes + self.step_bytes


class Steps:
    """Calling it trains by every plan of a method once (``count`` steps: one for most methods, one
    for each network in ATS), on one batch of random data.

    Args:
        experiment: what is trained.
        method: one of the experiment's, but for ``separate``.
        device: where.
        batch_size: samples of a step; the experiment's for such a device where not given.
        autocast: dtype of the forward passes (``torch.bfloat16``), or None.
    """

    def __init__(
        self,
        experiment: Experiment,
        method: str,
        *,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.method, self.device = method, torch.device(device)
        self.batch_size = experiment.batch_size(self.device, batch_size)
        planned = experiment.method(method)
        model = next(iter(planned.subnets.values())).model
        experiment.placed(model, self.device)
        given = experiment.config.optim
        # Random targets are learned by heart; that is not to diverge.
        options = replace(given, lr=1e-4, schedule="constant", warmup_steps=0)
        optimizer, _ = make_optimizer(options, model, 1)
        loss = partial(cross_entropy, smoothing=given.label_smoothing)
        self.trainer = Trainer(model, planned, optimizer, loss, autocast=autocast)
        self.batch = experiment.batch(self.batch_size, self.device)
        self._round = sorted(round_of(planned).values())

    @property
    def count(self) -> int:
        """Steps of a call."""
        return len(self._round)

    def __call__(self) -> None:
        for step in self._round:
            self.trainer.step = step
            self.trainer.train_step(iter([self.batch]))

    def memory(self) -> Memory:
        """What a round takes, once the optimizer has its state."""
        self()
        state = self.trainer.optimizer.state.values()
        tensors = [*self.trainer.model.parameters(), *self.trainer.model.buffers()]
        tensors += [t for of_one in state for t in of_one.values() if isinstance(t, Tensor)]
        held = sum(tensor.nbytes for tensor in tensors)
        if self.device.type == "cuda":
            reset_peak(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self()
            return Memory(held, (peak_bytes(self.device) or 0) - before)
        with _Alive() as alive:
            self()
        return Memory(held, alive.peak_bytes)


class _Alive(TorchDispatchMode):
    """Within it, counts the bytes of the tensors that come into being, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._now_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views, and what is written in place, share the storage of an argument.
        known = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in known:
                known.add(id(storage))
                self._now_bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self._now_bytes)
        return result

    def _gone(self, size: int) -> None:
        self._now_bytes -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

"""What n workers hold in common: a copy for each, averaged."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskedtrain.methods.largest import only
from maskedtrain.optim.base import MaskedOptimizer
from maskedtrain.optim.regions import RegionCounts
from partial_kernels import Full

__all__ = ["Replicas"]


class Replicas:
    """Parameters of which each of n workers trains a copy of its own, and buffers that the passes
    of all of them write.

    Between steps the model's parameters hold the mean of the copies. A step is: the pass of every
    worker, in their order, within ``as_worker(worker)``, which may be repeated (accumulation);
    ``average_gradients``; clipping, if any; ``step``. Buffers hold the mean of what every pass
    makes of their values before; since running statistics are linear in these, it is the mean of
    the statistics that n workers would keep.

    Args:
        model: it holds these parameters and buffers.
        workers: n.
        parameters: trained ones.
        buffers: names of the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        workers: int,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[str],
    ) -> None:
        self.model, self.workers = model, workers
        self.parameters, self._buffer_names = list(parameters), list(buffers)
        self._subnet = only(model, dict.fromkeys(self.parameters, Full()), "shared")
        self._buffers_before: list[Tensor] = []
        self._forget_gradients()
        self.restart()

    def restart(self) -> None:
        """Every copy is the model's present value, without a state of the optimizer."""
        # None are kept as long as they are equal.
        self._values: list[dict[nn.Parameter, Tensor]] = []
        self._states: list[dict[nn.Parameter, dict[str, Any]]] = [{} for _ in range(self.workers)]

    def _forget_gradients(self) -> None:
        self._gradients: dict[nn.Parameter, list[Tensor | None]] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._largest: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers, which are other tensors when the model has been moved."""
        return [self.model.get_buffer(name) for name in self._buffer_names]

    @property
    def empty(self) -> bool:
        """Whether workers have nothing in common."""
        return not self.parameters and not self._buffer_names

    def values(self, worker: int) -> Mapping[nn.Parameter, Tensor]:
        """A worker's copies."""
        return self._values[worker] if self._values else {p: p.detach() for p in self.parameters}

    def gradients(self, worker: int) -> dict[nn.Parameter, Tensor]:
        """A worker's gradients of the present step."""
        found = {parameter: grads[worker] for parameter, grads in self._gradients.items()}
        return {parameter: grad for parameter, grad in found.items() if grad is not None}

    @contextmanager
    def as_worker(self, worker: int) -> Generator[None]:
        """Within it the parameters are the worker's copies, and gradients are noted as its own; in
        ``parameter.grad`` they add up.
        """
        outer = [parameter.grad for parameter in self.parameters]
        for parameter, grad in zip(self.parameters, outer, strict=True):
            if grad is None or grad is not self._sums.get(parameter):
                # What was noted is of another step, or of a measurement.
                self._gradients.pop(parameter, None)
            parameter.grad = None
        own, buffers = self._values[worker] if self._values else {}, self.buffers
        means = {parameter: parameter.detach().clone() for parameter in own}
        if worker == 0 or not self._buffers_before:
            self._buffers_before = [buffer.detach().clone() for buffer in buffers]
        so_far = [buffer.detach().clone() for buffer in buffers]
        with torch.no_grad():
            for parameter, value in own.items():
                parameter.copy_(value)
            for buffer, before in zip(buffers, self._buffers_before, strict=True):
                buffer.copy_(before)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, mean in means.items():
                    parameter.copy_(mean)
                for parameter, grad in zip(self.parameters, outer, strict=True):
                    self._note(worker, parameter, grad)
                for buffer, *held in zip(buffers, so_far, self._buffers_before, strict=True):
                    self._add_share(buffer, *held)

    def _note(self, worker: int, parameter: nn.Parameter, outer: Tensor | None) -> None:
        """The parameter's gradient is the worker's; then it is what it was outside, plus this."""
        own, parameter.grad = parameter.grad, outer
        if own is None:
            return
        noted = self._gradients.setdefault(parameter, [None] * self.workers)
        earlier = noted[worker]
        noted[worker] = own if earlier is None else earlier + own
        self._sums[parameter] = own.clone() if outer is None else outer + own
        parameter.grad = self._sums[parameter]

    def _add_share(self, buffer: Tensor, so_far: Tensor, before: Tensor) -> None:
        """The buffer is what one pass has made of ``before``: it becomes ``so_far`` and an nth of
        the change. A count is the same in all passes.
        """
        if buffer.is_floating_point():
            buffer.copy_(so_far + (buffer - before) / self.workers)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Put the mean of the workers' gradients in ``parameter.grad``."""
        self._largest.clear()
        for parameter in self._gradients:
            mean = cast("Tensor", parameter.grad) / self.workers
            flat = mean.flatten()
            at = flat.abs().argmax()
            # A copy: clipping works in place.
            self._largest[parameter] = at, flat[at].clone()
            parameter.grad = mean

    @torch.no_grad()
    def step(self, optimizer: MaskedOptimizer, lr_scale: float) -> None:
        """One step of every worker's copies, each with a state of the optimizer of its own; the
        parameters become the mean.

        A gradient that has been scaled since ``average_gradients`` is scaled so for every worker.

        Raises:
            RuntimeError: a gradient is gone.
        """
        if any(parameter.grad is None for parameter in self._gradients):
            raise RuntimeError(
                "workers' gradients are gone: call method.after_step(step, plan, optimizer) before "
                "optimizer.zero_grad()"
            )
        means = {parameter: parameter.grad for parameter in self._gradients}
        scales = {parameter: self._scale(parameter) for parameter in self._gradients}
        if not self._values:
            copies = ({p: p.detach().clone() for p in self.parameters} for _ in self._states)
            self._values = list(copies)
        for worker, values in enumerate(self._values):
            for parameter, grad in self.gradients(worker).items():
                parameter.grad = grad * scales[parameter]
            self._step_of(worker, values, optimizer, lr_scale)
            for parameter in means:
                parameter.grad = None
        for parameter in self.parameters:
            parameter.copy_(_mean([values[parameter] for values in self._values]))
        for parameter, mean in means.items():
            parameter.grad = mean
        self._forget_gradients()

    def _scale(self, parameter: nn.Parameter) -> Tensor:
        """By what clipping has scaled the mean gradient; exactly 1 where it has not."""
        at, before = self._largest[parameter]
        now = cast("Tensor", parameter.grad).flatten()[at]
        return torch.where(before == 0, torch.ones_like(now), now / before)

    def _step_of(
        self,
        worker: int,
        values: Mapping[nn.Parameter, Tensor],
        optimizer: MaskedOptimizer,
        lr_scale: float,
    ) -> None:
        states = self._states[worker]
        for parameter, value in values.items():
            parameter.copy_(value)
            optimizer.state[parameter] = states.pop(parameter, {})
        optimizer.step(self._subnet, lr_scale=lr_scale)
        for parameter, value in values.items():
            value.copy_(parameter)
            if state := optimizer.state.pop(parameter):
                states[parameter] = state

    def state_dict(self) -> dict[str, Any]:
        """The copies and the optimizer's states, by name and worker."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            "values": [{names[p]: v for p, v in values.items()} for values in self._values],
            "states": [
                {
                    names[p]: {
                        key: value.state() if isinstance(value, RegionCounts) else value
                        for key, value in state.items()
                    }
                    for p, state in states.items()
                }
                for states in self._states
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; ValueError, and nothing has changed, if it does not fit."""
        named = {name: p for name, p in self.model.named_parameters() if p in set(self.parameters)}
        values, states = state["values"], state["states"]
        if len(values) not in (0, self.workers) or len(states) != self.workers:
            raise ValueError(f"the state must be of {self.workers} workers, got {len(states)}")
        shapes = {name: list(parameter.shape) for name, parameter in named.items()}
        for held in values:
            found = {name: list(value.shape) for name, value in held.items()}
            if found != shapes:
                raise ValueError(f"the state must be of {shapes}, got {found}")
        self._values = [
            {named[name]: value.to(named[name].device, copy=True) for name, value in held.items()}
            for held in values
        ]
        self._states = [
            {named[name]: _decoded(entry, named[name]) for name, entry in held.items()}
            for held in states
        ]


def _decoded(entry: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    return {
        key: value.to(parameter.device, copy=True)
        if isinstance(value, Tensor)
        else RegionCounts.from_state(value, parameter.shape)
        for key, value in entry.items()
    }


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Of equal tensors it is that tensor, bit for bit."""
    first = tensors[0]
    return first + sum(other - first for other in tensors[1:]) / len(tensors)

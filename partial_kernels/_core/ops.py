"""One operation, several backends: registration with torch, choice of a backend, and its reasons.

A family's ``reference.py`` declares each ``Op`` (schema, fake, FLOPs) with its plain-PyTorch
implementation; ``native.py`` and ``kernels.py`` add backends to it. Inside the registered torch op,
on real tensors, ``choose`` picks the backend, so that a compiled graph holds one call and no
decision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import flop_counter

__all__ = [
    "FUNC",
    "Choice",
    "Explained",
    "Op",
    "asks",
    "explaining",
    "is_auto",
    "plain_call",
    "transformed",
]

# Parts of torch without complete types.
_torch: Any = torch
_library, _C, _profiler_enabled = _torch.library, _torch._C, _torch.autograd._profiler_enabled
_flop_counter: Any = flop_counter

NAMESPACE = "partial_kernels"
IMPL_VARIABLE = "PARTIAL_KERNELS_IMPL"

# Types of arguments that cannot bring a dispatch of their own.
_PLAIN = {Tensor, Parameter, torch.dtype, int, float, bool, str, type(None)}

Why = Callable[..., str | None]

FUNC = "torch.func transforms plain PyTorch alone"


def _nothing(*_: Any) -> None:
    """No objection."""


@dataclass(frozen=True)
class Backend:
    """An implementation of an op.

    ``supports(*args)`` returns why it cannot take these, ``declines(*args)`` why "auto" takes
    another although it can; or None.
    """

    name: str
    run: Callable[..., Any]
    supports: Why
    declines: Why


@dataclass(frozen=True)
class Choice:
    """The backend an op would use, and why each other one was not taken."""

    op: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend can run this'}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.reasons.items()])


class Explained(Exception):
    """Raised inside ``explaining()`` by the first op reached, instead of running it."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(str(choice))
        self.choice = choice


_explaining: ContextVar[bool] = ContextVar("explaining", default=False)


@contextmanager
def explaining() -> Generator[None]:
    """Within it, ops raise ``Explained`` with their choice of backend and compute nothing."""
    token = _explaining.set(True)
    try:
        yield
    finally:
        _explaining.reset(token)


class Op:
    """A torch operator ``partial_kernels::<name>`` with backends.

    An in-place op declares its arguments ``Tensor(a!)``; their version counters are bumped, without
    which autograd would use stale saved tensors silently.

    Args:
        schema: torch schema; the last argument must be ``str impl``.
        fake: shapes and dtypes of the result, for tracing; takes the same arguments.
        flops: FLOPs (2 per multiply-add) from the arguments' shapes, for torch's FlopCounterMode.
    """

    def __init__(
        self,
        schema: str,
        *,
        fake: Callable[..., Any],
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.backends: list[Backend] = []
        qualified = f"{NAMESPACE}::{self.name}"
        _library.define(qualified, schema[len(self.name) :])
        _library.impl(qualified, "CompositeExplicitAutograd")(self._run)
        _library.register_fake(qualified)(fake)
        packet: Any = getattr(getattr(torch.ops, NAMESPACE), self.name)
        self._call = packet.default
        self._mutated = [
            position
            for position, argument in enumerate(self._call._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if flops is not None:
            _flop_counter.register_flop_formula(packet)(flops)

    def __call__(self, *args: Any) -> Any:
        # What the dispatcher would do, at a third of its time.
        return self._run(*args) if _untraced(args) else self._call(*args)

    def backend(
        self, name: str, supports: Why = _nothing, declines: Why = _nothing
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: add a backend. ``auto`` tries the most recently added one first."""

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends.insert(0, Backend(name, run, supports, declines))
            return run

        return add

    def choose(self, *args: Any) -> tuple[Backend | None, Choice]:
        """The backend for these arguments (the last is ``impl``) and the reasons against the
        others.
        """
        *inputs, impl = args
        wanted = _wanted(impl)
        reasons: dict[str, str] = {}
        chosen: Backend | None = None
        for backend in self.backends:
            if wanted not in ("auto", backend.name):
                reasons[backend.name] = f"impl={wanted!r} was asked for"
            elif chosen is not None:
                reasons[backend.name] = f"{chosen.name} is preferred"
            elif (why := backend.supports(*inputs)) is not None or (
                wanted == "auto" and (why := backend.declines(*inputs)) is not None
            ):
                reasons[backend.name] = why
            else:
                chosen = backend
        if wanted != "auto" and wanted not in reasons and chosen is None:
            reasons[wanted] = f"{self.name} has no such backend"
        return chosen, Choice(self.name, chosen.name if chosen else None, reasons)

    def announce(self, *args: Any) -> None:
        """Say that a backward will call this op, with arguments like these; where ``asks(impl)``.

        Raises:
            RuntimeError: the backend that the last of them names cannot run it.
            Explained: within ``explaining()``.
        """
        chosen, choice = self.choose(*args)
        if _explaining.get():
            raise Explained(choice)
        if chosen is None:
            raise RuntimeError(str(choice))

    def _first(self, inputs: list[Any], wanted: str) -> Backend | None:
        """The backend that ``choose`` chooses."""
        for backend in self.backends:
            if (
                wanted in ("auto", backend.name)
                and backend.supports(*inputs) is None
                and (wanted != "auto" or backend.declines(*inputs) is None)
            ):
                return backend
        return None

    def _run(self, *args: Any) -> Any:
        *inputs, impl = args
        chosen = None if _explaining.get() else self._first(inputs, _wanted(impl))
        if chosen is None:
            _, choice = self.choose(*args)
            raise Explained(choice) if _explaining.get() else RuntimeError(str(choice))
        result = chosen.run(*inputs)
        for position in self._mutated:
            torch.autograd.graph.increment_version(args[position])
        return result


def _wanted(impl: str) -> str:
    return os.environ.get(IMPL_VARIABLE, "auto") if impl == "auto" else impl


def _untraced(args: tuple[Any, ...]) -> bool:
    """Whether nobody looks on: no autograd, compiler, mode, transform, profiler, subclass of
    Tensor.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not _C._len_torch_dispatch_stack()
        and not _profiler_enabled()
        and _C._functorch.peek_interpreter_stack() is None
        and _are_plain(args)
    )


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether these, and what is in lists of them, are numbers, names and plain tensors; of the
    first tensor, also that it has data.
    """
    kinds = set(map(type, args))
    if kinds <= _PLAIN:
        return not args[0].is_meta
    if not kinds <= {list, *_PLAIN}:
        return False
    lists: list[list[Any]] = [arg for arg in args if arg.__class__ is list]
    if not all(_PLAIN.issuperset(map(type, several)) for several in lists):
        return False
    return not (lists[0][0] if args[0] is lists[0] else args[0]).is_meta


def asks(impl: str) -> bool:
    """Whether somebody wants to know now which backend a backward will use."""
    # Dynamo does not trace context variables; nothing is explained where it traces.
    return not torch.compiler.is_compiling() and (impl != "auto" or _explaining.get())


def transformed() -> bool:
    """Whether ``torch.func`` transforms what is computed now: it takes formulas, no
    autograd.Function that saves tensors for itself.
    """
    return not torch.compiler.is_compiling() and _C._functorch.peek_interpreter_stack() is not None


def is_auto(impl: str) -> bool:
    """Whether neither the caller nor the environment names a backend."""
    return _wanted(impl) == "auto"


def plain_call(name: str, impl: str, why: str = "this is one plain PyTorch call") -> None:
    """Say that a function is about to use PyTorch alone, which has no backends.

    Raises:
        RuntimeError: ``impl`` names a backend: there is none to run.
        Explained: within ``explaining()``.
    """
    if impl not in ("auto", "torch"):
        raise RuntimeError(f"{name}: {why}, impl={impl!r} cannot run it")
    # Dynamo does not trace context variables; nothing is explained where it traces.
    if not torch.compiler.is_compiling() and _explaining.get():
        raise Explained(Choice(name, "torch", {"partial_kernels": why}))

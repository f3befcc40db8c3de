"""Linear layers of a model by patterns of their names, and errors that help to find them."""

from __future__ import annotations

import difflib
import re

from torch import nn

__all__ = ["kind_of", "linears_of", "matching"]


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer below the model, by each of its names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name and isinstance(module, nn.Linear)}


def matching(model: nn.Module, pattern: str) -> dict[tuple[str, ...], str]:
    """Names of the linear layers that match, by the texts the pattern's wildcards stand for."""
    regex = re.compile("".join(map(_regex, re.split(r"(\[.[^]]*\]|[*?])", pattern))), re.DOTALL)
    found = {match.groups(): name for name in linears_of(model) if (match := regex.fullmatch(name))}
    if not found:
        raise _unmatched(model, pattern, regex)
    return found


def _regex(piece: str) -> str:
    """A wildcard of fnmatch as a group, other text as itself."""
    if piece in ("*", "?"):
        return "(.*)" if piece == "*" else "(.)"
    if piece.startswith("[") and piece.endswith("]"):
        return f"([{'^' if piece[1] == '!' else ''}{piece[1:-1].lstrip('!')}])"
    return re.escape(piece)


def _unmatched(model: nn.Module, pattern: str, regex: re.Pattern[str]) -> ValueError:
    """An error that says what the pattern matches instead, or which linear layers are like it."""
    for name, module in model.named_modules():
        if name and regex.fullmatch(name):
            return ValueError(
                f"{pattern!r} matches no nn.Linear, but {name}, which is a {kind_of(module)}"
            )
    # Equal layers of a stack are one suggestion, and one that can be used as it is.
    names = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in linears_of(model))
    near = sorted(names, key=lambda name: _likeness(name, pattern), reverse=True)[:3]
    hint = f"near it are {', '.join(map(repr, near))}" if near else "the model has none"
    return ValueError(f"{pattern!r} matches no nn.Linear; {hint}")


def _likeness(name: str, pattern: str) -> tuple[float, float]:
    """How alike their last parts are, then the whole."""
    pairs = (name.rpartition(".")[2], pattern.rpartition(".")[2]), (name, pattern)
    last, whole = (difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)
    return last, whole


def kind_of(module: nn.Module) -> str:
    """The module's class with where it comes from: many are called Linear."""
    return f"{type(module).__module__}.{type(module).__qualname__}"

"""What a model has by patterns of its names, and errors that help to find it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["kind_of", "linears_of", "matching_linears", "matching_names", "near"]

# Up to so many names are all listed in an error; of more, the nearest is.
_FEW = 24


def matching_names(
    option: str,
    patterns: Sequence[str],
    names: Iterable[str],
    what: str,
    of: str = "the model",
) -> list[str]:
    """The names that a pattern (``fnmatch``) matches.

    Args:
        option: what the patterns are called in errors.
        patterns: at least one.
        names: to choose from.
        what: they are the names of, in errors.
        of: what has them, in errors.

    Raises:
        ValueError: there is no list of patterns, or one matches no name.
    """
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"{option} must be a list of patterns, got {patterns!r}")
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = f", which has {', '.join(names) or 'none'}" if len(names) <= _FEW else ""
            raise ValueError(
                f"{option}: {pattern!r} matches no {what} of {of}{known or near(pattern, names)}"
            )
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def near(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?``, or nothing if no known name is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer below the model, by each of its names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name and isinstance(module, nn.Linear)}


def matching_linears(model: nn.Module, pattern: str) -> dict[tuple[str, ...], str]:
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

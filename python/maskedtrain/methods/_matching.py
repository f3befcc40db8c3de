"""Names by patterns, as methods take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

__all__ = ["matching"]


def matching(option: str, patterns: Sequence[str], names: Iterable[str], what: str) -> list[str]:
    """The names that a pattern (``fnmatch``) matches.

    Args:
        option: what the patterns are called in errors.
        patterns: at least one.
        names: to choose from.
        what: they are the names of, in errors.

    Raises:
        ValueError: there is no list of patterns, or one matches no name.
    """
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"{option} must be a list of patterns, got {patterns!r}")
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names) or "none"
            raise ValueError(
                f"{option}: {pattern!r} matches no {what} of the model, which has {known}"
            )
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]

"""Comparing states: what is bitwise the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from torch import Tensor, equal


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, value


@pytest.fixture(scope="session")
def assert_identical() -> Callable[[Any, Any], None]:
    """Asserts that two nests of mappings, sequences, tensors and plain values are bitwise equal."""

    def check(first: Any, second: Any) -> None:
        left, right = dict(_leaves(first)), dict(_leaves(second))
        assert left.keys() == right.keys()
        for path, value in left.items():
            other = right[path]
            same = equal(value, other) if isinstance(value, Tensor) else value == other
            assert same, f"{path} differs"

    return check

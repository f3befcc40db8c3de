"""An iterator that is run ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

__all__ = ["prefetched"]

_Item = TypeVar("_Item")


def prefetched(
    items: Iterator[_Item], *, depth: int = 4, within: AbstractContextManager[Any] | None = None
) -> Generator[_Item, None, None]:
    """The items in their order, up to ``depth`` of them made ahead by a thread, in the context
    ``within``.

    An error of the iterator is raised where its item would have come. The thread ends with the
    items, or when this generator is closed or collected.
    """
    ahead: queue.Queue[tuple[bool, object]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: tuple[bool, object]) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                return ahead.put(item, timeout=0.1)
        return None

    def work() -> None:
        try:
            with within or nullcontext():
                for item in items:
                    put((True, item))
                    if stopped.is_set():
                        return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            more, item = ahead.get()
            if not more:
                if item is not None:
                    raise item  # pyright: ignore[reportGeneralTypeIssues]
                return
            yield item  # pyright: ignore[reportReturnType]
    finally:
        stopped.set()
        thread.join()

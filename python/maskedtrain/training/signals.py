"""Ctrl-C and termination, acted on where a run can be left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interrupted", "noted_signals"]


class Interrupted(Exception):
    """A signal ended the work; the message says where it stands and how to go on."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within it SIGINT and SIGTERM are noted instead of acted on; a further SIGINT acts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere signals are the caller's business.
        yield caught
        return

    def note(signum: int, frame: Any) -> None:
        if caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signum)
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"\nmaskedtrain: stopping after this step (Ctrl-C: at once)\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

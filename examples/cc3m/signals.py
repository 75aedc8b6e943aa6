"""Stopping on SIGINT and SIGTERM between two steps, and at once when asked twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KILLED = 143
"""128 + SIGTERM: what a shell reports of a program that did not end by itself."""


class Interrupted(Exception):
    """Training stopped on request, after saving a checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Remembers that a signal asked to stop.

    Args:
        second_exits: a second signal ends the process at once with status 143; otherwise it has
            its usual effect.
    """

    def __init__(self, *, second_exits: bool = False) -> None:
        self.signal_number: int | None = None
        self.second_exits = second_exits

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """The first SIGINT or SIGTERM sets the flag."""
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def remember(number: int, _: object) -> None:
            if self.second_exits and self.signal_number is not None:
                os._exit(KILLED)  # whatever the process waits for
            self.signal_number = number
            if not self.second_exits:
                for each, handler in before.items():
                    signal.signal(each, handler)

        for number in before:
            signal.signal(number, remember)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

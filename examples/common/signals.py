"""Signals: what asks a program to stop, and how the processes that read for it end."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)  # Windows has but the first two
)


class Interrupted(Exception):
    """Training stopped on request, after saving a checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Remembers that a signal asked to stop after the current step.

    SIGTERM, SIGUSR1 and SIGHUP may come any number of times (a cluster sends one to every process,
    and torchrun passes it on once more). A second Ctrl-C has its usual effect, except while a
    checkpoint is written.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.saving = False
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def wanted(self) -> bool:
        """Say if a signal came, or if torchrun, which started this process, is gone."""
        if self._parent is not None and os.getppid() != self._parent:
            self.signal_number = self.signal_number or signal.SIGTERM
        return self.signal_number is not None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle signals here; only the main thread can, elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def remember(number: int, _: object) -> None:
            again = number == signal.SIGINT == self.signal_number
            self.signal_number = number
            if again and not self.saving:
                raise KeyboardInterrupt

        for number in before:
            signal.signal(number, remember)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def prepare_worker(_: int) -> None:
    """Leave signals, which reach the whole process group, to the process that trains."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def end_workers() -> None:
    """Kill the processes that read; multiprocessing asks them by SIGTERM and then waits for ever.

    It runs before multiprocessing's own exit handler, because it was registered after it.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


atexit.register(end_workers)

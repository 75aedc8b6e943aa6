"""Runs a function in every process of a gloo process group, for tests.

    group = ProcessGroup(world_size=2)
    values = group.run(function, *args)   # one result a process, in rank order
    group.close()

The processes are started once and reused. `function` must be importable (defined at the top of a
module); arguments and results travel by pickle.
"""

import faulthandler
import multiprocessing as mp
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = [
    "pytest",
    "rankloss",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
]
COLLECTIVE_SECONDS = 40.0  # a collective some process never joins raises after this
TASK_SECONDS = 90.0  # a process that takes longer, whatever the reason, exits with its stacks


class ProcessGroup:
    """Processes 0 .. world_size - 1 of a gloo group; started at the first run."""

    def __init__(self, world_size: int, task_seconds: float = TASK_SECONDS) -> None:
        self.world_size, self.task_seconds = world_size, task_seconds
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) in every process -> its results by rank.

        Raises:
            RuntimeError: a process raised, with the traceback of every process that did, or
                exited. The processes are then replaced: those of a failed collective are useless.
        """
        task = pickle.dumps((function, args))
        if not self._workers:
            self._start()
        replies = []
        for _, pipe in self._workers:
            pipe.send_bytes(task)
        for rank, (_, pipe) in enumerate(self._workers):
            try:
                replies.append(pickle.loads(pipe.recv_bytes()))
            except (EOFError, ConnectionResetError):
                stacks = Path(self._folder.name, f"stacks{rank}").read_text()
                replies.append((False, f"exited before it answered\n{stacks}"))
        if all(ok for ok, _ in replies):
            return [value for _, value in replies]
        self.close()
        reports = [f"rank {r}: {text}" for r, (ok, text) in enumerate(replies) if not ok]
        raise RuntimeError(f"{getattr(function, '__name__', function)} failed\n" + "".join(reports))

    def close(self) -> None:
        """Stop the processes; a later run starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        if self._workers:
            self._folder.cleanup()
        self._workers = []

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(there, self._folder.name, rank, self.world_size, self.task_seconds),
                daemon=True,
            )
            process.start()
            there.close()
            self._workers.append((process, here))


def _serve(pipe: Connection, folder: str, rank: int, world_size: int, task_seconds: float) -> None:
    torch.set_num_threads(1)
    with Path(folder, f"stacks{rank}").open("w") as stacks:
        dist.init_process_group(
            "gloo",
            init_method=Path(folder, "rendezvous").as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
        while True:
            try:
                task = pipe.recv_bytes()
            except EOFError:
                return
            warnings.resetwarnings()
            warnings.simplefilter("error")  # as in the tests' own process
            try:
                function, args = pickle.loads(task)
                faulthandler.dump_traceback_later(task_seconds, exit=True, file=stacks)
                reply = pickle.dumps((True, function(*args)))
            except BaseException:  # pytest's own failures are not Exceptions
                reply = pickle.dumps((False, traceback.format_exc()))
            faulthandler.cancel_dump_traceback_later()
            pipe.send_bytes(reply)

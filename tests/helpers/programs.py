"""Runs a program many times without importing its modules each time, for tests.

    with Programs("examples.cc3m.train") as programs:
        process = programs.start(arguments, cwd=folder)
        code = process.wait()        # negative: the signal that killed it
        print(process.said())

One process imports the module; each run is a fork of it in a process group of its own, which calls
the module's `run_as_program()`, after executing `before`, Python code that the test gives it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import importlib, json, os, signal, sys
module = importlib.import_module(sys.argv[1])
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(json.dumps(os.waitpid(order["wait"], order["how"])), flush=True)
        continue
    child = os.fork()
    if child:
        print(json.dumps(child), flush=True)
        continue
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.update(order["environment"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [sys.argv[1], *order["arguments"]]
    exec(order["before"], {})
    module.run_as_program()
    os._exit(0)
"""


class Running:
    """A run of the program."""

    def __init__(self, programs: "Programs", pid: int, log: Path) -> None:
        self.programs, self.pid, self.log = programs, pid, log
        self.code: int | None = None

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.code is None:
            done, status = self.programs.ask({"wait": self.pid, "how": os.WNOHANG})
            if done:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 120) -> int:
        """Return the exit code.

        Raises:
            TimeoutError: it still runs; it is killed then, with all processes of its group.
        """
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"still running after {seconds} s, and said:\n{self.said()}")
            time.sleep(0.02)
        assert self.code is not None
        return self.code

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until it has said something.

        Raises:
            AssertionError: it ended, or the time did.
        """
        end = time.monotonic() + seconds
        while text not in self.said():
            assert self.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def kill(self, number: int) -> None:
        """Send a signal to every process of its group."""
        os.killpg(self.pid, number)


class Programs:
    """Starts runs of a module."""

    def __init__(self, module: str) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, module],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.runs: list[Running] = []

    def ask(self, order: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self, arguments: Sequence[str], cwd: Path, before: str = "", **environment: str
    ) -> Running:
        log = cwd / f"said_{len(self.runs)}.txt"
        log.touch()
        order = {"arguments": list(arguments), "cwd": str(cwd), "log": str(log), "before": before}
        running = Running(self, self.ask({**order, "environment": environment}), log)
        self.runs.append(running)
        return running

    def run(
        self, arguments: Sequence[str], cwd: Path, before: str = "", **environment: str
    ) -> tuple[int, str]:
        """Return the exit code and what was said."""
        process = self.start(arguments, cwd, before, **environment)
        return process.wait(), process.said()

    def start_all(
        self, world: int, arguments: Sequence[str], cwd: Path, before: str = ""
    ) -> list[Running]:
        """Start the processes of a group, as torchrun does."""
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        told = {**address, "WORLD_SIZE": str(world)}
        return [
            self.start(arguments, cwd, before, **told, RANK=str(r), LOCAL_RANK=str(r))
            for r in range(world)
        ]

    def __enter__(self) -> "Programs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for running in self.runs:
            if running.poll() is None:
                running.kill(signal.SIGKILL)
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

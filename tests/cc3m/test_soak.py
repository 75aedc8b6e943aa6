"""Two processes that are killed, signalled, and denied their disk at random, many times over.

python -m pytest -m long tests/cc3m/test_soak.py                    # a few minutes
SOAK_SECONDS=1200 python -m pytest -m long tests/cc3m/test_soak.py --timeout 3600
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.cc3m.test_train import ACT, arguments, assert_same, finish, said_by
from tests.helpers.programs import Programs, Running
from tests.helpers.shards import write_pairs

FAULTS = """
import errno, random
dice = random.Random()  # its own: the run's generators are saved with it
from examples.common import checkpoint
fault = os.environ["FAULT"]
times = {"left": 1}
def once(error, plain):
    def wrapped(*a, **k):
        if times["left"] and dice.random() < 0.3:
            times["left"] -= 1
            raise OSError(error, os.strerror(error))
        return plain(*a, **k)
    return wrapped
if fault == "full":
    checkpoint.save_file = once(errno.ENOSPC, checkpoint.save_file)
if fault == "eio" and rank == int(os.environ["VICTIM"]):
    checkpoint.safe_open = once(errno.EIO, checkpoint.safe_open)
"""
"""Code that lets the disk fail once: full at a checkpoint, or unreadable at a start."""


def launched(processes: list[Running], grace: float = 30) -> list[int]:
    """Wait as torchrun does: when one process fails the others get SIGTERM, and SIGKILL later."""
    asked: float | None = None
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0) for process in processes)
        left = [process for process in processes if process.poll() is None]
        if failed and asked is None:
            asked = time.monotonic()
            for process in left:
                process.kill(signal.SIGTERM)
        if asked is not None and time.monotonic() - asked > grace:
            for process in left:
                process.kill(signal.SIGKILL)
        time.sleep(0.05)
    return [process.wait() for process in processes]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_whatever_happens_the_weights_are_those_of_an_undisturbed_run(
    tmp_path: Path, sharding: str
) -> None:
    rng, seconds = random.Random(sharding), float(os.environ.get("SOAK_SECONDS", 60)) / 2
    write_pairs(tmp_path / "data", [8] * 8)
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    with Programs("examples.cc3m.train") as programs:
        more = ("--train.sharding", sharding, "--train.checkpoint-steps", "1")
        whole = programs.start_all(2, arguments(tmp_path, "whole", *more), tmp_path, ACT)
        assert finish(whole, 200) == [0, 0], said_by(whole)
        started, trial, codes = time.monotonic(), 0, Counter[tuple[int, ...]]()
        while not trial or time.monotonic() - started < seconds:
            trial += 1
            command = arguments(tmp_path, f"parts{trial}", *more)
            while True:
                fault, victim = rng.choice(["none", "full", "eio"]), rng.randrange(2)
                before = f'os.environ.update(FAULT="{fault}", VICTIM="{victim}")\n'
                processes = programs.start_all(2, command, tmp_path, ACT + before + FAULTS)
                time.sleep(rng.uniform(0, 8))
                if processes[victim].poll() is None:
                    processes[victim].kill(rng.choice(signals))
                ended = launched(processes)
                codes[tuple(ended)] += 1
                told = f"{ended}: {said_by(processes)}"
                assert all(code in (0, 1, 2, 75) or -code in signals for code in ended), told
                if ended == [0, 0]:
                    break
            assert_same(tmp_path / "whole", tmp_path / f"parts{trial}")
    print(f"{trial} runs, exit codes of {sum(codes.values())} starts: {dict(codes)}")

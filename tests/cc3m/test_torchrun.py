"""The script as torchrun starts it: stopped and killed through it, it goes on bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cc3m.test_train import ACT, arguments, assert_same, status
from tests.helpers.programs import ROOT
from tests.helpers.shards import write_pairs

PACE = """
import time
def slowly(self, parts):
    time.sleep(0.5)
    return acting(self, parts)
Trainer.update = slowly
train.run_as_program()
"""


def torchrun(folder: Path, out: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start two processes; return torchrun's, and the file of what all say."""
    script, said = folder / "script.py", folder / f"{out}.txt"
    script.write_text(ACT + PACE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with said.open("ab") as log:
        process = subprocess.Popen(
            [*launcher, str(script), *arguments(folder, out, "--train.checkpoint-steps", "1")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    return process, said


def wait_for(path: Path, text: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text(errors="replace")):
        assert time.monotonic() < end, f"no {text!r} in {path}"
        time.sleep(0.05)


def worker_of(process: subprocess.Popen[bytes]) -> int:
    """Return the process number of one of the two that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_stopped_and_killed_through_torchrun_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Its exit code tells no more than 0 or not; <out>/status tells preempted from failed."""
    write_pairs(tmp_path / "data", [8] * 8)
    whole, _ = torchrun(tmp_path, "whole")
    assert whole.wait(300) == 0, (tmp_path / "whole.txt").read_text()
    assert status(tmp_path / "whole") == "finished"
    out = tmp_path / "parts"
    ways = (signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGKILL, -signal.SIGKILL)
    for step, (number, code) in enumerate(ways, 2):
        process, said = torchrun(tmp_path, "parts")
        wait_for(out / "train.log", f"step {step}/8")
        usr = number == signal.SIGUSR1  # to one worker: both save and stop
        os.kill(worker_of(process) if usr else process.pid, number)
        assert process.wait(120) == code, said.read_text()
        wait_for(out / "status", "preempted", 60)  # killed alone, torchrun leaves its workers
        assert ("exitcode  : 75" in said.read_text()) == (step > 2)
    process, said = torchrun(tmp_path, "parts")
    assert process.wait(300) == 0, said.read_text()
    assert status(out) == "finished"
    assert_same(tmp_path / "whole", out)

"""The minutes that switching a codebase to rankloss takes, from an empty environment.

    python -m tests.adapters.switches               # all pages, or those named
    python -m tests.adapters.switches transformers

For each page of docs/codebases: clone the checkout, make an environment, run the README's way to
install without extras and its self-check, then the commands of the page, and last the page's
Python blocks as one file, `train.py`. Commands run as they are written, but for the sizes below:
this is about steps that fail and time that they take, not about training. What is not committed is
not tested. Each environment is deleted before the next is made: 6 GB of disk are enough.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.adapters.open_clip_runs import write_data

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--batch-size 8 --epochs 1 --workers 1 --precision fp32"  # half precision crawls on CPUs


@dataclass(frozen=True)
class Page:
    """A page of docs/codebases, and what stands in for "your data" when its commands run.

    Attributes:
        sizes: replacements in its commands, each of a text that must be there.
        write: puts the data that the commands read into a folder.
    """

    sizes: dict[str, str] = field(default_factory=dict)
    write: Callable[[Path], None] = lambda folder: None


PAGES = {
    "open_clip": Page(
        {
            "--batch-size 256": SMALL,
            "--nproc_per_node 8": "--nproc_per_node 2",
            "'shards/{000..331}.tar'": "'shard-{0..1}.tar'",
            "--train-num-samples 2900000": f"--train-num-samples 16 {SMALL}",
        },
        write_data,
    ),
    "transformers": Page(),
    "sentence_transformers": Page(),
    "pytorch": Page({"--nproc_per_node 8": "--nproc_per_node 2"}),
    "lightning_accelerate": Page(),
}


def blocks(text: str, language: str) -> list[str]:
    """Contents of the blocks of code in a Markdown text."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> Iterator[str]:
    """Command lines of a Markdown text, without their comments."""
    for block in blocks(text, "sh"):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words)


def resized(commands: list[str], sizes: dict[str, str]) -> list[str]:
    """Commands with the page's sizes replaced by small ones.

    Raises:
        ValueError: a size is not on the page any more.
    """
    text = "\n".join(commands)
    for old, new in sizes.items():
        if old not in text:
            raise ValueError(f"no command has {old!r}:\n{text}")
        text = text.replace(old, new)
    return text.splitlines()


class Stranger:
    """Somebody with a clone, an empty environment, and a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.own = folder / "rankloss", folder / "own"
        self.own.mkdir()
        environment = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run(["git", "clone", "--quiet", ROOT, self.clone], check=True)
        path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
        self.environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"PATH": path}

    def runs(self, commands: list[str], where: Path) -> "Minutes":
        """Run command lines -> how long they took.

        Raises:
            CalledProcessError: one failed; its output is on the terminal.
        """
        start = Minutes.now()
        for command in commands:
            print("   $", command, flush=True)
            run = subprocess.run(
                ["bash", "-c", command],
                cwd=where,
                env=self.environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if run.returncode:
                print(run.stdout)
                run.check_returncode()
        end = Minutes.now()
        return Minutes(end.clock - start.clock, end.cpu - start.cpu)


class Minutes(NamedTuple):
    """Minutes on the clock, and those of processors, which a busy machine does not stretch."""

    clock: float
    cpu: float

    @classmethod
    def now(cls) -> "Minutes":
        times = os.times()
        return cls(times.elapsed / 60, (times.children_user + times.children_system) / 60)

    def __str__(self) -> str:
        return f"{self.clock:.1f} ({self.cpu:.1f})"


def switch(name: str, page: Page, folder: Path) -> tuple[Minutes, Minutes]:
    """Follow the README and one page -> time of installing, time of running."""
    readme = (ROOT / "README.md").read_text().split("## Install")[1].split("\n## ")[0]
    text = (ROOT / "docs" / "codebases" / f"{name}.md").read_text()
    everything = resized(list(commands(text)), page.sizes)
    stranger = Stranger(folder)
    page.write(stranger.own)
    (stranger.own / "train.py").write_text("\n".join(blocks(text, "python")))
    installing = [x for x in everything if x.startswith("pip install")]
    running = [x for x in everything if x not in installing]
    basic = [x for x in commands(readme) if "[" not in x]
    installed = stranger.runs([*basic, *installing], stranger.clone)
    if not any("train.py" in x for x in running):
        running.append("python train.py")
    return installed, stranger.runs(running, stranger.own)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", choices=[*PAGES, []], help="default: all")
    header = ["| page | minutes to install (of CPUs) | to run (of CPUs) |", "|---|---:|---:|"]
    rows: list[str] = []
    failed = False
    for name in parser.parse_args().pages or PAGES:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                minutes = switch(name, PAGES[name], Path(folder))
            except subprocess.CalledProcessError as error:
                failed = True
                rows.append(f"| {name} | failed: `{error.cmd[-1]}` | |")
            else:
                rows.append(f"| {name} | {minutes[0]} | {minutes[1]} |")
        print(*header, *rows, sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

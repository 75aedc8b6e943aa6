"""`python -m benchmarks [command] [options]`; without a command, the CPU suite.

A command is a module of this package with `main(arguments) -> exit code`, imported only when
asked for, so that one command's optional dependencies never stop another.
"""

import importlib
import os
import sys

COMMANDS = {
    "cpu": "time and memory of every provider on this machine's CPU (the default)",
    "gpu": "correctness, speed and memory on one GPU (--dry-run: on none)",
    "aot": "registers, spills, shared memory of every kernel, compiled for GPUs not here",
    "gram": "the CPU suite on GramLoss, blocked against reference",
    "reading_speed": "images that a CPU core reads in a second, beside open_clip's transform",
    "gram_fidelity": "what projections and storage of a teacher's patches lose",
    "scaling": "memory, communication and computation of the loss for each GPU, by formula",
}


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        command, rest = arguments[0], arguments[1:]
    else:
        command, rest = "cpu", arguments
    if arguments[:1] in (["-h"], ["--help"]):
        print("commands:", *(f"  {name:15}{text}" for name, text in COMMANDS.items()), "", sep="\n")
    sleep_between_parallel_regions()
    if command == "gram":
        from benchmarks import cpu

        return cpu.main(rest, gram=True)
    module = importlib.import_module(f"benchmarks.{command}")
    code: int = module.main(rest)
    return code


def sleep_between_parallel_regions() -> None:
    """Before torch is imported: threads that wait for others sleep instead of spinning.

    On a machine that has other work, a spinning thread keeps the one it waits for from running:
    a call of half a millisecond was seen to take 150, and to burn 90 of CPU time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

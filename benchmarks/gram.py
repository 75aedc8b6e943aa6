"""Time and memory of GramLoss against its reference: the CPU suite on another case."""

from collections.abc import Sequence

from benchmarks import cpu


def main(arguments: Sequence[str]) -> int:
    return cpu.main(arguments, gram=True)

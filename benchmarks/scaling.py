"""Cost of the loss for each GPU in memory, communication and computation, for your numbers.

    python -m benchmarks.scaling                                # the table of docs/scaling.md
    python -m benchmarks.scaling --local-batch 1024 --top-k 256 --gpus 8 64

docs/scaling.md derives the formulas; tests/benchmarks/test_scaling.py holds them against measured
points.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from examples.common.reports import markdown_table

FLOAT = 4
"""Bytes of float32."""
LISTS = 4
"""Rankings of a batch: images rank texts, texts images, images images, texts texts."""


@dataclass(frozen=True)
class Loss:
    """A loss on one of several GPUs.

    Args:
        local_batch: n, pairs on each GPU.
        gpus: W, their number.
        dim: D, width of the features.
        order: R; 0 is CLIP.
        transition_dim: r, width of the transition tables.
        top_k: places of a ranking that count; None: all.
        feature_bytes: bytes of a number in the gathered features; 2 in half precision.
    """

    local_batch: int = 512
    gpus: int = 8
    dim: int = 512
    order: int = 3
    transition_dim: int = 32
    top_k: int | None = None
    feature_bytes: int = 2

    @property
    def candidates(self) -> int:
        """M, pairs of the global batch."""
        return self.local_batch * self.gpus

    @property
    def places(self) -> int:
        """K, places of a ranking that count."""
        return min(self.top_k or self.candidates, self.candidates)

    @property
    def predecessors(self) -> int:
        """Tables of predecessors of one modality, each M x r."""
        return self.order * (self.order - 1) // 2

    @property
    def tables(self) -> int:
        """Tables of predecessors and keys of one modality."""
        return self.predecessors + max(self.order - 1, 0)

    def kept_bytes(self) -> int:
        """Kept from the forward for the backward pass."""
        n, m = self.local_batch, self.candidates
        anchors = 0 if self.gpus == 1 else n  # there every candidate is an anchor
        gradients = 2 * (m + anchors) * self.dim
        features = 2 * m * self.dim if self.tables else 0  # which the heads keep
        # predecessors before their norm, and gradients of the tables
        rows = (self.predecessors + self.tables) * m + self.tables * self.dim
        return FLOAT * (gradients + features + 2 * rows * self.transition_dim)

    def received_bytes(self) -> int:
        """Bytes that each GPU receives in a step: others' features, and gradients of its own."""
        others = self.candidates - self.local_batch
        return 2 * others * self.dim * (self.feature_bytes + FLOAT)

    def scores(self) -> int:
        """Utilities whose exponential a forward pass takes in the rankings."""
        if not self.order:
            return 0
        n, m, k = self.local_batch, self.candidates, self.places
        return LISTS * n * (k * m - k * (k - 1) // 2)

    def flops(self) -> int:
        """Flops forward and backward: similarities, transition tables, transition terms."""
        n, m, d, r = self.local_batch, self.candidates, self.dim, self.transition_dim
        similarities = (LISTS if self.order else 2) * 2 * n * m * d
        tables = 2 * self.tables * 2 * m * d * r
        terms = 8 * max(self.order - 1, 0) * r * self.scores()  # 2 forward and 6 backward
        return 3 * (similarities + tables) + terms

    def seconds(self, forward: float = 3.7e12, backward: float = 2.1e12) -> float:
        """Least time at so many scores a second, by default an H200's limits at R = 3, r = 32."""
        return self.scores() / forward + self.scores() / backward


GPUS = (1, 8, 64, 256, 1024)
COLUMNS = ("GPUs", "candidates", "kept", "received", "scores", "flops", "seconds, at least")


def row(loss: Loss) -> list[str]:
    return [
        f"{loss.gpus:,}",
        f"{loss.candidates:,}",
        size(loss.kept_bytes()),
        size(loss.received_bytes()),
        f"{loss.scores():.1e}",
        f"{loss.flops():.1e}",
        f"{loss.seconds():.2g}",
    ]


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    settings = [field for field in fields(Loss) if field.name != "gpus"]
    for field in settings:
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=field.default)
    options = parser.parse_args(arguments)
    chosen = {field.name: getattr(options, field.name) for field in settings}
    print(markdown_table(COLUMNS, [row(Loss(**chosen, gpus=x)) for x in options.gpus]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

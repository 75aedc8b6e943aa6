"""What the loss costs each GPU in memory, communication and computation, for your numbers.

    python -m benchmarks.scaling                                # the table of docs/scaling.md
    python -m benchmarks.scaling --local-batch 1024 --top-k 256 --gpus 8 64

docs/scaling.md derives the formulas; tests/benchmarks/test_scaling.py holds them against measured
points.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from examples.demo.report import markdown_table

FLOAT, INDEX = 4, 8
"""Bytes of float32 and of int64."""
LISTS = 4
"""Of a batch: images rank texts, texts images, images images, texts texts."""


@dataclass(frozen=True)
class Loss:
    """A loss on one of several GPUs.

    Args:
        local_batch: n, pairs on each GPU.
        gpus: W.
        dim: D, width of the features.
        order: R; 0 is CLIP.
        transition_dim: r.
        top_k: places of a ranking that count; None: all.
        feature_bytes: of a number in the gathered features; 2 in half precision.
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
        """M, of the global batch."""
        return self.local_batch * self.gpus

    @property
    def places(self) -> int:
        """K."""
        return min(self.top_k or self.candidates, self.candidates)

    @property
    def tables(self) -> int:
        """Predecessors and keys of one modality, each M x r."""
        return self.order * (self.order - 1) // 2 + max(self.order - 1, 0)

    def kept_bytes(self) -> int:
        """Kept from the forward for the backward pass."""
        n, m, k = self.local_batch, self.candidates, self.places
        alone = self.gpus == 1  # then texts rank images by the transposed scores
        matrices = (1 if alone else 2) + 2  # cosines, and both softmaxes of the contrastive term
        ranked = 0
        if self.order:
            matrices += 2 + (3 if alone else 4)  # in-modal cosines, and all scores
            ranked = LISTS * n * k * (FLOAT + INDEX)
        features = 2 * m * self.dim * FLOAT + (0 if alone else 2 * n * self.dim * FLOAT)
        tables = 2 * self.tables * (m + self.dim) * self.transition_dim * FLOAT
        return matrices * n * m * FLOAT + ranked + features + tables

    def received_bytes(self) -> int:
        """By each GPU in a step: features going out, their float32 gradients coming back."""
        others = self.candidates - self.local_batch
        return 2 * others * self.dim * (self.feature_bytes + FLOAT)

    def scores(self) -> int:
        """Utilities whose exponential a forward pass takes in the rankings."""
        if not self.order:
            return 0
        n, m, k = self.local_batch, self.candidates, self.places
        return LISTS * n * (k * m - k * (k - 1) // 2)

    def flops(self) -> int:
        """Of forward and backward: similarities, transition tables, transition terms."""
        n, m, d, r = self.local_batch, self.candidates, self.dim, self.transition_dim
        similarities = (LISTS if self.order else 2) * 2 * n * m * d
        tables = 2 * self.tables * 2 * m * d * r
        terms = 8 * max(self.order - 1, 0) * r * self.scores()  # 2 forward and 6 backward
        return 3 * (similarities + tables) + terms

    def seconds(self, forward: float = 3.7e12, backward: float = 2.1e12) -> float:
        """At so many scores a second: METHOD.md's bounds of an H200 at order 3 and r = 32."""
        return self.scores() / forward + self.scores() / backward


@dataclass(frozen=True)
class Options:
    """Whose cost to print."""

    gpus: tuple[int, ...] = (1, 8, 64, 256, 1024)
    local_batch: int = 512
    dim: int = 512
    order: int = 3
    transition_dim: int = 32
    top_k: int | None = None
    feature_bytes: int = 2


def table(options: Options) -> str:
    """A Markdown table, one row a number of GPUs."""
    header = ["GPUs", "candidates", "kept", "received", "scores", "flops", "seconds, at least"]
    rows = []
    for gpus in options.gpus:
        loss = Loss(
            options.local_batch,
            gpus,
            options.dim,
            options.order,
            options.transition_dim,
            options.top_k,
            options.feature_bytes,
        )
        rows.append(
            [
                f"{gpus:,}",
                f"{loss.candidates:,}",
                size(loss.kept_bytes()),
                size(loss.received_bytes()),
                f"{loss.scores():.1e}",
                f"{loss.flops():.1e}",
                f"{loss.seconds():.2g}",
            ]
        )
    return markdown_table(header, rows)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def main() -> None:
    print(table(tyro.cli(Options, description=__doc__)))


if __name__ == "__main__":
    main()

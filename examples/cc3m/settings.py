"""How to train, apart from model, recipe and data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from examples.cc3m.files import UserError
from examples.cc3m.parallel import Sharding
from examples.cc3m.steps import Precision


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Args:
        epochs: over the data.
        batch_size: pairs in a step, of all processes together.
        accumulate: parts that each process makes of its share of a batch, one after the other, so
            that only one needs memory for its activations; the gradient stays the batch's.
        learning_rate: at its peak; reached after `warmup_steps`, then a cosine down to 0.
        weight_decay: of matrices; see `parameter_groups` for what it spares.
        clip_norm: largest gradient norm.
        precision: of the model; amp_bf16 and amp_fp16 are autocast's.
        sharding: of gradients alone (ddp), or of parameters and optimizer too (fsdp2).
        checkpoint_steps: steps between checkpoints.
        keep_checkpoints: how many stay.
        log_steps: steps between entries of the history.
        most_skipped: steps in a row without finite loss and gradient before training gives up.
        seed: of initialisation, order and augmentation.
    """

    epochs: int = 3
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 40
    clip_norm: float = 1.0
    precision: Precision = "fp32"
    sharding: Sharding = "ddp"
    checkpoint_steps: int = 100
    keep_checkpoints: int = 2
    log_steps: int = 1
    most_skipped: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.epochs, self.batch_size, self.accumulate, self.checkpoint_steps)
        if min(*counts, self.log_steps, self.keep_checkpoints) < 1:
            raise ValueError(f"epochs, batch_size and steps must be at least 1: {self}")

    def part_size(self, world_size: int) -> int:
        """Pairs that a process encodes at a time.

        Raises:
            UserError: the batch cannot be divided so, or two settings exclude each other.
        """
        if self.precision == "amp_fp16" and self.sharding == "fsdp2":
            raise UserError("amp_fp16 scales the loss, which fsdp2 does not support; use amp_bf16")
        parts = world_size * self.accumulate
        if self.batch_size % parts or self.batch_size < 2 * parts:
            raise UserError(
                f"a batch of {self.batch_size} cannot be divided among {world_size} processes with "
                f"{self.accumulate} parts each of at least 2 pairs; choose a multiple of {parts} "
                f"from {2 * parts} on"
            )
        return self.batch_size // parts

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a run goes on; how it is computed may change."""
        told = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {name: value for name, value in told.items() if name not in FREE}


FREE = frozenset(
    {
        "accumulate",
        "sharding",
        "checkpoint_steps",
        "keep_checkpoints",
        "log_steps",
        "most_skipped",
    }
)

"""Settings of a run: defaults, a recipe's name, and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from examples.cc3m.recipe import load_recipe, recipe_names
from examples.common.files import UserError
from examples.common.parallel import Sharding
from examples.common.ranges import check_least

Precision = Literal["fp32", "amp_bf16", "amp_fp16"]
DTYPES = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def _plain(value: Any) -> Any:
    """Return what JSON and YAML can hold."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class TrainSettings:
    """Course of training: batches, rates, precision.

    Args:
        epochs: over the data.
        batch_size: pairs in a step, of all processes together.
        accumulate: parts that each process makes of its share of a batch, one after the other, so
            that only one needs memory for its activations; the gradient stays the batch's.
        learning_rate: at its peak; reached after `warmup_steps`, then a cosine down to 0.
        weight_decay: decay of matrices; see `parameter_groups` for what it spares.
        clip_norm: largest gradient norm; inf does not clip.
        ema_decay: decay of a moving average of the weights, for example 0.9999, which is saved,
            measured and exported beside them; 0 keeps none.
        precision: that of the model; amp_bf16 and amp_fp16 are autocast's.
        most_skipped: steps in a row without finite loss and gradient before training gives up.
        roll_back: times to go back to the last checkpoint instead of giving up, and to leave out
            the batches that led there.
        sharding: ddp averages gradients; fsdp2 also shards parameters and optimizer.
        checkpoint_steps: steps between checkpoints.
        keep_checkpoints: how many stay.
        keep_epochs: also keep the checkpoint of every so many epochs for good; 0 keeps none.
        log_steps: steps between entries of the history.
        seed: decides initialisation, order and augmentation.
    """

    epochs: int = 3
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 40
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    precision: Precision = "fp32"
    most_skipped: int = 10
    roll_back: int = 0
    sharding: Sharding = "ddp"
    checkpoint_steps: int = 100
    keep_checkpoints: int = 2
    keep_epochs: int = 0
    log_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(
            self, 1, "epochs", "batch_size", "accumulate", "checkpoint_steps", "keep_checkpoints"
        )
        check_least(self, 1, "log_steps")
        check_least(self, 0, "weight_decay", "warmup_steps", "keep_epochs", "most_skipped")
        check_least(self, 0, "learning_rate", "roll_back", "seed")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, got {self.clip_norm}; inf does not clip")
        for name, decays in (("betas", self.betas), ("ema_decay", (self.ema_decay,))):
            if not all(0 <= decay < 1 for decay in decays):
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def part_size(self, world_size: int) -> int:
        """Return the number of pairs that a process encodes at a time.

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
        """Return what must stay the same when a run goes on; how it is computed may change."""
        return {name: value for name, value in _plain(asdict(self)).items() if name not in FREE}


FREE = frozenset(
    {
        "accumulate",
        "sharding",
        "checkpoint_steps",
        "keep_checkpoints",
        "keep_epochs",
        "log_steps",
        "most_skipped",
        "roll_back",
    }
)
CHANGEABLE = (
    "data",
    "samples",
    "train.epochs",
    "train.batch_size",
    "train.learning_rate",
    "train.weight_decay",
    "train.warmup_steps",
    "train.clip_norm",
    "train.precision",
)
"""Settings of which --change accepts others when a run goes on."""

CC3M = TrainSettings(
    epochs=30,
    batch_size=4096,
    learning_rate=1e-3,
    weight_decay=0.1,
    warmup_steps=2000,
    precision="amp_bf16",
    checkpoint_steps=250,
    log_steps=20,
)
"""Batch and schedule for 8 GPUs with 512 pairs each."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Measures, and when they are taken.

    Args:
        pairs: image-text shards for retrieval, modality gap, alignment and uniformity; None takes
            those in a folder "<that of the training shards>-val".
        images: for zero-shot classification: a folder with a folder of images for each class, or
            shards whose samples have a "cls" number; None takes "imagenet/val" beside the training
            shards' folder.
        classes: file with a class name a line; for an image folder the folders' names will do,
            for 1000 classes those of ImageNet.
        batch_size: images or texts that a process encodes at a time.
        every: epochs between evaluations; there is one after the last epoch in any case.
    """

    pairs: str | None = None
    images: str | None = None
    classes: Path | None = None
    batch_size: int = 256
    every: int = 1

    def __post_init__(self) -> None:
        check_least(self, 1, "batch_size", "every")


@dataclass(frozen=True)
class RunSettings:
    """All of a run.

    Args:
        recipe: what is minimised: a name in examples/recipes, or a .yaml file.
        override: changes of the recipe, for example loss.HighOrderPLLoss.order=2.
        model: open_clip's name, or tiny: 64 pixels, for two CPU cores.
        pretrained: open_clip's tag of pretrained weights, or a file of weights, to start from.
        lock_image, lock_text: leave that tower of the model as it is.
        data: image-text shards, for example 'cc3m/{00000..00331}.tar'.
        samples: their number, if there is no _stats.json beside them.
        features: folder of the teacher's features of these shards, for recipes that distil.
        out: folder of the run.
        fresh: throw away what a run with other settings wrote there.
        change: go on with other settings, of those that may change: data, samples, and train's
            epochs, batch-size, learning-rate, weight-decay, warmup-steps, clip-norm, precision.
        resample: draw shards with replacement, instead of reading each once an epoch.
        augment: crop training images at random, a teacher's features with them.
        shuffle: samples in each reader's shuffle buffer.
        workers: processes that read for each training process.
        prefetch: batches that each of them decodes ahead.
        read_timeout: seconds to wait for a batch before giving up; 0 waits for ever.
        max_broken: share of samples that may be broken.
        device: cpu, cuda, or auto.
        compile: backend of torch.compile for the model, for example inductor.
        sync_batchnorm: let batch normalisation see the parts of all processes; for GPUs.
        grad_checkpointing: compute activations of the model's blocks again instead of keeping them.
        tensorboard, wandb: where curves go, besides the run's folder.
        wandb_project: name of the project there.
        train: how to train.
        evaluation: what is measured.
    """

    recipe: str = "highorder_r3"
    override: tuple[str, ...] = ()
    model: str = "ViT-B-16"
    pretrained: str | None = None
    lock_image: bool = False
    lock_text: bool = False
    data: str = ""
    samples: int | None = None
    features: Path | None = None
    out: Path = Path("runs/cc3m")
    fresh: bool = False
    change: bool = False
    resample: bool = False
    augment: bool = True
    shuffle: int = 5000
    workers: int = 6
    prefetch: int = 2
    read_timeout: float = 0.0
    max_broken: float = 0.01
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: str | None = None
    sync_batchnorm: bool = False
    grad_checkpointing: bool = False
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "rankloss"
    train: TrainSettings = CC3M
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        check_least(self, 0, "shuffle", "workers", "read_timeout", "max_broken")
        check_least(self, 1, "prefetch")
        if self.samples is not None:
            check_least(self, 1, "samples")

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = _plain(asdict(self))
        return told

    def identity(self) -> dict[str, Any]:
        """Return what must stay the same when a run goes on; how it is computed may change."""
        names = ("model", "pretrained", "lock_image", "lock_text", "sync_batchnorm")
        names_of_data = ("data", "samples", "resample", "augment", "shuffle")
        told = self.as_json()
        return {
            "recipe": _plain(asdict(load_recipe(self.recipe, self.override))),
            **{name: told[name] for name in (*names, *names_of_data)},
            "train": self.train.identity(),
        }


def parse(arguments: Sequence[str] | None = None) -> RunSettings:
    """Read settings from the command line.

    Raises:
        UserError: a value is impossible.
        SystemExit: the command line is wrong, or asks for help.
    """
    described = f"Train CLIP-style models. Recipes: {', '.join(recipe_names())}."
    try:
        return tyro.cli(RunSettings, args=arguments, description=described)
    except ValueError as error:
        raise UserError(str(error)) from error

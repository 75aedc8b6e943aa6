"""Settings of examples/cc3m/train.py, from defaults, a recipe and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from examples.cc3m.recipe import Recipe, load_recipe, recipe_names
from examples.cc3m.settings import TrainSettings

Model = Literal["ViT-B-32", "ViT-B-16", "RN50", "tiny"]


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
    """What is measured after every epoch.

    Args:
        pairs: image-text shards for retrieval, modality gap, alignment and uniformity.
        images: for zero-shot classification: a folder with a folder of images for each class, or
            shards whose samples have a "cls" number.
        classes: file with a class name a line; for an image folder the folders' names will do.
        batch_size: images or texts encoded at a time.
    """

    pairs: str | None = None
    images: str | None = None
    classes: Path | None = None
    batch_size: int = 256


@dataclass(frozen=True)
class RunSettings:
    """All of a run.

    Args:
        recipe: what is minimised; `--recipe NAME` chooses one of examples/recipes or a file, and
            `--recipe.loss.order 2` and the like change it.
        model: open_clip's name, or tiny: 64 pixels, for two processor cores.
        data: image-text shards, for example 'cc3m/{00000..00331}.tar'.
        samples: their number, if there is no _stats.json beside them.
        features: folder of the teacher's features of these shards, for recipes that distil.
        out: folder of the run.
        fresh: throw away what a run with other settings left there.
        resample: draw shards with replacement, instead of reading each once an epoch.
        augment: crop training images at random, unless a teacher's features are used.
        shuffle: samples in each reader's shuffle buffer.
        workers: processes that read for each training process.
        max_broken: share of samples that may be broken.
        device: cpu, cuda, or auto.
        compile: backend of torch.compile for the model, for example inductor.
        grad_checkpointing: compute activations of the model's blocks again instead of keeping them.
        tensorboard, wandb: where curves go, besides the run's folder.
        train: how to train.
        evaluation: what is measured.
    """

    recipe: Recipe
    model: Model = "ViT-B-16"
    data: str = ""
    samples: int | None = None
    features: Path | None = None
    out: Path = Path("runs/cc3m")
    fresh: bool = False
    resample: bool = False
    augment: bool = True
    shuffle: int = 5000
    workers: int = 6
    max_broken: float = 0.01
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: str | None = None
    grad_checkpointing: bool = False
    tensorboard: bool = True
    wandb: bool = False
    train: TrainSettings = CC3M
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def as_json(self) -> dict[str, Any]:
        return {k: _plain(v) for k, v in asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a run goes on; how it is computed may change."""
        names = ("recipe", "model", "data", "samples", "resample", "augment", "shuffle")
        told = self.as_json()
        return {name: told[name] for name in names} | {"train": self.train.identity()}


def parse(arguments: Sequence[str] | None = None) -> RunSettings:
    """Settings from the command line; `--recipe NAME` chooses the defaults of others.

    Raises:
        UserError: there is no such recipe.
        SystemExit: the command line is wrong, or asks for help.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="highorder_r3")
    chosen, rest = first.parse_known_args(arguments)
    default = RunSettings(load_recipe(chosen.recipe))
    described = f"Train CLIP-style models. Recipes: {', '.join(recipe_names())}."
    config = (tyro.conf.AvoidSubcommands,)  # a recipe decides which loss has settings
    return tyro.cli(RunSettings, args=rest, default=default, description=described, config=config)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value

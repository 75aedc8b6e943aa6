"""CLIP, RankCLIP, the third-order loss, and it with an injected student, on generated scenes.

A few minutes on two CPU cores.

    python -m examples.demo            # writes runs/demo/{results.json,results.md,report.png}
    python -m examples.demo --fast     # seconds; shows that everything runs, learns nothing
    python -m examples.demo --seeds 3  # with the variation between seeds

Ctrl-C (or a crash) loses at most a few steps: the same command goes on where it stopped, and skips
what is finished.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Threads that wait should sleep, not spin: else another program on the same cores halves our speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image
from torch import Tensor

import rankloss
from examples.cc3m.batches import Position
from examples.cc3m.checkpoint import load_tensors, save_tensors
from examples.cc3m.features import FeatureReader
from examples.cc3m.files import UserError, claim_directory
from examples.cc3m.generators import seed_generators
from examples.cc3m.loader import ShardLoader
from examples.cc3m.models import build_clip, build_tokenizer, build_transform
from examples.cc3m.recipe import load_recipe
from examples.cc3m.shards import count_samples
from examples.cc3m.signals import Interrupted, StopRequest
from examples.cc3m.towers import build_towers
from examples.cc3m.training import Trainer
from examples.demo.figures import EXAMPLES, ModelFigures, save_figure
from examples.demo.heldout import HeldOut, encode_heldout, read_heldout
from examples.demo.report import report_text, results_json, write_report
from examples.demo.results import Outcomes, measure, metrics
from examples.demo.scene_shards import prepare_scenes, read_pictures
from examples.demo.settings import FAST, RECIPES, DemoSettings
from examples.demo.teacher import describe, extract_features
from examples.demo.timing import StepTime, time_steps


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    features: dict[str, Tensor]
    history: dict[str, list[float]]


@dataclass(frozen=True)
class Demo:
    """What every run shares."""

    settings: DemoSettings
    out: Path
    fresh: bool
    shards: dict[str, list[str]]
    heldout: HeldOut
    probe: HeldOut
    features: FeatureReader
    """Of the teacher, for the training images."""

    def loader(self, seed: int = 0, *, features: bool) -> ShardLoader:
        """Of the training data, with or without the teacher's features."""
        shards = self.shards["train"]
        return _loader(self.settings, shards, seed, self.features if features else None, train=True)

    def trainer(self, name: str, seed: int, checkpoints: Path) -> Trainer:
        """The same initialisation and the same data order for every recipe."""
        recipe, settings = load_recipe(name), self.settings
        training = replace(settings.training, seed=seed)
        seed_generators(seed)
        towers = build_towers(
            recipe,
            build_clip({**settings.model, **recipe.model_options}),
            settings.model["embed_dim"],
            student=settings.student,
            teacher_grid=self.features.grid,
        )
        steps = count_samples(self.shards["train"]) // training.batch_size
        loader = self.loader(seed, features=recipe.distillation is not None)
        return Trainer(towers, loader, training, steps, checkpoints)

    def fingerprint(self, name: str, seed: int) -> dict[str, Any]:
        """What must not change between the start of a run and its continuation."""
        recipe, settings = load_recipe(name), self.settings
        data: dict[str, Any] = {
            "scenes": asdict(settings.scenes),
            "training": asdict(replace(settings.training, seed=seed)),
            "model": settings.model,
            "recipe": asdict(recipe),
            "rankloss": rankloss.__version__,
        }
        if recipe.injection is not None:
            data |= {"student": settings.student}
        if recipe.distillation is not None:
            data |= {"teacher": self.features.manifest}
        return data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    options = _parse(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    settings = FAST if options.fast else DemoSettings()
    if options.teacher:
        teacher = replace(settings.teacher, model=options.teacher, options={}, random_weights=False)
        settings = replace(settings, teacher=teacher)
    stop = StopRequest()
    try:
        _run(settings, options, stop)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\n{str(error) or 'interrupted'}; run the same command to go on from there")
        return 128 + (stop.signal_number or 2)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of results")
    parser.add_argument("--seeds", type=int, default=1, help="training runs of each loss")
    parser.add_argument("--fast", action="store_true", help="a tiny run that learns nothing")
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        help="a DINOv3 of timm or transformers, or its folder, with "
        "its weights; without this option a small one with random weights",
    )
    parser.add_argument("--fresh", action="store_true", help="discard runs with other settings")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    return options


def _run(settings: DemoSettings, options: argparse.Namespace, stop: StopRequest) -> None:
    started = time.perf_counter()
    shards = prepare_scenes(settings.scenes, options.out / "data")
    samples = sum(count_samples(x) for x in shards.values())
    print(f"{samples} scenes in {options.out / 'data'} ({time.perf_counter() - started:.1f} s)")
    size = settings.scenes.image_size
    features = extract_features(settings.teacher, shards["train"], size, fresh=options.fresh)
    held = {
        split: read_heldout(_loader(settings, shards[split], 0, None, train=False))
        for split in ("heldout", "probe")
    }
    demo = Demo(settings, options.out, options.fresh, shards, **held, features=features)
    with stop.listening():
        runs = {
            load_recipe(name).label: [train_one(demo, name, s, stop) for s in range(options.seeds)]
            for name in RECIPES
        }
    times, parameters = measure_costs(demo)
    _report(demo, runs, times, parameters)
    print(f"{options.out}: results.json, results.md, report.png")
    print(f"{time.perf_counter() - started:.0f} s in all")


def train_one(demo: Demo, name: str, seed: int, stop: StopRequest) -> Run:
    """Train, or go on training, and encode the held-out data; what is finished is only read."""
    directory = demo.out / name / f"seed{seed}"
    claim_directory(directory, demo.fingerprint(name, seed), fresh=demo.fresh)
    finished = directory / "features.safetensors"
    label = load_recipe(name).label + (f", seed {seed}" if seed else "")
    if finished.exists():
        features, state = load_tensors(finished)
        print(f"{label}: finished before")
        return Run(features, state["history"])
    trainer = demo.trainer(name, seed, directory / "checkpoints")
    if trainer.step:
        print(f"{label}: going on after step {trainer.step} of {trainer.total_steps}")
    trainer.fit(label, stop)
    tokenize = build_tokenizer(demo.settings.model)
    features = encode_heldout(trainer.towers, demo.heldout, demo.probe, tokenize)
    save_tensors(finished, features, {"history": trainer.history})
    if stop.signal_number is not None:
        raise Interrupted(f"stopped after {label}", stop.signal_number)
    return Run(features, trainer.history)


def measure_costs(demo: Demo) -> tuple[dict[str, StepTime], dict[str, int]]:
    """Cost of a step of each recipe (fresh models take turns on one batch), and its parameters."""
    batch = next(demo.loader(features=True).epoch(Position()))
    trainers = {
        load_recipe(name).label: demo.trainer(name, 0, demo.out / "no-checkpoints")
        for name in RECIPES
    }
    for trainer in trainers.values():
        trainer.towers.train()

    def step(trainer: Trainer) -> Callable[[], dict[str, Tensor]]:
        return lambda: trainer.update([batch])

    steps = {label: step(trainer) for label, trainer in trainers.items()}
    parameters = {
        label: sum(p.numel() for p in trainer.towers.parameters())
        for label, trainer in trainers.items()
    }
    return time_steps(steps, demo.settings.timing_rounds), parameters


def _report(
    demo: Demo,
    runs: dict[str, list[Run]],
    times: dict[str, StepTime],
    parameters: dict[str, int],
) -> None:
    rows = metrics(len(demo.heldout.scenes), len(demo.probe.scenes))
    outcomes: dict[str, list[Outcomes]] = {
        label: [measure(run.features, demo.heldout.scenes, demo.probe.scenes) for run in seeds]
        for label, seeds in runs.items()
    }
    training = {label: [run.history for run in seeds] for label, seeds in runs.items()}
    settings = demo.settings.training
    minutes = sum(sum(run.history["seconds"]) for seeds in runs.values() for run in seeds) / 60
    notes = [
        f"{len(demo.heldout.scenes)} held-out scenes, {demo.settings.scenes.train} for training, "
        f"{settings.epochs} epochs of batches of {settings.batch_size}, "
        f"{torch.get_num_threads()} threads; {minutes:.1f} minutes of optimizer steps in all.",
        "Trained parameters, millions: "
        + "; ".join(f"{label} {count / 1e6:.2f}" for label, count in parameters.items())
        + ".",
        describe(demo.features.manifest),
    ]
    text = report_text(rows, outcomes, times, notes)
    recipes = {recipe.label: asdict(recipe) for recipe in map(load_recipe, RECIPES)}
    described = {**asdict(demo.settings), "recipes": recipes, "features": demo.features.manifest}
    data = results_json(rows, outcomes, times, described, training) | {"parameters": parameters}
    write_report(demo.out, text, data)
    models = [
        ModelFigures(label, seeds[0].history, outcomes[label], seeds[0].features)
        for label, seeds in runs.items()
    ]
    examples: list[tuple[Image.Image, str]] = read_pictures(demo.shards["heldout"], EXAMPLES)
    save_figure(demo.out / "report.png", models, rows, examples)
    print(f"\n{text}")


def _loader(
    settings: DemoSettings,
    shards: list[str],
    seed: int,
    features: FeatureReader | None,
    *,
    train: bool,
) -> ShardLoader:
    return ShardLoader(
        shards,
        build_transform(settings.model, train=False),  # every scene is different: no augmentation
        build_tokenizer(settings.model),
        settings.training.batch_size,
        shuffle=settings.scenes.train if train else 0,
        seed=seed,
        records=not train,
        features=features,
        keep=train,
    )


if __name__ == "__main__":
    sys.exit(main())

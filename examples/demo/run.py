"""CLIP, RankCLIP, the third-order loss, and it with an injected student, on generated scenes.

    python -m examples.demo            # writes runs/demo/{results.json,results.md,report.png}
    python -m examples.demo --fast     # seconds; shows that everything runs, learns nothing
    python -m examples.demo --seeds 3  # with the variation between seeds

A few minutes on two CPU cores. Every row is trained by `examples.cc3m.train` on the same random
crops of the same scenes in the same order, from the same initial weights, for the same number of
steps.
Ctrl-C loses nothing, a crash at most some steps: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final

# Threads that wait should sleep, not spin: else another program on the same cores halves our speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.cc3m.data.positions import Position
from examples.cc3m.loop import Trainer
from examples.cc3m.recipe import build_tokenizer, build_transform, load_recipe, model_config
from examples.cc3m.settings import RunSettings, TrainSettings
from examples.cc3m.train import Run
from examples.common.files import UserError, write_json, write_text
from examples.common.parallel import running
from examples.common.signals import Interrupted, StopRequest
from examples.demo.figures import EXAMPLES, save_figure
from examples.demo.measures import (
    Metric,
    Outcomes,
    encode_splits,
    mean_and_spread,
    measure,
    metrics,
    read_split,
)
from examples.demo.report import TrainedRow, report_text, results_json
from examples.demo.scene_shards import SceneSettings, prepare_scenes, read_pictures, shard_range
from examples.demo.teacher import TeacherSettings, describe, extract_features

RECIPES = ("clip", "rankclip", "highorder_r3", "dinorankclip")
"""Rows of the comparison: files in examples/recipes."""
MODEL: Final = "tiny"


@dataclass(frozen=True)
class DemoSettings:
    """All that determines the results, but the recipe and the seed."""

    scenes: SceneSettings = field(default_factory=lambda: SceneSettings(train=3840))
    training: TrainSettings = field(
        default_factory=lambda: TrainSettings(checkpoint_steps=40, log_steps=20)
    )
    teacher: TeacherSettings = field(default_factory=TeacherSettings)


FAST = DemoSettings(
    SceneSettings(train=48, heldout=32, probe=16, per_shard=24),
    TrainSettings(epochs=2, batch_size=16, warmup_steps=2, checkpoint_steps=2),
    TeacherSettings(dim=8),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    options = _parse(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    settings = FAST if options.fast else DemoSettings()
    settings = replace(settings, teacher=_chosen_teacher(settings.teacher, options.teacher))
    stop = StopRequest()
    try:
        Demo(settings, options.out, options.seeds, options.fresh).run(stop)
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
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder of results")
    add("--seeds", type=int, default=1, help="training runs of each row")
    add("--fast", action="store_true", help="a tiny run that learns nothing")
    add(
        "--teacher",
        metavar="NAME",
        help="a DINOv3 of timm or transformers, or its folder, with its weights; or random, for "
        "the default's network with random weights. Default: examples/self_distillation's",
    )
    add("--fresh", action="store_true", help="discard runs with other settings")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    return options


def _chosen_teacher(default: TeacherSettings, name: str | None) -> TeacherSettings:
    if name is None:
        return default
    if name == "random":
        return replace(default, weights="random")
    return replace(default, model=name, options={}, weights="published")


class Demo:
    """Writes the scenes, trains every row on them, measures and reports."""

    def __init__(self, settings: DemoSettings, out: Path, seeds: int, fresh: bool) -> None:
        self.settings, self.out, self.seeds, self.fresh = settings, out, seeds, fresh
        self.started = time.perf_counter()
        config = model_config(MODEL)
        self.tokenize = build_tokenizer(config)
        self.shards = prepare_scenes(settings.scenes, (out / "data").resolve())
        self._say(f"{sum(map(len, self.shards.values()))} shards of scenes in {out / 'data'}")
        transform = build_transform(config)
        self.heldout, self.probe = (
            read_split(self.shards[name], transform, self.tokenize) for name in ("heldout", "probe")
        )
        self.metrics = metrics(len(self.heldout.scenes))

    def run(self, stop: StopRequest) -> None:
        """Train all rows and report.

        Raises:
            Interrupted: asked to stop; the row that was being trained was saved.
            UserError: something that only the user can put right.
        """
        rows, notes = [], [self._budget()]
        for name in RECIPES:
            features = None
            if load_recipe(name).distillation is not None:
                size = self.settings.scenes.image_size
                teacher, shards = self.settings.teacher, self.shards["train"]
                features = extract_features(teacher, shards, size, fresh=self.fresh)
                notes.append(describe(features))
            rows.append(self._row(name, features, stop))
            self._say(headline(rows[-1], self.metrics))
        self._report(rows, notes)

    def _row(self, name: str, features: Path | None, stop: StopRequest) -> TrainedRow:
        trained = [self._train(name, seed, features, stop) for seed in range(self.seeds)]
        return TrainedRow(
            load_recipe(name).label,
            [self._measure(trainer) for trainer in trained],
            [seconds for trainer in trained for seconds in trainer.history["cpu_seconds"]],
            [trainer.history for trainer in trained],
            sum(p.numel() for p in trained[0].towers.parameters() if p.requires_grad),
            step_flops(trained[0]),
        )

    def _measure(self, trainer: Trainer) -> Outcomes:
        features = encode_splits(trainer.towers, self.heldout, self.probe, self.tokenize)
        return measure(features, self.heldout.scenes, self.probe.scenes)

    def _train(self, name: str, seed: int, features: Path | None, stop: StopRequest) -> Trainer:
        """Train, or go on training; a finished run is only loaded."""
        settings = RunSettings(
            name,
            model=MODEL,
            data=shard_range(self.shards["train"]),
            features=features,
            out=self.out / name / f"seed{seed}",
            fresh=self.fresh,
            shuffle=self.settings.scenes.train,
            workers=0,
            device="cpu",
            tensorboard=False,
            train=replace(self.settings.training, seed=seed),
        )
        with running("cpu") as parallel, stop.listening(), Run(settings, parallel) as run:
            return run.train(stop, measured_elsewhere=True)

    def _budget(self) -> str:
        scenes, training = self.settings.scenes, self.settings.training
        steps = training.epochs * (scenes.train // training.batch_size)
        return (
            f"Every row: {scenes.train} scenes, {training.epochs} epochs of batches of "
            f"{training.batch_size} ({steps} steps), the same random crops, initial weights and "
            f"order; {scenes.heldout} held-out scenes, {torch.get_num_threads()} threads. "
            "Rows differ in trained parameters, and in operations and CPU seconds per step."
        )

    def _report(self, rows: list[TrainedRow], notes: list[str]) -> None:
        text = report_text(self.metrics, rows, notes)
        recipes = {name: asdict(load_recipe(name)) for name in RECIPES}
        told = {**asdict(self.settings), "seeds": self.seeds, "recipes": recipes}
        write_text(self.out / "results.md", text)
        write_json(self.out / "results.json", results_json(self.metrics, rows, told))
        pictures = islice(read_pictures(self.shards["heldout"]), 0, 4 * EXAMPLES, 4)
        save_figure(self.out / "report.png", rows, self.metrics, list(pictures))
        print(f"\n{text}")
        self._say(f"{self.out}: results.json, results.md, report.png")

    def _say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:4.0f} s] {text}", flush=True)


def step_flops(trainer: Trainer) -> int:
    """Count operations of a step's matrix products and convolutions, forward and backward.

    The trainer is of no further use for training: its gradients and buffers change.
    """
    batch = next(iter(trainer.loader.epoch(Position())))
    with FlopCounterMode(display=False) as counter:
        trainer.train_step.gradients([batch.to("cpu")])
    return int(counter.get_total_flops())


def headline(row: TrainedRow, metrics: Sequence[Metric]) -> str:
    """A row's main measures, as soon as it is trained."""
    told = []
    for metric in (metric for metric in metrics if metric.compared):
        mean, _ = mean_and_spread([outcome[metric.key] for outcome in row.outcomes])
        told.append(f"{metric.label} {metric.show(mean)}")
    return f"{row.label}: {', '.join(told)}"


if __name__ == "__main__":
    sys.exit(main())

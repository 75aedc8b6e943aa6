"""CLIP, RankCLIP and the third-order loss on generated scenes, in a few minutes on two CPU cores.

    python examples/demo.py                  # writes runs/demo/{results.json,results.md,report.png}
    python examples/demo.py --fast           # seconds; shows that everything runs, learns nothing
    python examples/demo.py --seeds 3        # with the variation between seeds

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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `examples`, from any folder
# Threads that wait should sleep, not spin: else another program on the same cores halves our speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image
from torch import Tensor, nn

import rankloss
from examples.captions import class_words, prompts
from examples.checkpoint import load_tensors, save_tensors
from examples.evaluation import class_embeddings, encode
from examples.figures import EXAMPLES, ModelFigures, save_figure
from examples.files import UserError, claim_directory
from examples.loader import Position, ShardLoader
from examples.models import SMALL_CLIP, TINY_CLIP, build_clip, build_tokenizer, build_transform
from examples.report import report_text, results_json, write_report
from examples.results import Outcomes, measure, metrics
from examples.scene_shards import SceneSettings, prepare_scenes, read_pictures
from examples.scenes import ALL_PAIRS, ATTRIBUTES, Scene
from examples.shards import count_samples
from examples.timing import StepTime, time_steps
from examples.towers import Towers
from examples.training import Interrupted, StopRequest, Trainer, TrainSettings
from rankloss import ClipLoss, HighOrderPLLoss, RankCLIPLoss


@dataclass(frozen=True)
class Recipe:
    """A row of the comparison: its folder, its name, and its loss for features of a width."""

    key: str
    label: str
    loss: Callable[[int], nn.Module]


RECIPES = (
    Recipe("clip", "CLIP", lambda width: ClipLoss()),
    Recipe("rankclip", "RankCLIP", lambda width: RankCLIPLoss()),
    Recipe("order3", "third order", lambda width: HighOrderPLLoss(width, order=3)),
)


@dataclass(frozen=True)
class DemoSettings:
    """All that determines the results, but the recipe and the seed."""

    scenes: SceneSettings = field(default_factory=SceneSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    model: dict[str, Any] = field(default_factory=lambda: SMALL_CLIP)
    timing_rounds: int = 10


FAST = DemoSettings(
    SceneSettings(image_size=32, train=96, heldout=32, probe=16, per_shard=48),
    TrainSettings(epochs=2, batch_size=16, warmup_steps=2, checkpoint_steps=3),
    TINY_CLIP,
    timing_rounds=2,
)


@dataclass(frozen=True)
class HeldOut:
    """An evaluation split in memory."""

    images: Tensor
    """(N, 3, H, W)"""
    texts: Tensor
    """(N, L)"""
    scenes: list[Scene]


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

    def loader(self, split: str, seed: int = 0, *, train: bool) -> ShardLoader:
        return _loader(self.settings, self.shards[split], seed, train=train)

    def trainer(self, recipe: Recipe, seed: int, checkpoint: Path) -> Trainer:
        """The same initialisation and the same data order for every recipe."""
        training = replace(self.settings.training, seed=seed)
        torch.manual_seed(seed)
        model = build_clip(self.settings.model)
        towers = Towers(model, recipe.loss(self.settings.model["embed_dim"]))
        steps = count_samples(self.shards["train"]) // training.batch_size
        return Trainer(towers, self.loader("train", seed, train=True), training, steps, checkpoint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    options = _parse(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    settings = FAST if options.fast else DemoSettings()
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
    parser.add_argument("--fresh", action="store_true", help="discard runs with other settings")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    return options


def _run(settings: DemoSettings, options: argparse.Namespace, stop: StopRequest) -> None:
    started = time.perf_counter()
    shards = prepare_scenes(settings.scenes, options.out / "data")
    held = {split: _read(settings, shards[split]) for split in ("heldout", "probe")}
    demo = Demo(settings, options.out, options.fresh, shards, held["heldout"], held["probe"])
    samples = sum(count_samples(x) for x in shards.values())
    print(f"{samples} scenes in {options.out / 'data'} ({time.perf_counter() - started:.1f} s)")
    with stop.listening():
        runs = {
            recipe.label: [train_one(demo, recipe, seed, stop) for seed in range(options.seeds)]
            for recipe in RECIPES
        }
    times = measure_times(demo)
    _report(demo, runs, times)
    print(f"{options.out}: results.json, results.md, report.png")
    print(f"{time.perf_counter() - started:.0f} s in all")


def train_one(demo: Demo, recipe: Recipe, seed: int, stop: StopRequest) -> Run:
    """Train, or go on training, and encode the held-out data; what is finished is only read."""
    directory = demo.out / recipe.key / f"seed{seed}"
    claim_directory(directory, _fingerprint(demo.settings, recipe, seed), fresh=demo.fresh)
    finished = directory / "features.safetensors"
    label = f"{recipe.label}, seed {seed}" if seed else recipe.label
    if finished.exists():
        features, state = load_tensors(finished)
        print(f"{label}: finished before")
        return Run(features, state["history"])
    trainer = demo.trainer(recipe, seed, directory / "checkpoint.safetensors")
    if trainer.step:
        print(f"{label}: going on after step {trainer.step} of {trainer.total_steps}")
    trainer.fit(label, stop)
    features = encode_heldout(trainer.towers.model, demo)
    save_tensors(finished, features, {"history": trainer.history})
    if stop.signal_number is not None:
        raise Interrupted(f"stopped after {label}", stop.signal_number)
    return Run(features, trainer.history)


def encode_heldout(model: nn.Module, demo: Demo) -> dict[str, Tensor]:
    """What `results.measure` needs: features of both splits and zero-shot classifiers."""
    images, texts = encode(model, demo.heldout.images, demo.heldout.texts)
    probe, _ = encode(model, demo.probe.images, demo.probe.texts)
    features = {"heldout_images": images, "heldout_texts": texts, "probe_images": probe}
    tokenize = build_tokenizer(demo.settings.model)
    names = {
        attribute: [class_words(attribute, value) for value in values]
        for attribute, values in ATTRIBUTES.items()
    }
    names["pair"] = [f"{colour} {shape}" for colour, shape in ALL_PAIRS]
    for attribute, words in names.items():
        classes = [prompts(each) for each in words]
        features[f"classes_{attribute}"] = class_embeddings(model, tokenize, classes)
    return features


def measure_times(demo: Demo) -> dict[str, StepTime]:
    """Cost of a step of each loss: fresh models take turns on one batch."""
    batch = next(demo.loader("train", train=True).epoch(Position()))
    trainers = {
        recipe.label: demo.trainer(recipe, 0, demo.out / "no-checkpoint") for recipe in RECIPES
    }
    for trainer in trainers.values():
        trainer.towers.train()

    def step(trainer: Trainer) -> Callable[[], dict[str, Tensor]]:
        return lambda: trainer.update(batch)

    steps = {label: step(trainer) for label, trainer in trainers.items()}
    return time_steps(steps, demo.settings.timing_rounds)


def _report(demo: Demo, runs: dict[str, list[Run]], times: dict[str, StepTime]) -> None:
    rows = metrics(len(demo.heldout.scenes), len(demo.probe.scenes))
    outcomes: dict[str, list[Outcomes]] = {
        label: [measure(run.features, demo.heldout.scenes, demo.probe.scenes) for run in seeds]
        for label, seeds in runs.items()
    }
    training = {
        label: [{name: run.history[name] for name in run.history} for run in seeds]
        for label, seeds in runs.items()
    }
    settings = demo.settings.training
    minutes = sum(sum(run.history["seconds"]) for seeds in runs.values() for run in seeds) / 60
    notes = [
        f"{len(demo.heldout.scenes)} held-out scenes, {demo.settings.scenes.train} for training, "
        f"{settings.epochs} epochs of batches of {settings.batch_size}, "
        f"{torch.get_num_threads()} threads; {minutes:.1f} minutes of optimizer steps in all."
    ]
    text = report_text(rows, outcomes, times, notes)
    data = results_json(rows, outcomes, times, asdict(demo.settings), training)
    write_report(demo.out, text, data)
    models = [
        ModelFigures(label, seeds[0].history, outcomes[label], seeds[0].features)
        for label, seeds in runs.items()
    ]
    examples: list[tuple[Image.Image, str]] = read_pictures(demo.shards["heldout"], EXAMPLES)
    save_figure(demo.out / "report.png", models, rows, examples)
    print(f"\n{text}")


def _read(settings: DemoSettings, shards: list[str]) -> HeldOut:
    """A whole split, in the files' order."""
    batches = list(_loader(settings, shards, 0, train=False).epoch())
    return HeldOut(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.texts for batch in batches]),
        [Scene.from_json(record["scene"]) for batch in batches for record in batch.records],
    )


def _loader(settings: DemoSettings, shards: list[str], seed: int, *, train: bool) -> ShardLoader:
    return ShardLoader(
        shards,
        build_transform(settings.model, train=False),  # every scene is different: no augmentation
        build_tokenizer(settings.model),
        settings.training.batch_size,
        shuffle=settings.scenes.train if train else 0,
        seed=seed,
        records=not train,
        keep=train,
    )


def _fingerprint(settings: DemoSettings, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What must not change between the start of a run and its continuation."""
    loss = recipe.loss(settings.model["embed_dim"])
    training = asdict(replace(settings.training, seed=seed))
    return {
        "scenes": asdict(settings.scenes),
        "training": training,
        "model": settings.model,
        "loss": repr(loss),
        "rankloss": rankloss.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())

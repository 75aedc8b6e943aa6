"""CLIP-style pretraining on CC3M: one script from shards to curves.

    torchrun --nproc_per_node 8 -m examples.cc3m.train --data 'cc3m/{00000..00331}.tar'
    python -m examples.cc3m.train --data 'cc3m/{00000..00331}.tar' --recipe rankclip
    python -m examples.demo.train_on_scenes           # generated scenes, two cores, a minute

The same command goes on where it was stopped, killed, or ran out of disk, also with another number
of processes. SIGTERM and Ctrl-C save within a step and exit with 0, a second one at once with 143.

    <out>/config.yaml       all settings        <out>/checkpoints/   the last ones, safetensors
    <out>/results.jsonl     measured            <out>/export/        for open_clip.create_model
    <out>/curves.png        at the end          <out>/tensorboard/
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

# Threads that wait should sleep, not spin: else another program on the same cores halves our speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which times collectives, talks

import torch
import yaml

from examples.cc3m.evaluate import Judge
from examples.cc3m.export import export
from examples.cc3m.features import FeatureReader
from examples.cc3m.files import UserError, claim_directory, write_text
from examples.cc3m.generators import seed_generators
from examples.cc3m.loader import ShardLoader
from examples.cc3m.models import (
    build_clip,
    build_tokenizer,
    build_transform,
    model_config,
    student_options,
)
from examples.cc3m.parallel import Parallel, running
from examples.cc3m.run_log import RunLog, import_wandb, save_curves
from examples.cc3m.run_settings import RunSettings, parse
from examples.cc3m.shards import count_samples, expand_shards
from examples.cc3m.signals import Interrupted, StopRequest
from examples.cc3m.towers import Towers, build_towers
from examples.cc3m.training import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    stop = StopRequest(second_exits=True)
    try:
        settings = parse(arguments)
        with running(settings.device) as parallel, stop.listening():
            Run(settings, parallel).train(stop)
    except Interrupted as error:
        print(f"\n{error}; run the same command to go on from there")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class Run:
    """One run in this process: everything is checked before the model is built.

    Raises:
        UserError: the settings cannot work; says what to change.
    """

    def __init__(self, settings: RunSettings, parallel: Parallel) -> None:
        self.parallel = parallel
        self.started = time.perf_counter()
        self.settings = settings
        self.config = model_config(settings.model)
        if settings.wandb:
            import_wandb()
        part = settings.train.part_size(parallel.world_size)
        self.features = self._features()
        self.loader = self._loader(part)
        self.steps_per_epoch = self._steps_per_epoch()
        self.tokenize = build_tokenizer(self.config)
        self.transform = build_transform(self.config, train=False)
        self.judge = Judge(settings.evaluation, self.transform, self.tokenize, parallel.device)
        self._claim()

    def _features(self) -> FeatureReader | None:
        distils = self.settings.recipe.distillation is not None
        if distils and self.settings.features is None:
            raise UserError(
                f"recipe {self.settings.recipe.label!r} distils a teacher: extract its features "
                "with examples.cc3m.extract_dinov3, then pass --features FOLDER"
            )
        if not distils or self.settings.features is None:
            return None
        size = self.config["vision_cfg"]["image_size"]
        return FeatureReader(self.settings.features, resolution=size)

    def _loader(self, part: int) -> ShardLoader:
        settings, parallel = self.settings, self.parallel
        example = "--data 'folder/{00000..00331}.tar'"
        if not settings.data:
            raise UserError(f"no image-text shards to train on; pass {example}")
        try:
            shards = expand_shards(settings.data)
        except ValueError as error:
            raise UserError(f"{error}; pass {example}") from error
        try:
            return ShardLoader(
                shards,
                # the teacher saw the centre; a random crop would show other patches
                build_transform(self.config, train=settings.augment and self.features is None),
                build_tokenizer(self.config),
                part,
                shuffle=settings.shuffle,
                seed=settings.train.seed,
                workers=settings.workers,
                rank=parallel.rank,
                world_size=parallel.world_size,
                features=self.features,
                resample=settings.resample,
                max_broken=settings.max_broken,
            )
        except ValueError as error:
            raise UserError(f"{error} (--workers), or --resample") from error

    def _steps_per_epoch(self) -> int:
        settings = self.settings
        try:
            samples = settings.samples or count_samples(self.loader.shards)
        except ValueError as error:
            raise UserError(f"{error} with --samples") from error
        if samples < settings.train.batch_size:
            raise UserError(
                f"{samples} samples are fewer than one batch of {settings.train.batch_size}; "
                "choose a smaller --train.batch-size"
            )
        return samples // settings.train.batch_size

    def _claim(self) -> None:
        """Tie the run's folder to these settings and to the teacher that made the features."""
        if self.parallel.first:
            teacher = None if self.features is None else self.features.manifest
            identity = {**self.settings.identity(), "teacher": teacher}
            claim_directory(self.settings.out, identity, fresh=self.settings.fresh)
            told = yaml.safe_dump(self.settings.as_json(), sort_keys=False)
            write_text(self.settings.out / "config.yaml", told)
        self.parallel.agree(False)  # nobody reads the folder before it is claimed

    def build(self) -> Towers:
        """The same weights in every process and for every recipe."""
        recipe, settings = self.settings.recipe, self.settings
        torch.manual_seed(settings.train.seed)
        model = build_clip({**self.config, **recipe.model_options})
        return build_towers(
            recipe,
            model,
            self.config["embed_dim"],
            student=student_options(settings.model, self.config),
            teacher_grid=None if self.features is None else self.features.grid,
        ).to(self.parallel.device)

    def train(self, stop: StopRequest) -> Trainer:
        """Train to the end; return what was trained, with its history.

        Raises:
            Interrupted: asked to stop, after saving.
            UserError: what only the user can put right.
        """
        settings, parallel = self.settings, self.parallel
        towers = self.build()
        if settings.grad_checkpointing:
            checkpoint_blocks: Any = towers.model.set_grad_checkpointing
            checkpoint_blocks(True)
        if settings.compile is not None:
            towers.model.compile(backend=settings.compile)
        seed_generators(settings.train.seed + parallel.rank)  # dropout differs
        trainer = Trainer(
            towers,
            self.loader,
            settings.train,
            self.steps_per_epoch,
            settings.out / "checkpoints",
            parallel,
        )
        log = self._log(trainer)
        if trainer.step and parallel.first:
            print(f"going on after step {trainer.step} of {trainer.total_steps}", flush=True)
        elif parallel.first:
            print(f"ready after {time.perf_counter() - self.started:.1f} s", flush=True)

        def evaluate(trainer: Trainer) -> bool:
            return self._evaluate(trainer, log, stop)

        trainer.fit(settings.recipe.label, stop, evaluate)
        self._finish(trainer, log)
        return trainer

    def _log(self, trainer: Trainer) -> RunLog | None:
        if not self.parallel.first:
            return None
        settings = self.settings
        log = RunLog(
            settings.out,
            settings.as_json(),
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            total_steps=trainer.total_steps,
            step=trainer.step,
        )
        trainer.report = lambda step, values: log.values(step, values, self.loader.faults)
        return log

    def _evaluate(self, trainer: Trainer, log: RunLog | None, stop: StopRequest) -> bool:
        """In the first process; the others wait for it."""
        state = trainer.whole_state()
        if log is None:
            return True
        measured = self.judge(self.build, state, lambda: stop.signal_number is not None)
        if measured is None:
            return False
        progress = trainer.progress
        entry = {"epoch": progress.position.epoch, "step": progress.step, **measured}
        progress.evaluations.append(entry)
        log.evaluation(progress.evaluations)
        return True

    def _finish(self, trainer: Trainer, log: RunLog | None) -> None:
        state = trainer.whole_state()
        if log is None:
            return
        out, progress = self.settings.out, trainer.progress
        weights = export(out / "export", self.config, state)
        save_curves(out / "curves.png", progress.history, progress.evaluations)
        faults = json.dumps(dict(self.loader.faults)) if self.loader.faults else "none"
        print(f"faults in the data: {faults}; {progress.history['skipped'][-1]:.0f} steps skipped")
        print(f"{weights}: open_clip.create_model('local-dir:{weights.parent}')")
        log.close()


if __name__ == "__main__":
    sys.exit(main())

"""CLIP-style pretraining on CC3M: one script from shards to curves.

    torchrun --nproc_per_node 8 -m examples.cc3m.train --data 'cc3m/{00000..00331}.tar'
    python -m examples.cc3m.train --data 'cc3m/{00000..00331}.tar' --recipe rankclip
    python -m examples.demo.train_on_scenes           # generated scenes, two cores, a minute

The same command goes on where it was stopped, killed, or ran out of disk, also with another number
of processes or workers. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save within a step. Exit codes, which
torchrun makes 0 or 1, and the word in <out>/status:

    0   finished      the run is done
    75  preempted     stopped on request, and saved: the same command goes on
    2   failed        settings, data or disk need a person, as the last line says
    1   failed        anything else

On SLURM, ask for a signal in good time and queue the job again while it is not done:

    #SBATCH --signal=TERM@120 --open-mode=append
    srun torchrun ... -m examples.cc3m.train --out runs/cc3m ...
    grep -q preempted runs/cc3m/status && scontrol requeue $SLURM_JOB_ID

    <out>/config.yaml       all settings        <out>/checkpoints/   the last ones, safetensors
    <out>/results.jsonl     measured            <out>/export/        for open_clip.create_model, and
    <out>/curves.png        at the end                               DinoRankCLIP.from_pretrained
    <out>/train.log         every line          <out>/tensorboard/
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

# Threads that wait should sleep, not spin: else another program on the same cores halves our speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which times collectives, talks

import torch
import yaml
from torch import nn
from torch.distributed.tensor import DTensor

from examples.cc3m.data.inputs import (
    find_evaluation,
    local_world_size,
    open_features,
    open_loader,
    plan_epochs,
    told_features,
    told_roofline,
    told_shared_memory,
)
from examples.cc3m.distilled import DistilledCLIP
from examples.cc3m.evaluation import Evaluator
from examples.cc3m.loop import Trainer
from examples.cc3m.model import export, load_whole, prepare
from examples.cc3m.monitor import RunLog, import_wandb, save_curves
from examples.cc3m.recipe import (
    build_tokenizer,
    build_towers,
    build_transform,
    load_recipe,
    model_config,
    student_options,
)
from examples.cc3m.settings import CHANGEABLE, RunSettings, parse
from examples.common.checkpoint import whole_state
from examples.common.files import UserError, claim_directory, locked, read_json, write_text
from examples.common.parallel import Parallel, running, seed_generators
from examples.common.signals import Interrupted, StopRequest, end_workers
from examples.evaluation.reading import Stopped
from rankloss import DinoRankCLIP

LOG = logging.getLogger(__name__)
FAILED, REFUSED, PREEMPTED = 1, 2, 75
"""Exit codes; 75 is sysexits' EX_TEMPFAIL: try again later."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    stop = StopRequest()
    try:
        settings = parse(arguments)
        with stop.listening(), running(settings.device) as parallel, Run(settings, parallel) as run:
            run.train(stop)
    except Interrupted as error:
        print(f"\n{error}; run the same command to go on from there")
        return PREEMPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


class Run(contextlib.ExitStack):
    """One run in this process: everything is checked before the model is built.

    Leave its `with` block to release the run's folder, where `status` then says how it ended.

    Raises:
        UserError: the settings cannot work; says what to change.
    """

    def __init__(self, settings: RunSettings, parallel: Parallel) -> None:
        super().__init__()
        self.parallel = parallel
        self.started = time.perf_counter()
        self.settings = settings
        self.recipe = load_recipe(settings.recipe, settings.override)
        self.config = model_config(settings.model)
        if settings.wandb:
            import_wandb()
        part = settings.train.part_size(parallel.world_size)
        self.features = open_features(settings, self.recipe, self.config)
        self.loader = open_loader(settings, self.recipe, self.config, self.features, part, parallel)
        self.planned = plan_epochs(settings, self.loader, warn=parallel.first)
        self.evaluator = Evaluator(
            find_evaluation(settings, self.loader.shards),
            build_transform(self.config),
            build_tokenizer(self.config),
            parallel,
            settings.train.precision,
            settings.workers,
        )
        self._claim()

    def _claim(self) -> None:
        """Tie the run's folder to these settings, in the first process; all must see it.

        Raises:
            UserError: another run has it, or some process does not see it.
        """
        settings, error = self.settings, None
        teacher = None if self.features is None else self.features.manifest
        identity = json.loads(json.dumps({**settings.identity(), "teacher": teacher}))
        if self.parallel.first:
            try:
                self.enter_context(locked(settings.out))
                changeable = CHANGEABLE if settings.change else ()
                claim_directory(settings.out, identity, fresh=settings.fresh, changeable=changeable)
                told = yaml.safe_dump(settings.as_json(), sort_keys=False)
                write_text(settings.out / "config.yaml", told)
                self._say("running")
                self.push(self._say_failed)
            except UserError as caught:
                self.close()
                error = caught
        self.parallel.together(error)
        marker = settings.out / "settings.json"
        if not self.parallel.first and not (marker.exists() and read_json(marker) == identity):
            error = UserError(
                f"{settings.out} is not the folder that the first process sees; choose an --out "
                "that all machines share"
            )
        self.parallel.together(error)

    def _say(self, word: str) -> None:
        write_text(self.settings.out / "status", f"{word}\n")

    def _say_failed(self, kind: type[BaseException] | None, *_: object) -> None:
        word = "finished" if kind is None else "failed"
        with contextlib.suppress(OSError):  # on a full disk
            self._say("preempted" if kind is Interrupted else word)

    def build(self, *, inference: bool = False) -> DinoRankCLIP:
        """Build the same weights in every process and for every recipe.

        Args:
            inference: leave out what only training has.
        """
        settings = self.settings
        torch.manual_seed(settings.train.seed)
        options = student_options(settings.model)
        towers = build_towers(self.recipe, self.config, options, inference=inference)
        return towers.to(self.parallel.device)

    def train(self, stop: StopRequest, *, measured_elsewhere: bool = False) -> Trainer:
        """Train to the end; return what was trained, with its history.

        Args:
            stop: asks to save and stop.
            measured_elsewhere: the caller measures the model itself, so that the log need not name
                what the settings leave out.

        Raises:
            Interrupted: asked to stop, after saving.
            UserError: what only the user can put right.
        """
        settings, parallel = self.settings, self.parallel
        towers = prepare(self.build(), settings, parallel)
        seed_generators(settings.train.seed + parallel.rank)  # dropout differs
        trainer = Trainer(
            towers,
            self.loader,
            settings.train,
            self.planned,
            settings.out / "checkpoints",
            parallel,
            teacher_grid=self.loader.grid,
            change=settings.change,
        )
        log = self._log(trainer)
        if log and not measured_elsewhere:
            for missing in self.evaluator.missing():
                log.tell(f"not measured: {missing}")

        def evaluate(trainer: Trainer) -> bool:
            return self._evaluate(trainer, log, stop)

        trainer.fit(self.recipe.label, stop, evaluate, settings.evaluation.every)
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
            wandb=settings.wandb_project if settings.wandb else None,
            total_steps=trainer.total_steps,
            step=trainer.step,
        )
        trainer.report = lambda step, values: log.values(step, values, self.loader.faults)
        if trainer.step:
            log.tell(f"going on after step {trainer.step} of {trainer.total_steps}")
        else:
            log.tell(f"ready after {time.perf_counter() - self.started:.1f} s")
        if self.features is not None and self.loader.grid is not None:
            log.tell(told_features(self.features, self.loader.grid))
        if isinstance(trainer.towers, DistilledCLIP):
            log.tell(f"also distilled: {trainer.towers.told_distillation()}")
        if self.loader.workers:
            log.tell(told_shared_memory(self.loader, local_world_size()))
        return log

    def _evaluate(self, trainer: Trainer, log: RunLog | None, stop: StopRequest) -> bool:
        """Measure, in all processes together; False if one of them was asked to stop."""
        measured: dict[str, float] = {}
        try:
            for prefix, towers in self._models(trainer):
                found = self.evaluator(towers, stop)
                measured |= {f"{prefix}{name}": value for name, value in found.items()}
        except Stopped:
            return False
        progress = trainer.progress
        entry = {"epoch": progress.position.epoch, "step": progress.step, **measured}
        progress.evaluations.append(entry)
        if log is not None and measured:
            log.evaluation(progress.evaluations)
        return True

    def _models(self, trainer: Trainer) -> Iterator[tuple[str, nn.Module]]:
        """Yield what is measured, each by its prefix: the model, and the average of its weights.

        It is the model itself, or a copy where each process has but a shard of it.
        """
        towers, step = trainer.towers, trainer.train_step
        if not any(isinstance(p, DTensor) for p in towers.parameters()) and step.average is None:
            yield "", towers
            return
        state = whole_state(towers, everywhere=True)
        average = step.averaged(state, everywhere=True)
        for prefix, each in (("", state), ("ema/", average)):
            if each:
                yield prefix, load_whole(self._built(), each)

    def _built(self) -> DinoRankCLIP:
        """Build what inference needs beside what is trained, which must not notice."""
        with torch.random.fork_rng():
            return self.build(inference=True)

    def _finish(self, trainer: Trainer, log: RunLog | None) -> None:
        state, faults = whole_state(trainer.towers), trainer.faults()
        average = trainer.train_step.averaged(state)
        if log is None:
            return
        out, progress = self.settings.out, trainer.progress
        save_curves(out / "curves.png", progress.history, progress.evaluations)
        told = json.dumps(faults) if faults else "none"
        skipped = progress.history.get("skipped", [0.0])[-1]
        log.tell(f"faults in the data: {told}; {skipped:.0f} steps skipped")
        if self.loader.images:
            speed = progress.averages("loading_share", "images_per_second")
            log.tell(told_roofline(self.loader, self.parallel, *speed))
        for folder, weights in ((out / "export", state), (out / "export_ema", average)):
            if weights:
                file = export(folder, load_whole(self._built(), weights), self.config)
                log.tell(f"{file}: open_clip.create_model('local-dir:{folder}')")
                log.tell(f"the whole model: rankloss.DinoRankCLIP.from_pretrained('{folder}')")
        log.close()


def run_as_program() -> None:
    """Run `main` and end the process, whatever still runs in it: no failure may hang."""
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else REFUSED
    except BaseException:
        traceback.print_exc()
        code = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0:  # workers, collectives and writers may wait for what never comes
        end_workers()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run_as_program()

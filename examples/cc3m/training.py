"""The training loop: optimizer, schedule, checkpoints, health, and stopping on a signal."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from examples.cc3m.batches import Batch, Position
from examples.cc3m.checkpoint import (
    Checkpoint,
    Checkpoints,
    restore_training,
    strip,
    training_tensors,
    whole_state,
)
from examples.cc3m.clock import Clock, CollectiveTime, peak_memory
from examples.cc3m.files import UserError
from examples.cc3m.generators import generator_states, restore_generators, seed_generators
from examples.cc3m.health import Health
from examples.cc3m.loader import ShardLoader
from examples.cc3m.optimization import clamp_scale, clip_gradients, learning_rate, parameter_groups
from examples.cc3m.parallel import Parallel, distribute
from examples.cc3m.prefetch import on_device
from examples.cc3m.progress import Progress, positions_of_all, resumed_position, states_of_all
from examples.cc3m.settings import TrainSettings
from examples.cc3m.signals import Interrupted, StopRequest
from examples.cc3m.steps import Gradients, Work
from examples.cc3m.towers import Towers

SHARES = ("loading", "model", "loss", "optimizer")
"""Of a step's time, as named by the clock."""
PROFILE_EVERY = 20
"""Entries of the history; in one step of so many, collectives are timed by torch's profiler."""
ALONE = Parallel()


class Trainer:
    """One run: what it trains, and where it stands. Continues from its newest checkpoint.

    Args:
        towers: moved to its device already, and equal in every process.
        loader: training data; its batches are `settings.part_size` large.
        settings: how to train.
        steps_per_epoch: planned, for the schedule. An epoch ends when some process's data do, or
            after so many steps if its data never end.
        folder: of the checkpoints; need not exist.
        parallel: the processes that train together.
        report: called with the step and the values of each entry of the history.
    """

    def __init__(
        self,
        towers: Towers,
        loader: ShardLoader,
        settings: TrainSettings,
        steps_per_epoch: int,
        folder: Path,
        parallel: Parallel = ALONE,
        report: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.towers, self.loader, self.settings = towers, loader, settings
        self.parallel, self.steps_per_epoch, self.report = parallel, steps_per_epoch, report
        self.checkpoints = Checkpoints(folder, settings.keep_checkpoints)
        self.clock, self.collectives = Clock(parallel.device), CollectiveTime()
        own = Work(towers, self.clock)
        work = distribute(own, parallel, settings.sharding)
        enabled = settings.precision == "amp_fp16"
        self.scaler = torch.amp.GradScaler(parallel.device.type, enabled=enabled)
        self.gradients = Gradients(own, work, parallel.device, settings.precision, self.scaler)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(towers, settings.weight_decay), betas=settings.betas, fused=True
        )
        self.health = Health(towers, folder, parallel.rank, settings.most_skipped)
        self.total_steps = settings.epochs * steps_per_epoch
        self.progress = Progress()
        found = self.checkpoints.latest()
        if found is not None:
            self._restore(found)

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def history(self) -> dict[str, list[float]]:
        return self.progress.history

    @property
    def finished(self) -> bool:
        return self.progress.position.epoch >= self.settings.epochs

    def fit(
        self,
        label: str,
        stop: StopRequest,
        after_epoch: Callable[[Trainer], bool] | None = None,
    ) -> None:
        """Train to the end.

        Args:
            label: of the progress bar.
            stop: asks to stop after the current step, in any process.
            after_epoch: evaluates, and adds to `progress.evaluations`; False if it was asked to
                stop before it was done. It comes again after a resume then.

        Raises:
            Interrupted: `stop` was requested; the checkpoint is of the step just done.
            NotFinite: loss or gradients stay infinite or NaN.
            UserError: the checkpoint cannot be written.
        """
        self.towers.train()
        # disable=None: no bar when the output is not a terminal, but a line an epoch (below)
        disable = None if self.parallel.first else True
        progress = self.progress
        bar = tqdm(
            total=self.total_steps, initial=self.step, desc=label, unit="step", disable=disable
        )
        with bar:
            while True:
                if after_epoch is not None and progress.evaluated < progress.position.epoch:
                    self._evaluate(after_epoch, stop)
                if self.finished:
                    break
                self._train_epoch(bar, stop)
                progress.position = Position(progress.position.epoch + 1)
                if bar.disable and self.parallel.first:
                    entries = max(1, self.steps_per_epoch // self.settings.log_steps)
                    summary = progress.summary(self.settings.epochs, entries)
                    print(f"{label}: {summary}", flush=True)
        self.save()

    def _evaluate(self, after_epoch: Callable[[Trainer], bool], stop: StopRequest) -> None:
        whole = after_epoch(self)
        self.towers.train()
        if self.parallel.agree(not whole)[0]:
            self._stop(stop)
        self.progress.evaluated = self.progress.position.epoch
        self.clock.read()  # evaluation is no step's time
        self.save()

    def _train_epoch(self, bar: Any, stop: StopRequest) -> None:
        epoch = self.progress.position.epoch
        self.towers.set_progress(epoch / max(1, self.settings.epochs - 1))
        batches = on_device(self.loader.epoch(self.progress.position), self.parallel.device)
        while not self._epoch_is_over(epoch):
            with self.clock.waiting():
                parts = list(itertools.islice(batches, self.settings.accumulate))
            lacking = len(parts) < self.settings.accumulate
            stopping, ended = self.parallel.agree(stop.signal_number is not None, lacking)
            if stopping:
                self._stop(stop)
            if ended:
                return
            logged = (self.step + 1) % self.settings.log_steps == 0
            with self.collectives.profiled(logged and self._is_profiled()):
                terms = self.update(parts)
            self.progress.step += 1
            for part in parts:
                self.progress.position = self.progress.position.after(part, self.loader.streams)
            if logged:
                self._log(terms)
                bar.set_postfix(loss=f"{self.history['loss'][-1]:.3f}", refresh=False)
            bar.update()
            if self.step % self.settings.checkpoint_steps == 0 and not self.health.in_a_row:
                self.save()
        if self.parallel.agree(stop.signal_number is not None)[0]:
            self._stop(stop)

    def _is_profiled(self) -> bool:
        entries = len(self.history.get("loss", ()))
        return self.parallel.world_size > 1 and entries % PROFILE_EVERY == 1

    def _epoch_is_over(self, epoch: int) -> bool:
        return self.loader.resample and self.step >= (epoch + 1) * self.steps_per_epoch

    def _stop(self, stop: StopRequest) -> None:
        self.save()
        done = f"step {self.step} of {self.total_steps}"
        raise Interrupted(f"stopped after {done}", stop.signal_number or 0)

    def update(self, parts: list[Batch]) -> dict[str, Tensor]:
        """One step of the optimizer; the loss's terms, detached, and what the step cost.

        Args:
            parts: `settings.accumulate` batches, on the device.
        """
        wall, cpu, settings = time.perf_counter(), time.process_time(), self.settings
        rate = learning_rate(
            self.step, self.total_steps, settings.learning_rate, settings.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.health.before_step()
        terms = self.gradients(parts)
        with self.clock.span("optimizer"):
            self._apply_gradients(parts, terms)
        costs = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }
        return terms | {name: torch.tensor(value) for name, value in costs.items()}

    def _apply_gradients(self, parts: list[Batch], terms: dict[str, Tensor]) -> None:
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.towers, self.settings.clip_norm)
        finite = torch.isfinite(norm) & torch.isfinite(torch.stack(list(terms.values()))).all()
        (bad,) = self.parallel.agree(not bool(finite))
        if not bad:
            self.scaler.step(self.optimizer)
            clamp_scale(self.towers.model)
            self.health.good()
        self.scaler.update()
        self.optimizer.zero_grad()
        if bad:
            self.health.bad(self.step, parts, terms)

    def _log(self, terms: dict[str, Tensor]) -> None:
        values = self.parallel.mean({name: float(value) for name, value in terms.items()})
        values["loss"] = sum(v for name, v in values.items() if name.endswith("_loss"))
        scale = getattr(self.towers.model, "logit_scale", None)
        if isinstance(scale, Tensor):
            values["scale"] = float(_whole(scale).detach().exp())
        values["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        values["step"], values["skipped"] = float(self.step), float(self.health.total)
        values |= self._costs()
        self.progress.note(values)
        if self.report is not None and self.parallel.first:
            self.report(self.step, values)

    def _costs(self) -> dict[str, float]:
        elapsed, spans = self.clock.read()
        steps = self.settings.log_steps
        step_seconds = elapsed / steps
        costs = {f"{name}_share": spans.get(name, 0.0) / elapsed for name in SHARES}
        costs["communication_share"] = self.collectives.seconds / step_seconds
        costs["images_per_second"] = self.settings.batch_size / step_seconds
        costs["peak_memory"] = float(peak_memory(self.parallel.device))
        return costs

    def whole_state(self) -> dict[str, Tensor]:
        """Weights and buffers of the towers, on the processor. Every process must take part."""
        return whole_state(self.towers)

    def save(self) -> None:
        """Write the checkpoint: all that new processes need to go on exactly."""
        tensors = training_tensors(self.towers, self.optimizer)
        for name, value in states_of_all(generator_states(), self.parallel).items():
            tensors[f"generators.{name}"] = value
        streams = self.loader.streams
        positions = positions_of_all(self.progress.position, streams, self.parallel)
        if not self.parallel.first:
            return
        state = {
            "progress": self.progress.as_json(),
            "positions": [asdict(each) for each in positions],
            "skipped": [self.health.in_a_row, self.health.total],
            "scaler": self.scaler.state_dict(),
            "settings": self.settings.identity(),
        }
        self.checkpoints.save(self.step, tensors, state)

    def _restore(self, found: Checkpoint) -> None:
        state, wanted = found.state, self.settings.identity()
        if state["settings"] != wanted:
            changed = ", ".join(k for k in wanted if state["settings"].get(k) != wanted[k])
            raise UserError(
                f"{found.path} was made with other settings ({changed}); choose another folder for "
                "this run, or remove it to start over"
            )
        restore_training(self.towers, self.optimizer, found)
        self.scaler.load_state_dict(state["scaler"])
        self.health.in_a_row, self.health.total = state["skipped"]
        position, same = resumed_position(
            state["positions"], self.loader.streams, self.loader.order, self.parallel
        )
        self.progress = Progress(**{**state["progress"], "position": position})
        if same:
            restore_generators(strip(found.tensors, f"generators.{self.parallel.rank}."))
        else:
            seed_generators(self.settings.seed + 1000 * self.step + self.parallel.rank)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

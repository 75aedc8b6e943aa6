"""The training loop: epochs, checkpoints, evaluations, what is logged, and stopping on a signal."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from examples.cc3m.data.batch import Batch, on_device
from examples.cc3m.data.loader import ShardLoader
from examples.cc3m.data.positions import Position
from examples.cc3m.monitor import Clock, CollectiveTime, peak_memory
from examples.cc3m.resume import Progress, SavedRun, check_equal, weights_checksum
from examples.cc3m.settings import TrainSettings
from examples.cc3m.step import NotFinite, TrainStep, whole
from examples.common.checkpoint import checksum, strip
from examples.common.parallel import Parallel
from examples.common.signals import Interrupted, StopRequest
from rankloss import DinoRankCLIP

LOG = logging.getLogger(__name__)
SHARES = ("loading", "model", "loss", "optimizer")
"""Parts of a step's time, as named by the clock."""
PROFILE_EVERY = 20
"""Entries of the history; in one step of so many, collectives are timed by torch's profiler."""
ALONE = Parallel()


class Trainer:
    """One run: what it trains, and where it stands. Continues from its newest checkpoint.

    Args:
        towers: moved to its device already, and equal in every process.
        loader: training data; its batches are `settings.part_size` large.
        settings: how to train.
        planned: steps of each epoch, for the schedule. An epoch ends when some process's data do,
            or after so many steps if its data never end.
        folder: holds the checkpoints; need not exist.
        parallel: the processes that train together.
        teacher_grid: (height, width) of the teacher's patches, for recipes that distil.
        change: go on from a checkpoint that was made with other settings, too.
        report: called with the step and the values of each entry of the history.

    Raises:
        UserError: the checkpoints are of another model, of other settings, or not the same for all
            processes.
    """

    def __init__(
        self,
        towers: DinoRankCLIP,
        loader: ShardLoader,
        settings: TrainSettings,
        planned: Sequence[int],
        folder: Path,
        parallel: Parallel = ALONE,
        *,
        teacher_grid: tuple[int, int] | None = None,
        change: bool = False,
        report: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.towers, self.loader, self.settings = towers, loader, settings
        self.parallel, self.report = parallel, report
        self.clock, self.collectives = Clock(parallel.device), CollectiveTime()
        expected = weights_checksum(towers) if parallel.world_size > 1 else 0
        self.train_step = TrainStep(towers, settings, parallel, self.clock, folder, teacher_grid)
        self.saved = SavedRun(folder, self.train_step, loader, settings, parallel)
        self.progress, changed = Progress(), False
        found = self.saved.newest()
        if found is not None:
            self.progress, changed = self.saved.restore(found, change=change)
            expected = checksum(strip(found.tensors, "module."))
        self.progress.plan(list(planned), changed=changed)
        check_equal(parallel, self.step, expected, towers)

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def total_steps(self) -> int:
        return self.progress.total_steps

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
        every: int = 1,
    ) -> None:
        """Train to the end.

        Args:
            label: text of the progress bar.
            stop: asks to stop after the current step, in any process.
            after_epoch: evaluates, and adds to `progress.evaluations`; False if it was asked to
                stop before it was done. It comes again after a resume then.
            every: epochs between two calls of it; there is one after the last in any case.

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
                epoch = progress.position.epoch
                if after_epoch is not None and progress.evaluated < epoch:
                    if epoch % every == 0 or self.finished:
                        self._evaluate(after_epoch, stop)
                    progress.evaluated = epoch
                if self.finished:
                    break
                self._train_epoch(bar, stop)
                progress.position = Position(progress.position.epoch + 1)
                progress.step_of_epoch = 0
                keep = self.settings.keep_epochs
                for_good = keep > 0 and progress.position.epoch % keep == 0
                self.saved.save(progress, for_good=for_good)
                if bar.disable and self.parallel.first:
                    entries = max(1, progress.planned[epoch] // self.settings.log_steps)
                    summary = progress.summary(self.settings.epochs, entries)
                    print(f"{label}: {summary}", flush=True)
        self._save_now(stop)

    def _evaluate(self, after_epoch: Callable[[Trainer], bool], stop: StopRequest) -> None:
        self.towers.eval()
        self.parallel.share_buffers(self.towers)
        complete = after_epoch(self)
        self.towers.train()
        if self.parallel.agree(not complete)[0]:
            self._stop(stop)
        self.clock.read()  # evaluation is no step's time

    def _train_epoch(self, bar: Any, stop: StopRequest) -> None:
        progress = self.progress
        epoch = progress.position.epoch
        self.towers.set_progress(epoch / max(1, self.settings.epochs - 1))
        batches = on_device(self.loader.epoch(progress.position), self.parallel.device)
        self.clock.read()
        while not (self.loader.resample and progress.step_of_epoch >= progress.planned[epoch]):
            parts = self._next_parts(batches, stop)
            if parts is None:
                return
            logged = (self.step + 1) % self.settings.log_steps == 0
            with self.collectives.profiled(logged and self._is_profiled()):
                terms = self._update_or_roll_back(parts)
            for part in parts:
                progress.position = progress.position.after(part, self.loader.streams)
            if terms is None:
                continue
            progress.step += 1
            progress.step_of_epoch += 1
            self.clock.steps += 1
            if logged:
                self._log(terms)
                bar.set_postfix(loss=f"{self.history['loss'][-1]:.3f}", refresh=False)
            bar.update()
            due = self.step % self.settings.checkpoint_steps == 0
            if due and not self.train_step.guard.in_a_row:
                self.saved.save(progress)
        if self.parallel.agree(stop.wanted)[0]:
            self._stop(stop)

    def _next_parts(self, batches: Iterator[Batch], stop: StopRequest) -> list[Batch] | None:
        """Return the batches of a step; None if some process has not enough of them."""
        with self.clock.waiting():
            parts = list(itertools.islice(batches, self.settings.accumulate))
        lacking = len(parts) < self.settings.accumulate
        stopping, ended = self.parallel.agree(stop.wanted, lacking)
        if stopping:
            self._stop(stop)
        return None if ended else parts

    def _is_profiled(self) -> bool:
        entries = len(self.history.get("loss", ()))
        return self.parallel.world_size > 1 and entries % PROFILE_EVERY == 1

    def update(self, parts: list[Batch]) -> dict[str, Tensor]:
        """Do one step on `settings.accumulate` batches; return its terms and cost."""
        return self.train_step(parts, self.step, self.total_steps)

    def _update_or_roll_back(self, parts: list[Batch]) -> dict[str, Tensor] | None:
        """Do a step; after too many bad ones in a row, go back to the last checkpoint's weights.

        The data go on where they are, so that no batch since that checkpoint comes again; this one
        is no step then, and None is returned.
        """
        try:
            return self.update(parts)
        except NotFinite:
            found = self.saved.newest()
            if found is None or self.progress.rolled_back >= self.settings.roll_back:
                raise
        self.train_step.restore(found)
        self.train_step.guard.in_a_row = 0
        self.progress.rolled_back += 1
        LOG.warning("weights are again those of %s; the data go on", found.path.name)
        return None

    def _log(self, terms: dict[str, Tensor]) -> None:
        values = self.parallel.mean({name: float(value) for name, value in terms.items()})
        values["loss"] = sum(v for name, v in values.items() if name.endswith("_loss"))
        scale = getattr(self.towers.model, "logit_scale", None)
        if isinstance(scale, Tensor):
            values["scale"] = float(whole(scale).detach().exp())
        values["learning_rate"] = float(self.train_step.optimizer.param_groups[0]["lr"])
        values["step"] = float(self.step)
        values["skipped"] = float(self.train_step.guard.total)
        values |= self._costs()
        self.progress.note(values)
        if self.report is not None and self.parallel.first:
            self.report(self.step, values)

    def _costs(self) -> dict[str, float]:
        steps = max(1, self.clock.steps)
        elapsed, spans = self.clock.read()
        step_seconds = elapsed / steps
        costs = {f"{name}_share": spans.get(name, 0.0) / elapsed for name in SHARES}
        costs["communication_share"] = self.collectives.seconds / step_seconds
        costs["images_per_second"] = self.settings.batch_size / step_seconds
        costs["peak_memory"] = float(peak_memory(self.parallel.device))
        return costs

    def faults(self) -> dict[str, int]:
        """Count the faults in the data that all processes met. Every process must take part."""
        return self.saved.faults(self.progress)

    def _stop(self, stop: StopRequest) -> None:
        self._save_now(stop)
        done = f"step {self.step} of {self.total_steps}"
        raise Interrupted(f"stopped after {done}", stop.signal_number or 0)

    def _save_now(self, stop: StopRequest) -> None:
        """Save, and wait until it is on disk; a second Ctrl-C does not disturb it."""
        stop.saving = True
        try:
            self.saved.save(self.progress, wait=True)
        finally:
            stop.saving = False

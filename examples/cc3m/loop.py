"""The training loop: optimizer, schedule, checkpoints, steps left out, and stopping on a signal."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from examples.cc3m.batch import Batch, on_device
from examples.cc3m.checkpoint import (
    Checkpoint,
    Checkpoints,
    checksum,
    load_checkpoint,
    restore_training,
    strip,
    training_tensors,
)
from examples.cc3m.gradients import Gradients
from examples.cc3m.loader import ShardLoader
from examples.cc3m.monitor import Clock, CollectiveTime, peak_memory
from examples.cc3m.positions import Position
from examples.cc3m.settings import TrainSettings
from examples.common.files import UserError
from examples.common.parallel import Parallel, generator_states, restore_generators, seed_generators
from examples.common.signals import Interrupted, StopRequest
from rankloss import DinoRankCLIP

LOG = logging.getLogger(__name__)
SHARES = ("loading", "model", "loss", "optimizer")
"""Parts of a step's time, as named by the clock."""
PROFILE_EVERY = 20
"""Entries of the history; in one step of so many, collectives are timed by torch's profiler."""
ALONE = Parallel()
MAX_SCALE = math.log(100)


class NotFinite(UserError):
    """Too many steps in a row whose loss or gradient is infinite or NaN."""


class NonFiniteGuard:
    """Keep what a bad step would spoil, count bad steps, and name their samples.

    Args:
        module: whose buffers (running statistics) a bad step must not change.
        folder: gets skipped_<rank>.jsonl, a line a skipped step.
        rank: this process's.
        most: skipped steps in a row before giving up.
    """

    def __init__(self, module: nn.Module, folder: Path, rank: int, most: int) -> None:
        self.path, self.most = folder / f"skipped_{rank}.jsonl", most
        self.in_a_row = self.total = 0
        self._buffers = list(module.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    def before_step(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def good(self) -> None:
        self.in_a_row = 0

    def bad(self, step: int, parts: Sequence[Batch], terms: dict[str, Tensor]) -> None:
        """Note a step that is left out.

        Raises:
            NotFinite: there were too many in a row.
        """
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        line = {
            "step": step,
            "terms": {name: str(float(value)) for name, value in terms.items()},
            "keys": [key for part in parts for key in part.keys],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.in_a_row > self.most:
            raise NotFinite(
                f"loss or gradient was not finite in {self.in_a_row} steps in a row; the samples "
                f"are named in {self.path}. The last checkpoint is from before: run the same "
                "command with --train.roll-back 1 to go back to it and leave these samples out, "
                "or with --change and a lower --train.learning-rate"
            )


@dataclass
class Progress:
    """Place where a run stands; saved with it."""

    step: int = 0
    position: Position = field(default_factory=Position)
    planned: list[int] = field(default_factory=list)
    """Steps of each epoch, as planned."""
    total_steps: int = 0
    """Steps of the whole run, which the schedule divides."""
    step_of_epoch: int = 0
    evaluated: int = 0
    """Epochs after which there was an evaluation."""
    rolled_back: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    """Faults in the data that all processes met before the last start."""
    history: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return all but the position, which is another one in every process."""
        return {**asdict(self), "position": None}

    def note(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)

    def plan(self, planned: list[int], *, changed: bool) -> None:
        """Set how long the run is; after a change, as long as the rest of it takes."""
        if not self.planned:
            self.total_steps = sum(planned)
        elif changed or planned != self.planned:
            epoch = self.position.epoch
            left = 1 - self.step_of_epoch / max(1, self.planned[min(epoch, len(self.planned) - 1)])
            now = round(planned[epoch] * max(0.0, left)) if epoch < len(planned) else 0
            self.total_steps = self.step + now + sum(planned[epoch + 1 :])
        self.planned = planned

    def summary(self, epochs: int, entries: int) -> str:
        """Return a line about the last so many entries of the history."""
        loss, rates = (self.history.get(k, [])[-entries:] for k in ("loss", "images_per_second"))
        epoch = f"epoch {self.position.epoch}/{epochs}"
        if not loss:
            return epoch
        mean, rate = sum(loss) / len(loss), sum(rates) / len(rates)
        return f"{epoch}, mean loss {mean:.3f}, {rate:.0f} images/s"


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
        self.checkpoints = Checkpoints(folder, settings.keep_checkpoints)
        self.clock, self.collectives = Clock(parallel.device), CollectiveTime()
        enabled = settings.precision == "amp_fp16"
        self.scaler = torch.amp.GradScaler(parallel.device.type, enabled=enabled)
        self.gradients = Gradients(
            towers,
            parallel,
            settings.sharding,
            settings.precision,
            self.scaler,
            self.clock,
            teacher_grid,
        )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(towers, settings.weight_decay), betas=settings.betas, fused=True
        )
        self.guard = NonFiniteGuard(towers, folder, parallel.rank, settings.most_skipped)
        self.progress = Progress()
        found = self._newest()
        changed = False if found is None else self._restore(found, change)
        self.progress.plan(list(planned), changed=changed)
        self._check_equal()

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
                self.save(for_good=keep > 0 and progress.position.epoch % keep == 0)
                if bar.disable and self.parallel.first:
                    entries = max(1, progress.planned[epoch] // self.settings.log_steps)
                    summary = progress.summary(self.settings.epochs, entries)
                    print(f"{label}: {summary}", flush=True)
        self._save_now(stop)

    def _evaluate(self, after_epoch: Callable[[Trainer], bool], stop: StopRequest) -> None:
        self.towers.eval()
        self.parallel.share_buffers(self.towers)
        whole = after_epoch(self)
        self.towers.train()
        if self.parallel.agree(not whole)[0]:
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
            if self.step % self.settings.checkpoint_steps == 0 and not self.guard.in_a_row:
                self.save()
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

    def _stop(self, stop: StopRequest) -> None:
        self._save_now(stop)
        done = f"step {self.step} of {self.total_steps}"
        raise Interrupted(f"stopped after {done}", stop.signal_number or 0)

    # ------------------------------------------------------------ a step

    def update(self, parts: list[Batch]) -> dict[str, Tensor]:
        """Do one step of the optimizer; return the loss's terms, detached, and the step's cost.

        Args:
            parts: `settings.accumulate` batches, on the device.
        """
        wall, cpu, settings = time.perf_counter(), time.process_time(), self.settings
        rate = learning_rate(
            self.step, self.total_steps, settings.learning_rate, settings.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.guard.before_step()
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
            self.guard.good()
        self.scaler.update()
        self.optimizer.zero_grad()
        if bad:
            self.guard.bad(self.step, parts, terms)

    def _update_or_roll_back(self, parts: list[Batch]) -> dict[str, Tensor] | None:
        """Do a step; after too many bad ones in a row, go back to the last checkpoint's weights.

        The data go on where they are, so that no batch since that checkpoint comes again; this one
        is no step then, and None is returned.
        """
        try:
            return self.update(parts)
        except NotFinite:
            found = self._newest()
            if found is None or self.progress.rolled_back >= self.settings.roll_back:
                raise
        restore_training(self.towers, self.optimizer, found)
        self.scaler.load_state_dict(found.state["scaler"])
        self.guard.in_a_row = 0
        self.progress.rolled_back += 1
        LOG.warning("weights are again those of %s; the data go on", found.path.name)
        return None

    def _log(self, terms: dict[str, Tensor]) -> None:
        values = self.parallel.mean({name: float(value) for name, value in terms.items()})
        values["loss"] = sum(v for name, v in values.items() if name.endswith("_loss"))
        scale = getattr(self.towers.model, "logit_scale", None)
        if isinstance(scale, Tensor):
            values["scale"] = float(_whole(scale).detach().exp())
        values["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        values["step"], values["skipped"] = float(self.step), float(self.guard.total)
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

    # ------------------------------------------------------------ checkpoints

    def faults(self) -> dict[str, int]:
        """Count the faults in the data that all processes met. Every process must take part."""
        met = Counter(self.progress.faults)
        for each in self.parallel.gather(dict(self.loader.faults)):
            met.update(each)
        return dict(met)

    def save(self, *, for_good: bool = False, wait: bool = False) -> None:
        """Copy all that new processes need to go on exactly; it is written while training goes on.

        Args:
            for_good: never remove this checkpoint.
            wait: until it is on disk.

        Raises:
            UserError: it, or the one before if there is no waiting, could not be written.
        """
        tensors = training_tensors(self.towers, self.optimizer)
        everyones = self.parallel.gather((generator_states(), self.progress.position.as_json()))
        state = {
            "progress": {**self.progress.as_json(), "faults": self.faults()},
            "positions": [position for _, position in everyones],
            "streams": self.loader.streams,
            "skipped": [self.guard.in_a_row, self.guard.total],
            "scaler": self.scaler.state_dict(),
            "settings": self.settings.identity(),
        }
        error = None
        if self.parallel.first:
            for rank, (generators, _) in enumerate(everyones):
                tensors |= {f"generators.{rank}.{k}": v for k, v in generators.items()}
            try:
                self.checkpoints.save_later(self.step, tensors, state, for_good=for_good)
                if wait:
                    self.checkpoints.wait()
            except UserError as caught:
                error = caught
        self.parallel.together(error)

    def _save_now(self, stop: StopRequest) -> None:
        """Save, and wait until it is on disk; a second Ctrl-C does not disturb it."""
        stop.saving = True
        try:
            self.save(wait=True)
        finally:
            stop.saving = False

    def _newest(self) -> Checkpoint | None:
        """Return the checkpoint that the first process chose, after all have read the same.

        Raises:
            UserError: a process cannot read it, or reads another one.
        """
        found, error = None, None
        if self.parallel.first:
            try:
                self.checkpoints.wait()
                found = self.checkpoints.latest()
            except UserError as caught:
                error = caught
        self.parallel.together(error)
        chosen = None if found is None else (str(found.path.name), found.checksum)
        chosen = self.parallel.same_for_all(chosen)
        if chosen is not None and not self.parallel.first:
            path = self.checkpoints.folder / chosen[0]
            try:
                found = load_checkpoint(path)
                if found.checksum != chosen[1]:
                    error = UserError(f"{path} is another file than the first process reads")
            except (FileNotFoundError, UserError) as caught:
                error = UserError(
                    f"{path}, which the first process goes on from, cannot be read here "
                    f"({caught}); all processes must see the same folder"
                )
        self.parallel.together(error)
        return found

    def _restore(self, found: Checkpoint, change: bool) -> bool:
        """Go on from a checkpoint; return if settings or the number of readers are other ones."""
        state, wanted = found.state, self.settings.identity()
        differing = [name for name in wanted if state["settings"].get(name) != wanted[name]]
        if differing and not change:
            raise UserError(
                f"{found.path} was made with other settings ({', '.join(differing)}); choose "
                "another folder for this run, or remove it to start over"
            )
        restore_training(self.towers, self.optimizer, found)
        self.scaler.load_state_dict(state["scaler"])
        self.guard.in_a_row, self.guard.total = state["skipped"]
        positions = [Position.from_json(each) for each in state["positions"]]
        same = len(positions) == self.parallel.world_size
        same &= state["streams"] == self.loader.streams
        same &= state["settings"]["batch_size"] == self.settings.batch_size
        if same:
            position = positions[self.parallel.rank]
            restore_generators(strip(found.tensors, f"generators.{self.parallel.rank}."))
        else:
            position = self.loader.order.carry_over(positions)
            seed_generators(
                self.settings.seed + 1000 * state["progress"]["step"] + self.parallel.rank
            )
        self.progress = Progress(**{**state["progress"], "position": position})
        return not same or bool(differing)

    def _check_equal(self) -> None:
        """See that all processes train the same weights from the same step.

        Raises:
            UserError: they do not.
        """
        if self.parallel.world_size == 1:
            return
        state = self.towers.state_dict()
        whole = {
            k: v.detach().cpu().contiguous() for k, v in state.items() if not isinstance(v, DTensor)
        }
        told = self.parallel.gather((self.step, checksum(whole)))
        if len(set(told)) > 1:
            raise UserError(
                f"processes differ in step or weights (step and checksum by rank: {told}); start "
                "all of them with the same settings, versions and folder"
            )


def parameter_groups(towers: DinoRankCLIP, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices only: not scale, biases, norms, nor what a part's `no_weight_decay` names."""
    spared = towers.no_weight_decay()
    named = [(name, p) for name, p in towers.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or name in spared]
    decayed = [p for name, p in named if not (p.ndim < 2 or name in spared)]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(step: int, total: int, peak: float, warmup_steps: int) -> float:
    """Return the rate at 0-based `step` of `total`: linear warm-up, then a cosine to 0."""
    warmup = min(warmup_steps, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(module: nn.Module, largest: float) -> Tensor:
    """Scale gradients so that their norm is at most `largest`; return the norm before."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clamp_scale(model: nn.Module) -> None:
    """Keep the scale within CLIP's bounds, 1 to 100."""
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, Tensor):
        scale.clamp_(0, MAX_SCALE)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

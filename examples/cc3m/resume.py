"""Progress of a run, how it is saved, and how all processes go on from one checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from examples.cc3m.data.loader import ShardLoader
from examples.cc3m.data.positions import Position
from examples.cc3m.settings import TrainSettings
from examples.cc3m.step import TrainStep
from examples.common.checkpoint import (
    Checkpoint,
    Checkpoints,
    checksum,
    load_checkpoint,
    strip,
    whole_state,
)
from examples.common.files import UserError
from examples.common.parallel import (
    Parallel,
    generator_states,
    restore_generators,
    seed_generators,
)
from rankloss import DinoRankCLIP


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
        epoch = f"epoch {self.position.epoch}/{epochs}"
        if not self.history.get("loss"):
            return epoch
        mean, rate = self.averages("loss", "images_per_second", entries=entries)
        return f"{epoch}, mean loss {mean:.3f}, {rate:.0f} images/s"

    def averages(self, *names: str, entries: int = 0) -> list[float]:
        """Return means over the last so many entries of the history; 0 takes all."""
        chosen = (self.history.get(name, [])[-entries:] for name in names)
        return [sum(values) / max(1, len(values)) for values in chosen]


class SavedRun:
    """Checkpoints of a run that all processes save and restore together.

    Args:
        folder: holds the checkpoints; need not exist.
        train_step: has the tensors.
        loader: training data.
        settings: how the run trains; a checkpoint of other settings is refused.
        parallel: the processes.
    """

    def __init__(
        self,
        folder: Path,
        train_step: TrainStep,
        loader: ShardLoader,
        settings: TrainSettings,
        parallel: Parallel,
    ) -> None:
        self.checkpoints = Checkpoints(folder, settings.keep_checkpoints)
        self.train_step, self.loader = train_step, loader
        self.settings, self.parallel = settings, parallel

    def faults(self, progress: Progress) -> dict[str, int]:
        """Count the faults in the data that all processes met. Every process must take part."""
        met = Counter(progress.faults)
        for each in self.parallel.gather(dict(self.loader.faults)):
            met.update(each)
        return dict(met)

    def save(self, progress: Progress, *, for_good: bool = False, wait: bool = False) -> None:
        """Copy all that new processes need to go on exactly; it is written while training goes on.

        Args:
            progress: this process's place.
            for_good: never remove this checkpoint.
            wait: until it is on disk.

        Raises:
            UserError: it, or the one before if there is no waiting, could not be written.
        """
        tensors, guard = self.train_step.tensors(), self.train_step.guard
        everyones = self.parallel.gather((generator_states(), progress.position.as_json()))
        state = {
            "progress": {**progress.as_json(), "faults": self.faults(progress)},
            "positions": [position for _, position in everyones],
            "streams": self.loader.streams,
            "skipped": [guard.in_a_row, guard.total],
            "scaler": self.train_step.scaler.state_dict(),
            "settings": self.settings.identity(),
        }
        error = None
        if self.parallel.first:
            for rank, (generators, _) in enumerate(everyones):
                tensors |= {f"generators.{rank}.{k}": v for k, v in generators.items()}
            try:
                self.checkpoints.save_later(progress.step, tensors, state, for_good=for_good)
                if wait:
                    self.checkpoints.wait()
            except UserError as caught:
                error = caught
        self.parallel.together(error)

    def newest(self) -> Checkpoint | None:
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

    def restore(self, found: Checkpoint, *, change: bool) -> tuple[Progress, bool]:
        """Go on from a checkpoint; return its place, and if settings or readers are other ones.

        Raises:
            UserError: it is of another model, or of other settings and `change` is False.
        """
        state, wanted = found.state, self.settings.identity()
        differing = [name for name in wanted if state["settings"].get(name) != wanted[name]]
        if differing and not change:
            raise UserError(
                f"{found.path} was made with other settings ({', '.join(differing)}); choose "
                "another folder for this run, or remove it to start over"
            )
        self.train_step.restore(found)
        guard, rank = self.train_step.guard, self.parallel.rank
        guard.in_a_row, guard.total = state["skipped"]
        positions = [Position.from_json(each) for each in state["positions"]]
        same = len(positions) == self.parallel.world_size
        same &= state["streams"] == self.loader.streams
        same &= state["settings"]["batch_size"] == self.settings.batch_size
        if same:
            position = positions[rank]
            restore_generators(strip(found.tensors, f"generators.{rank}."))
        else:
            position = self.loader.order.carry_over(positions)
            seed_generators(self.settings.seed + 1000 * state["progress"]["step"] + rank)
        progress = Progress(**{**state["progress"], "position": position})
        return progress, not same or bool(differing)


def weights_checksum(towers: DinoRankCLIP) -> int:
    """Return the CRC-32 of all weights and buffers, gathered where processes hold parts of them."""
    state = towers.state_dict()
    if any(isinstance(value, DTensor) for value in state.values()):
        state = whole_state(towers, everywhere=True)
    return checksum({name: value.detach().cpu().contiguous() for name, value in state.items()})


def check_equal(parallel: Parallel, step: int, expected: int, towers: DinoRankCLIP) -> None:
    """See that all processes train the same weights from the same step.

    Args:
        parallel: the processes.
        step: this process's.
        expected: `weights_checksum` of what this process built, or read from the checkpoint,
            before anything was sharded.
        towers: what it trains now.

    Raises:
        UserError: processes differ, or the parts that they hold are not those of what they read.
    """
    if parallel.world_size == 1:
        return
    told = parallel.gather((step, expected, weights_checksum(towers)))
    if len(set(told)) > 1 or any(wanted != held for _, wanted, held in told):
        raise UserError(
            "processes differ in step or weights (step, checksum of the weights read or built, "
            f"and of those held, by rank: {told}); start all of them with the same settings, "
            "versions and folder"
        )

"""The training loop: optimizer, schedule, progress bar, checkpoints, and stopping on a signal."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.batches import Batch, Position
from examples.checkpoint import load_checkpoint, save_checkpoint
from examples.files import UserError
from examples.loader import ShardLoader
from examples.towers import Towers

MAX_SCALE = math.log(100)
MAX_SKIPPED = 10
"""Steps in a row whose gradient is not finite before training gives up."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Args:
        epochs, batch_size: batch_size is of this process, in pairs.
        learning_rate: at its peak; reached after `warmup_steps`, then a cosine down to 0.
        weight_decay: of matrices; see `parameter_groups` for what it spares.
        clip_norm: largest gradient norm.
        checkpoint_steps: steps between checkpoints.
        log_steps: steps between entries of the history.
        seed: of initialisation, order and augmentation.
    """

    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 40
    clip_norm: float = 1.0
    checkpoint_steps: int = 100
    log_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.checkpoint_steps, self.log_steps) < 1:
            raise ValueError(f"epochs, batch_size and steps must be at least 1: {self}")


def parameter_groups(towers: Towers, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices only: not scale, biases, norms, nor what a part's `no_weight_decay` names."""
    spared = towers.no_weight_decay()
    named = [(name, p) for name, p in towers.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or name in spared]
    decayed = [p for name, p in named if not (p.ndim < 2 or name in spared)]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """At 0-based `step` of `total`: linear warm-up, then a cosine to 0."""
    warmup = min(settings.warmup_steps, total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class Interrupted(Exception):
    """Training stopped on request, after saving a checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Remembers that a signal asked to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """The first SIGINT or SIGTERM sets the flag; the next one has its usual effect."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def remember(number: int, _: object) -> None:
            self.signal_number = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, remember)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Trainer:
    """One run: what it trains, and where it stands. Continues from its checkpoint if there is one.

    Args:
        towers: moved to its device already.
        loader: training data.
        settings: how to train.
        steps_per_epoch: planned, for the schedule; an epoch ends when the data do.
        checkpoint: where to save; its folder need not exist.
    """

    def __init__(
        self,
        towers: Towers,
        loader: ShardLoader,
        settings: TrainSettings,
        steps_per_epoch: int,
        checkpoint: Path,
    ) -> None:
        self.towers, self.loader, self.settings = towers, loader, settings
        self.checkpoint, self.steps_per_epoch = checkpoint, steps_per_epoch
        self.optimizer = torch.optim.AdamW(
            parameter_groups(towers, settings.weight_decay), betas=settings.betas, fused=True
        )
        self.total_steps = settings.epochs * steps_per_epoch
        self.step, self.skipped, self.position = 0, 0, Position()
        self.history: dict[str, list[float]] = {}
        if checkpoint.exists():
            self._restore()

    @property
    def finished(self) -> bool:
        return self.position.epoch >= self.settings.epochs

    def fit(self, label: str, stop: StopRequest) -> None:
        """Train to the end.

        Raises:
            Interrupted: `stop` was requested; the checkpoint is of the step just done.
            FloatingPointError: gradients stay infinite or NaN.
        """
        self.towers.train()
        # disable=None: no bar when the output is not a terminal, but a line an epoch (below)
        bar = tqdm(total=self.total_steps, initial=self.step, desc=label, unit="step", disable=None)
        with bar:
            while not self.finished:
                self._train_epoch(bar, stop)
                self.position = Position(self.position.epoch + 1)
                if bar.disable:
                    print(f"{label}: {self._summary()}", flush=True)
        self.save()

    def _train_epoch(self, bar: Any, stop: StopRequest) -> None:
        self.towers.set_progress(self.position.epoch / max(1, self.settings.epochs - 1))
        for batch in self.loader.epoch(self.position):
            terms = self.update(batch)
            self.step += 1
            self.position = self.position.after(batch, self.loader.streams)
            if self.step % self.settings.log_steps == 0:
                self._log(terms)
                bar.set_postfix(loss=f"{self.history['loss'][-1]:.3f}", refresh=False)
            bar.update()
            if stop.signal_number is not None:
                self.save()
                done = f"step {self.step} of {self.total_steps}"
                raise Interrupted(f"stopped after {done}", stop.signal_number)
            if self.step % self.settings.checkpoint_steps == 0:
                self.save()

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimizer; the loss's terms, detached, and what the step cost."""
        wall, cpu = time.perf_counter(), time.process_time()
        device = next(self.towers.parameters()).device
        rate = learning_rate(self.step, self.total_steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        terms = self.towers(batch.to(device))
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        self._apply_gradients()
        costs = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }
        detached = {name: value.detach() for name, value in terms.items()}
        return detached | {name: torch.tensor(value) for name, value in costs.items()}

    def _apply_gradients(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.towers.parameters(), self.settings.clip_norm)
        if torch.isfinite(norm):
            self.skipped = 0
            self.optimizer.step()
            self._clamp_scale()
        else:
            self.skipped += 1
        self.optimizer.zero_grad()
        if self.skipped > MAX_SKIPPED:
            raise FloatingPointError(
                f"the gradient was not finite in {self.skipped} steps in a row; "
                "lower the learning rate or the loss weights"
            )

    @torch.no_grad()
    def _clamp_scale(self) -> None:
        scale = getattr(self.towers.model, "logit_scale", None)
        if isinstance(scale, Tensor):
            scale.clamp_(0, MAX_SCALE)

    def _log(self, terms: dict[str, Tensor]) -> None:
        values = {name: float(value) for name, value in terms.items()}
        values["loss"] = sum(v for name, v in values.items() if name.endswith("_loss"))
        scale = getattr(self.towers.model, "logit_scale", None)
        if isinstance(scale, Tensor):
            values["scale"] = float(scale.detach().exp())
        values["step"] = float(self.step)
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)

    def _summary(self) -> str:
        entries = max(1, self.steps_per_epoch // self.settings.log_steps)
        loss, seconds = (self.history.get(name, [])[-entries:] for name in ("loss", "seconds"))
        epoch = f"epoch {self.position.epoch}/{self.settings.epochs}"
        if not loss:
            return epoch
        mean, rate = sum(loss) / len(loss), len(seconds) / sum(seconds)
        return f"{epoch}, mean loss {mean:.3f}, {rate:.1f} steps/s"

    def save(self) -> None:
        """Write the checkpoint: all that a new process needs to go on exactly."""
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "position": asdict(self.position),
            "settings": asdict(self.settings),
            "history": self.history,
        }
        save_checkpoint(self.checkpoint, self.towers, self.optimizer, state)

    def _restore(self) -> None:
        state = load_checkpoint(self.checkpoint, self.towers, self.optimizer)
        wanted = {**asdict(self.settings), "betas": list(self.settings.betas)}
        if state["settings"] != wanted:
            raise UserError(
                f"{self.checkpoint} was made with other settings; remove it to start over"
            )
        self.position = Position.from_json(state["position"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.history = state["history"]

"""One step: the exact gradient of a batch in parts, the optimizer, and steps that are left out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.cc3m.data.batch import Batch
from examples.cc3m.distilled import DistilledCLIP
from examples.cc3m.monitor import Clock, Stamp
from examples.cc3m.settings import DTYPES, TrainSettings
from examples.common.checkpoint import (
    Checkpoint,
    restore_training,
    restore_weights,
    training_tensors,
    whole_state,
)
from examples.common.files import UserError
from examples.common.parallel import Parallel, distribute
from rankloss import DinoRankCLIP
from rankloss.grad_cache import GradCache

Grid = tuple[int, int]
MAX_SCALE = math.log(100)


class Encoder(nn.Module):
    """Encode a batch: the only call that DDP and FSDP2 watch, with all that is trained inside."""

    def __init__(self, towers: DinoRankCLIP) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        outputs = self.towers.encode(batch.images, batch.texts)
        # FSDP2 gathers the parameters for the backward pass by a hook that views may lose
        return {name: x.clone() if x._is_view() else x for name, x in outputs.items()}


class Gradients:
    """Computes the gradient of a step: of one batch, or of a large one in parts, exactly.

    The loss computes in float32 whatever the model's precision. Arguments as for `TrainStep`, and
    `scaler`, which multiplies the loss before the backward pass, for float16.
    """

    def __init__(
        self,
        towers: DinoRankCLIP,
        settings: TrainSettings,
        parallel: Parallel,
        scaler: torch.amp.GradScaler,
        clock: Clock,
        teacher_grid: Grid | None = None,
    ) -> None:
        self.towers, self.device, self.clock = towers, parallel.device, clock
        self.precision, self.teacher_grid = settings.precision, teacher_grid
        self.module = distribute(Encoder(towers), parallel, settings.sharding)
        self.cached = GradCache(
            self.module,
            self._objective,
            modules=[self.module],
            autocast=self._autocast,
            scaler=scaler,
        )
        self._loss: tuple[Stamp, Stamp] | None = None

    def __call__(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Leave the gradient in the parameters; return the loss's terms, detached."""
        teachers = [part.teacher for part in parts if part.teacher is not None]
        teacher = [torch.cat(x) for x in zip(*teachers, strict=True)] if teachers else None
        start = self.clock.stamp()
        terms: Any = self.cached(parts, teacher=teacher)
        if self._loss is not None:
            begin, done = self._loss
            self.clock.add("model", start, begin)
            self.clock.add("loss", begin, done)
            self.clock.add("model", done, self.clock.stamp())
        return dict(terms)

    def _objective(self, teacher: Sequence[Tensor] | None, **outputs: Tensor) -> dict[str, Tensor]:
        begin = self.clock.stamp()

        def note(_: Tensor) -> None:
            self._loss = begin, self.clock.stamp()

        for name in ("image_features", "text_features"):
            if outputs[name].requires_grad:
                outputs[name].register_hook(note)  # type: ignore[no-untyped-call]
        return self.towers.objective(outputs, *(teacher or ()), teacher_grid=self.teacher_grid)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = DTYPES.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


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


class TrainStep:
    """One step of training, and all tensors that steps change.

    Args:
        towers: what is trained, moved to its device already; FSDP2 shards it in place.
        settings: how to train.
        parallel: the processes that train together.
        clock: told the time of the model, the loss and the optimizer.
        folder: where skipped samples are named.
        teacher_grid: (height, width) of the teacher's patches, for recipes that distil.
    """

    def __init__(
        self,
        towers: DinoRankCLIP,
        settings: TrainSettings,
        parallel: Parallel,
        clock: Clock,
        folder: Path,
        teacher_grid: Grid | None = None,
    ) -> None:
        self.towers, self.settings, self.parallel, self.clock = towers, settings, parallel, clock
        enabled = settings.precision == "amp_fp16"
        self.scaler = torch.amp.GradScaler(parallel.device.type, enabled=enabled)
        self.gradients = Gradients(towers, settings, parallel, self.scaler, clock, teacher_grid)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(towers, settings.weight_decay), betas=settings.betas, fused=True
        )
        self._trained = nn.ParameterList(towers.parameters())
        self.average: AveragedModel | None = None
        if settings.ema_decay:
            average = get_ema_multi_avg_fn(settings.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self._trained, multi_avg_fn=average)
        self.guard = NonFiniteGuard(towers, folder, parallel.rank, settings.most_skipped)

    def __call__(self, parts: list[Batch], step: int, total: int) -> dict[str, Tensor]:
        """Change the weights; return the loss's terms, detached, and what the step cost.

        Args:
            parts: `settings.accumulate` batches, on the device.
            step: how many were done before.
            total: steps of the whole run, which the schedule divides.

        Raises:
            NotFinite: too many steps in a row had no finite loss and gradient.
        """
        wall, cpu, settings = time.perf_counter(), time.process_time(), self.settings
        rate = learning_rate(step, total, settings.learning_rate, settings.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.guard.before_step()
        terms = self.gradients(parts)
        with self.clock.span("optimizer"):
            if not self._apply_gradients(terms):
                self.guard.bad(step, parts, terms)
            elif isinstance(self.towers, DistilledCLIP):
                self.towers.after_step(step, total)
        costs = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }
        return terms | {name: torch.tensor(value) for name, value in costs.items()}

    def _apply_gradients(self, terms: dict[str, Tensor]) -> bool:
        """Step the optimizer, in all processes or in none; return if it did."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.towers, self.settings.clip_norm)
        finite = torch.isfinite(norm) & torch.isfinite(torch.stack(list(terms.values()))).all()
        (bad,) = self.parallel.agree(not bool(finite))
        if not bad:
            self.scaler.step(self.optimizer)
            clamp_scale(self.towers.model)
            if self.average is not None:
                self.average.update_parameters(self._trained)
            self.guard.in_a_row = 0
        self.scaler.update()
        self.optimizer.zero_grad()
        return not bad

    def tensors(self) -> dict[str, Tensor]:
        """Gather all that `restore` wants, on the first process's CPU; {} in the others."""
        tensors = training_tensors(self.towers, self.optimizer)
        if self.average is not None:
            average = whole_state(self.average)
            tensors |= {f"average.{name}": value for name, value in average.items()}
        return tensors

    def restore(self, found: Checkpoint) -> None:
        """Put back weights, their average, the optimizer's state and the loss's scale.

        Raises:
            UserError: the checkpoint is of another model.
        """
        restore_training(self.towers, self.optimizer, found)
        if self.average is not None:
            restore_weights(self.average, found, "average.")
        self.scaler.load_state_dict(found.state["scaler"])

    def averaged(self, state: dict[str, Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
        """Return a whole state with the average in the place of the weights, {} if there is none.

        All processes must take part.

        Args:
            state: weights and buffers of the towers, from `whole_state`.
            everywhere: as there.
        """
        if self.average is None:
            return {}
        average = whole_state(self.average, everywhere=everywhere)
        if not average:
            return {}
        names = [name for name, _ in self.towers.named_parameters()]
        return state | {name: average[f"module.{i}"] for i, name in enumerate(names)}


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
    return whole(nn.utils.clip_grad_norm_(module.parameters(), largest))


@torch.no_grad()
def clamp_scale(model: nn.Module) -> None:
    """Keep the scale within CLIP's bounds, 1 to 100."""
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, Tensor):
        scale.clamp_(0, MAX_SCALE)


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or the whole of one that FSDP2 has sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

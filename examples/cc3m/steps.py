"""A step's gradient: of one batch, or of a large one in parts, exactly.

Contrastive losses compare every sample with every other, so the gradient of a large batch is not
the mean of the gradients of its parts. In parts, features of all are made first, without gradient;
the loss of all gives a gradient for each; then each part is encoded again, with gradient, and its
features' gradient is passed on (GradCache, Gao et al. 2021). The result is the large batch's to
rounding, for models without batch normalisation, at the cost of a second forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from examples.cc3m.batches import Batch
from examples.cc3m.clock import Clock, Stamp
from examples.cc3m.features import Features
from examples.cc3m.generators import generator_states, restore_generators
from examples.cc3m.parallel import without_sync
from examples.cc3m.towers import SCALARS, Towers

Precision = Literal["fp32", "amp_bf16", "amp_fp16"]
DTYPES = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
Outputs = dict[str, Tensor]


@dataclass
class Watch:
    """When the loss's part of the last backward pass ended."""

    loss_done: Stamp


class Work(nn.Module):
    """All that uses parameters, behind one forward: the only call that DDP and FSDP2 watch.

    Args:
        towers: what is trained.
        clock: told what is the model's time and what the loss's.
    """

    def __init__(self, towers: Towers, clock: Clock) -> None:
        super().__init__()
        self.towers, self.clock, self.watch = towers, clock, Watch(clock.stamp())

    def forward(
        self, task: str, part: Batch, whole: Batch | None = None, cached: Outputs | None = None
    ) -> dict[str, Tensor]:
        """Tasks: "encode" a part; the "objective" of cached outputs of the whole; or both, "loss",
        with a last part's own outputs after the cached ones of the others."""
        outputs = cached or {}
        if task != "objective":
            with self.clock.span("model"):
                own = self.towers.encode(part)
            if task == "encode":
                return own
            self._watch(own)
            outputs = joined([cached, own]) if cached else own
        with self.clock.span("loss"):
            return self.towers.objective(outputs, part if whole is None else whole)

    def _watch(self, outputs: Outputs) -> None:
        def note(_: Tensor) -> None:
            self.watch.loss_done = self.clock.stamp()

        for name in ("image_features", "text_features"):
            if outputs[name].requires_grad:
                outputs[name].register_hook(note)  # type: ignore[no-untyped-call]


class Gradients:
    """Computes the gradient of a step.

    Args:
        own: all work.
        work: the same, as `parallel.distribute` returned it.
        device: where it computes.
        precision: of the model under autocast; the loss computes in float32 whatever it is.
        scaler: multiplies the loss before the backward pass, for float16.
    """

    def __init__(
        self,
        own: Work,
        work: nn.Module,
        device: torch.device,
        precision: Precision,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.work, self.clock, self.watch, self.scaler = work, own.clock, own.watch, scaler
        self.device, self.precision = device, precision

    def __call__(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Leave the gradient in the parameters; the loss's terms, detached."""
        cached, whole = None, parts[0]
        if len(parts) > 1:
            whole = joined_batch(parts)
            with without_sync(self.work):
                cached = self._spread(parts, whole)
        with self._autocast():
            terms = self.work("loss", parts[-1], whole, cached)
        self._backward(terms)
        return {name: value.detach() for name, value in terms.items()}

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = DTYPES.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _backward(self, terms: dict[str, Tensor]) -> None:
        start = self.clock.stamp()
        torch.autograd.backward(self.scaler.scale(torch.stack(list(terms.values())).sum()))
        self.clock.add("loss", start, self.watch.loss_done)
        self.clock.add("model", self.watch.loss_done, self.clock.stamp())

    def _spread(self, parts: Sequence[Batch], whole: Batch) -> Outputs:
        """Gradients of all parts but the last; their outputs, detached."""
        states, outputs = [], []
        with torch.no_grad(), self._autocast():
            for part in parts:
                states.append(generator_states())
                outputs.append(self.work("encode", part))
        leaves = joined(outputs)
        leaves = {k: v.detach().requires_grad_(k not in SCALARS) for k, v in leaves.items()}
        wanted = [k for k in leaves if k not in SCALARS]
        with self._autocast():
            terms = self.work("objective", parts[-1], whole, leaves)
        with self.clock.span("loss"):
            total = self.scaler.scale(torch.stack(list(terms.values())).sum())
            gradients = torch.autograd.grad(total, [leaves[k] for k in wanted], allow_unused=True)
        sizes = [len(part.images) for part in parts]
        pieces = {
            k: torch.split(g, sizes)
            for k, g in zip(wanted, gradients, strict=True)
            if g is not None
        }
        for i, part in enumerate(parts[:-1]):
            restore_generators(states[i])
            with self._autocast():
                again = self.work("encode", part)
            with self.clock.span("model"):
                names = [k for k in pieces if again[k].requires_grad]
                torch.autograd.backward([again[k] for k in names], [pieces[k][i] for k in names])
        restore_generators(states[-1])  # for the last part, which is encoded by the caller
        return joined(outputs[:-1])


def joined(outputs: Sequence[Outputs]) -> Outputs:
    """Outputs of parts as if of one batch; scalars, the same in all, are the last part's."""
    return {
        name: value if name in SCALARS else torch.cat([each[name] for each in outputs])
        for name, value in outputs[-1].items()
    }


def joined_batch(parts: Sequence[Batch]) -> Batch:
    """What an objective looks at: teacher features and the number and size of images."""
    teacher = None
    if parts[0].teacher is not None:
        of_parts = [part.teacher for part in parts if part.teacher is not None]
        teacher = Features(*map(torch.cat, zip(*of_parts, strict=True)))
    return replace(
        parts[-1],
        images=torch.cat([part.images for part in parts]),
        texts=torch.cat([part.texts for part in parts]),
        keys=[key for part in parts for key in part.keys],
        teacher=teacher,
    )

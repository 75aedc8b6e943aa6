"""Common parts of losses over the global batch: their options, the way from input to batch."""

from __future__ import annotations  # torch 2.9 cannot compile a "|" in a local function

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankloss.agreement import REFUSED, Message, agree
from rankloss.checks import as_scalar, check_features, check_ids
from rankloss.distributed import (
    ALONE,
    GlobalBatch,
    HoldsProcessGroup,
    Processes,
    gather_batch,
    gather_ids,
    rank_and_world_size,
    refuse_dtensor,
    scale_gradient,
)
from rankloss.fusion.precision import can_read


class GatherOptions(TypedDict, total=False):
    """Arguments of every loss over the global batch; see `GlobalBatchLoss`."""

    local_loss: bool
    gather_with_grad: bool
    accum_freq: int
    process_group: dist.ProcessGroup | None
    rank: int | None
    world_size: int | None


class Inputs(NamedTuple):
    """Checked input of a forward pass, that all processes agree to exchange.

    Attributes:
        processes: with whom.
        scale, bias: 0-D; bias None where there is none.
        image_ids, text_ids: (M,) of the global batch; None if not given, or known not to repeat.
        further: features of further kinds, by name, for a loss that compares such.
        local: the caller leaves other processes out, as for an evaluation.
    """

    processes: Processes
    scale: Tensor
    bias: Tensor | None
    image_ids: Tensor | None
    text_ids: Tensor | None
    further: Mapping[str, Tensor]
    local: bool

    @property
    def ids(self) -> list[Tensor]:
        """Ids that are given."""
        return [x for x in (self.image_ids, self.text_ids) if x is not None]


class GlobalBatchLoss(HoldsProcessGroup, nn.Module):
    """A loss that compares this process's pairs with those of a whole process group.

    Args:
        local_loss: each process scores its own anchors only; False scores the whole global batch
            on every process.
        gather_with_grad: gradients reach the features of other processes. Both True give the
            exact gradient of the global batch at any world size when gradients are averaged over
            the group, as DDP does; the other combinations are open_clip's and have its gradients.
        accum_freq: number of times this loss is called for one step, each time with all features
            of the step but gradient to one part of them: open_clip's `--accum-freq`. Gradients of
            logit scale, logit bias and the loss's own parameters are divided by it, since each
            call has all of them; open_clip's own are `accum_freq` times too large.
        process_group: processes that form the global batch. With data and tensor parallelism pass
            the data-parallel one, `mesh.get_group("dp")`. None takes all processes, looked up at
            each forward, or this one alone.
        rank, world_size: None takes the group's; given values must match.
    """

    def __init__(
        self,
        *,
        local_loss: bool = True,
        gather_with_grad: bool = True,
        accum_freq: int = 1,
        process_group: dist.ProcessGroup | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if accum_freq < 1:
            raise ValueError(f"accum_freq must be at least 1, got {accum_freq}")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.accum_freq, self.process_group = accum_freq, process_group
        self.rank, self.world_size = rank, world_size

    def gathered(self, images: Tensor, texts: Tensor, inputs: Inputs) -> GlobalBatch:
        """Gather both (n, D) feature batches, as `local_loss` and `gather_with_grad` say."""
        return gather_batch(
            images,
            texts,
            inputs.processes,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
        )

    def prepare(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        *,
        local: bool,
        embed_dim: int | None = None,
        further: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> Inputs:
        """Check the input, agree with the other processes on it, and gather the ids.

        Args:
            local: leave the other processes out.
            embed_dim: width that the features must have, or None.
            further: checks and returns further features that the loss exchanges.

        Raises:
            TypeError, ValueError: the input is wrong here, or does not fit that of the others.
        """
        processes = (
            ALONE if local else rank_and_world_size(self.rank, self.world_size, self.process_group)
        )

        more: dict[str, Tensor] = {}

        def check() -> tuple[Tensor, Tensor | None]:
            for name, x in (
                ("image_features", image_features),
                ("text_features", text_features),
                ("logit_scale", logit_scale),
                ("logit_bias", logit_bias),
            ):
                refuse_dtensor(name, x)
            check_features(image_features, text_features, embed_dim)
            check_ids(image_ids, "image_ids", image_features)
            check_ids(text_ids, "text_ids", image_features)
            more.update(further())
            scale = as_scalar("logit_scale", logit_scale, image_features)
            if logit_bias is None:
                return scale, None
            return scale, as_scalar("logit_bias", logit_bias, image_features)

        scale, bias = _telling_others(check, processes, image_features)
        if processes.group is not None and processes.world_size > 1:
            message = Message.about(
                [image_features, text_features, *more.values()],
                (image_ids, text_ids),
                gather_with_grad=self.gather_with_grad,
            )
            agree(message, processes.group, image_features.device)
        images, texts = map(repeated_ids, gather_ids((image_ids, text_ids), processes))
        part = 1 / self.accum_freq
        bias = None if bias is None else scale_gradient(bias, part)
        return Inputs(processes, scale_gradient(scale, part), bias, images, texts, more, local)


def repeated_ids(ids: Tensor | None) -> Tensor | None:
    """Return `ids` (M,), or None when none of them repeats, so that distinct ids cost nothing.

    Only ids on the CPU are looked at: elsewhere, as while compiling, that would wait for the
    device in every step, and costs more than the mask.

    >>> repeated_ids(torch.tensor([5, 3, -1, -1])) is None
    True
    """
    if ids is None or ids.device.type != "cpu" or not can_read(ids):
        return ids
    known = ids[ids >= 0]
    return ids if len(torch.unique(known)) < len(known) else None


def _telling_others(
    check: Callable[[], tuple[Tensor, Tensor | None]], processes: Processes, features: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Check this process's input; if that fails, other processes are told instead of waiting."""
    if processes.group is None or processes.world_size == 1 or torch.compiler.is_compiling():
        return check()
    try:
        return check()
    except (TypeError, ValueError):
        with suppress(ValueError, RuntimeError):  # the error to report is the one at hand
            agree(REFUSED, processes.group, features.device)
        raise

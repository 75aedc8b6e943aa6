"""Gathering the global batch with gradient, and who owns which anchors.

Gradients follow the convention of DistributedDataParallel, which averages parameter gradients
over processes: with each process's loss the mean over its own anchors and the gather passing
gradients back, that average is the gradient of the single-process, global-batch loss.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Processes(NamedTuple):
    """This process's number and how many there are."""

    rank: int
    world_size: int


class GlobalBatch(NamedTuple):
    """Anchors this process scores, and the candidates they are scored against.

    Attributes:
        image_anchors, text_anchors: (N, D).
        images, texts: (M, D), all processes' embeddings in rank order.
        labels: (N,) int64, the column of each anchor's match among the M candidates.
    """

    image_anchors: Tensor
    text_anchors: Tensor
    images: Tensor
    texts: Tensor
    labels: Tensor

    def in_full_precision(self) -> "GlobalBatch":
        """Features in float32, float64 if given so; once, so that their gradients add up in it."""
        dtype = torch.promote_types(self.images.dtype, self.texts.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        images, texts = self.images.to(dtype), self.texts.to(dtype)
        if self.image_anchors is self.images:
            return GlobalBatch(images, texts, images, texts, self.labels)
        anchors = self.image_anchors.to(dtype), self.text_anchors.to(dtype)
        return GlobalBatch(*anchors, images, texts, self.labels)


def processes(rank: int | None, world_size: int | None) -> Processes:
    """The process group's rank and size, or 0 and 1 without one; given values must match it.

    Raises:
        ValueError: `rank` or `world_size` contradict the process group.
    """
    active = dist.is_available() and dist.is_initialized()
    actual = Processes(dist.get_rank(), dist.get_world_size()) if active else Processes(0, 1)
    given = Processes(
        actual.rank if rank is None else rank,
        actual.world_size if world_size is None else world_size,
    )
    if given != actual:
        group = "the process group has" if active else "there is no process group, so"
        raise ValueError(
            f"loss built with rank={rank}, world_size={world_size}, but {group} "
            f"rank={actual.rank}, world_size={actual.world_size}; leave both at None, or call "
            "torch.distributed.init_process_group first"
        )
    return actual


def gather_batch(
    image_features: Tensor,
    text_features: Tensor,
    group: Processes,
    *,
    local_loss: bool,
    gather_with_grad: bool,
) -> GlobalBatch:
    """Gather both (n, D) feature batches from every process.

    local_loss: anchors are this process's n pairs against all M = world_size * n candidates;
        otherwise every process scores all M against all M.
    gather_with_grad: gradients reach the other processes' features. Without it, and with
        local_loss=False, this process's own rows still carry gradient (open_clip's default, whose
        tower gradients are 1/world_size of the exact ones).

    Raises:
        ValueError: processes hold different numbers of pairs (on every process, at once).
    """
    n, device = image_features.shape[0], image_features.device
    if group.world_size == 1:
        labels = torch.arange(n, device=device)
        return GlobalBatch(image_features, text_features, image_features, text_features, labels)
    check_even(n, group, device)
    mine = slice(group.rank * n, (group.rank + 1) * n)
    images, texts = (
        _gather_features(x, mine, local_loss, gather_with_grad)
        for x in (image_features, text_features)
    )
    if local_loss:
        labels = torch.arange(mine.start, mine.stop, device=device)
        return GlobalBatch(image_features, text_features, images, texts, labels)
    labels = torch.arange(images.shape[0], device=device)
    return GlobalBatch(images, texts, images, texts, labels)


def gather_ids(ids: Tensor, group: Processes) -> Tensor:
    """(n,) ids of this process -> (M,) ids of all, in rank order."""
    return ids if group.world_size == 1 else _all_gather(ids.detach())


def gather_with_gradient(x: Tensor, group: Processes) -> Tensor:
    """Every process's (n, ...) rows, in rank order, passing gradients back to each of them.

    Raises:
        ValueError: processes hold different numbers of rows.
    """
    if group.world_size == 1:
        return x
    check_even(x.shape[0], group, x.device)
    gathered: Tensor = _Gather.apply(x)
    return gathered


def check_even(n: int, group: Processes, device: torch.device) -> None:
    """Compare batch sizes before anything of that size is exchanged, which could hang.

    On the CPU every process raises ValueError (RuntimeError under torch.compile). On a GPU a
    device-side assertion stops every process without a synchronisation in each step.
    """
    sizes = _all_gather(torch.full((1,), n, dtype=torch.int64, device=device))
    message = "every process must hold the same number of pairs; use drop_last=True in the loader"
    if device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((sizes == n).all(), message)
    elif not bool((sizes == n).all()):
        raise ValueError(f"uneven local batches {sizes.tolist()}: {message}")


def _gather_features(
    features: Tensor, mine: slice, local_loss: bool, gather_with_grad: bool
) -> Tensor:
    if gather_with_grad:
        gathered: Tensor = _Gather.apply(features)
        return gathered
    gathered = _all_gather(features.detach())
    if not local_loss:
        gathered = torch.cat([gathered[: mine.start], features, gathered[mine.stop :]])
    return gathered


# ---------------------------------------------------------------- collectives


class _Gather(torch.autograd.Function):
    """Every process's (n, ...) -> (M, ...) in rank order. Its transpose is `_ScatterSum`."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _ScatterSum.apply(grad)


class _ScatterSum(torch.autograd.Function):
    """Every process's (M, ...) -> this process's (n, ...) rows, summed over processes."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _reduce_scatter(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Gather.apply(grad)


# Newer versions of torch have the first name, and warn about the second. The group is spelled out
# for the compilers of older versions.


def _all_gather(x: Tensor) -> Tensor:
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gathered = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
    collective(gathered, x.contiguous(), group=dist.group.WORLD)
    return gathered


def _reduce_scatter(x: Tensor) -> Tensor:
    """Sums in float32 at least, so that half-precision gradients are rounded once."""
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    summed = wide.new_empty(x.shape[0] // dist.get_world_size(), *x.shape[1:])
    collective(summed, wide, group=dist.group.WORLD)
    return summed.to(x.dtype)

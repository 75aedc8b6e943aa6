"""Gathering the global batch of a process group with gradient, and who owns which anchors.

Gradients follow the convention of DistributedDataParallel, which averages parameter gradients
over processes: with each process's loss the mean over its own anchors and the gather passing
gradients back, that average is the gradient of the single-process, global-batch loss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rankloss.agreement import Message, agree
from rankloss.fusion.precision import full_dtype


class Processes(NamedTuple):
    """The processes whose batches form the global batch.

    Attributes:
        rank: this process's number among them.
        world_size: how many there are.
        group: their process group; None where this process works alone.
    """

    rank: int
    world_size: int
    group: dist.ProcessGroup | None = None


ALONE = Processes(0, 1)


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
        dtype = full_dtype(self.images, self.texts)
        images, texts = self.images.to(dtype), self.texts.to(dtype)
        if self.image_anchors is self.images:
            return GlobalBatch(images, texts, images, texts, self.labels)
        anchors = self.image_anchors.to(dtype), self.text_anchors.to(dtype)
        return GlobalBatch(*anchors, images, texts, self.labels)


# ---------------------------------------------------------------- which processes


def rank_and_world_size(
    rank: int | None = None,
    world_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Processes:
    """Look up this process's number in a process group, and the group's size.

    Args:
        rank, world_size: expectations; None takes the group's.
        process_group: None takes WORLD's, or this process alone (0 of 1) where there is none.

    Raises:
        TypeError: `process_group` is no process group.
        ValueError: `rank` or `world_size` contradict the group, this process is not in it, or it
            was lost (see `HoldsProcessGroup`).

    >>> rank_and_world_size()  # no process group here
    Processes(rank=0, world_size=1, group=None)
    """
    active = dist.is_available() and dist.is_initialized()
    if process_group is not None:
        _check_group(process_group, active)
    actual = ALONE
    if active:
        group = dist.group.WORLD if process_group is None else process_group
        actual = Processes(dist.get_rank(group), dist.get_world_size(group), group)
    expected = (
        actual.rank if rank is None else rank,
        actual.world_size if world_size is None else world_size,
    )
    if expected != (actual.rank, actual.world_size):
        found = "the process group has" if active else "there is no process group, so"
        raise ValueError(
            f"loss built with rank={rank}, world_size={world_size}, but {found} "
            f"rank={actual.rank}, world_size={actual.world_size}; leave both at None, or call "
            "torch.distributed.init_process_group first"
        )
    return actual


def _check_group(group: object, active: bool) -> None:
    if isinstance(group, _GroupReference):
        raise ValueError(
            "this loss was pickled with a process group, which a file cannot hold; set "
            "loss.process_group again, to None for all processes"
        )
    if not active:
        raise ValueError(
            "loss built with process_group=, but torch.distributed is not initialized; pass "
            "local=True to forward, or set loss.process_group = None"
        )
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"process {dist.get_rank()} is not in the process_group its loss was built with; give "
            "each process the group that it is in, e.g. mesh.get_group('dp')"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}; "
            "of a DeviceMesh, pass mesh.get_group('dp')"
        )


def refuse_dtensor(name: str, value: object) -> None:
    """Raise TypeError for a DTensor, which says how it is spread but not among whose pairs."""
    # its class takes a second to import; a traced float has no attributes
    placements = getattr(value, "placements", None) if isinstance(value, Tensor) else None
    if placements is not None:
        raise TypeError(
            f"{name} is a DTensor with placements {placements}; pass {name}.to_local() "
            f"where each process of process_group holds pairs of its own, else "
            f"{name}.full_tensor()"
        )


class HoldsProcessGroup:
    """A mixin for modules with a `process_group` attribute, which torch can neither copy nor save.

    `copy.deepcopy` shares the group. Pickle leaves it behind, and a module that had one refuses to
    run until `process_group` is set again, rather than take all processes instead.
    """

    process_group: dist.ProcessGroup | None

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if isinstance(state["process_group"], dist.ProcessGroup):
            state["process_group"] = _GroupReference(state["process_group"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        reference = state.get("process_group")
        if isinstance(reference, _GroupReference) and reference.group is not None:
            state = {**state, "process_group": reference.group}
        parent: Any = super()
        parent.__setstate__(state)


class _GroupReference:
    """A process group on its way into a copy: deepcopy shares it, pickle loses it."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> "_GroupReference":
        return self

    def __reduce__(self) -> tuple[type["_GroupReference"], tuple[()]]:
        return _GroupReference, ()


# ---------------------------------------------------------------- gathering


def gather_batch(
    image_features: Tensor,
    text_features: Tensor,
    processes: Processes,
    *,
    local_loss: bool,
    gather_with_grad: bool,
) -> GlobalBatch:
    """Gather both (n, D) feature batches from every process, which must have agreed on n and D.

    local_loss: anchors are this process's n pairs against all M = world_size * n candidates;
        otherwise every process scores all M against all M.
    gather_with_grad: gradients reach the other processes' features. Without it, and with
        local_loss=False, this process's own rows still carry gradient (open_clip's default, whose
        tower gradients are 1/world_size of the exact ones).
    """
    images, texts = (
        gather_features(x, processes, local_loss=local_loss, gather_with_grad=gather_with_grad)
        for x in (image_features, text_features)
    )
    n, device = len(image_features), image_features.device
    if local_loss and processes.world_size > 1:
        start = processes.rank * n
        labels = torch.arange(start, start + n, device=device)
        return GlobalBatch(image_features, text_features, images, texts, labels)
    labels = torch.arange(len(images), device=device)
    return GlobalBatch(images, texts, images, texts, labels)


def gather_features(
    features: Tensor, processes: Processes, *, local_loss: bool, gather_with_grad: bool
) -> Tensor:
    """Gather every process's (n, D) rows in rank order, all of one n; see `gather_batch`."""
    if processes.world_size == 1:
        return features
    if gather_with_grad:
        return _gather(features, processes.group)
    gathered = _all_gather(features.detach(), processes.group)
    if not local_loss:
        start = processes.rank * len(features)
        after = gathered[start + len(features) :]
        gathered = torch.cat([gathered[:start], features, after])
    return gathered


def gather_ids(ids: Sequence[Tensor | None], processes: Processes) -> list[Tensor | None]:
    """Gather (n,) ids to (M,), in rank order; one collective for all that are not None."""
    given = [x.detach().long() for x in ids if x is not None]
    if processes.world_size == 1 or not given:
        return list(ids)
    columns = iter(_all_gather(torch.stack(given, 1), processes.group).unbind(1))
    return [None if x is None else next(columns) for x in ids]


def gather_with_gradient(x: Tensor, processes: Processes) -> Tensor:
    """Gather every process's (n, ...) rows in rank order, passing gradients back to each of them.

    Raises:
        ValueError: processes hold different numbers of rows, widths or dtypes (on every process).

    >>> gather_with_gradient(torch.ones(2, 3), rank_and_world_size()).shape
    torch.Size([2, 3])
    """
    if processes.group is None or processes.world_size == 1:
        return x
    agree(Message.about([x], gather_with_grad=True), processes.group, x.device)
    return _gather(x, processes.group)


# ---------------------------------------------------------------- gradients


class _ScaledGradient(torch.autograd.Function):
    """The tensor itself, whose gradient is multiplied by a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, with its gradient multiplied by `factor` on the way back."""
    scaled: Tensor = x if factor == 1 else _ScaledGradient.apply(x, factor)
    return scaled


class _Exchange(torch.autograd.Function):
    """A gather of all processes' rows, or the sum of everyone's share of mine: transposes."""

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup, scatter: bool) -> Tensor:
        return _reduce_scatter(x, group) if scatter else _all_gather(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.group, ctx.scatter = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Exchange.apply(grad, ctx.group, not ctx.scatter), None, None


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every process's (n, ...) -> (M, ...) in rank order; gradients go back to each of them."""
    gathered: Tensor = _Exchange.apply(x, group, False)
    return gathered


# Newer versions of torch have the first name, and warn about the second.


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every process's (n, ...) -> (M, ...) in rank order."""
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gathered = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    collective(gathered, x.contiguous(), group=group)
    return gathered


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every process's (M, ...) -> this process's (n, ...) rows, summed over processes.

    Sums are float32's at least, so that half-precision gradients are rounded once.
    """
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    summed = wide.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    collective(summed, wide, group=group)
    return summed.to(x.dtype)

"""Processes that train one model together: torchrun's, with DDP or FSDP2, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples.cc3m.files import UserError

Sharding = Literal["ddp", "fsdp2"]
PROCESSOR = torch.device("cpu")
TIMEOUT = timedelta(minutes=30)
"""Of a collective; the others wait that long while the first process evaluates."""


@dataclass(frozen=True)
class Parallel:
    """This process among all.

    Args:
        rank, world_size: of all processes.
        device: where this one computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = PROCESSOR

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, *flags: bool) -> list[bool]:
        """Each flag is true if it is in any process. Every process must ask at the same place."""
        if self.world_size == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.int32)  # on the processor: no GPU has to wait
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return [bool(flag) for flag in shared]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor on the processor, of every process; the shapes must agree."""
        if self.world_size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor.contiguous())
        return gathered

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Over processes, which must have the same names."""
        rows = self.gather(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, torch.stack(rows).mean(0).tolist(), strict=True))


@contextmanager
def running(device: str = "auto") -> Iterator[Parallel]:
    """The processes that torchrun started, or this one alone.

    Args:
        device: "cpu", "cuda", or "auto": CUDA if there is any.

    Raises:
        UserError: CUDA is wanted, and there is no such GPU for this process.
    """
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    where = _device(device, local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    started = world > 1 and not dist.is_initialized()
    if started:  # processor tensors always go over gloo: flags, positions, generators
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Parallel(rank, world, where)
    finally:
        if started:
            dist.destroy_process_group()


def _device(wanted: str, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and local_rank >= count:
        raise UserError(
            f"--device cuda, but process {local_rank} of this machine has no GPU ({count} found); "
            "start as many processes as there are GPUs, or pass --device cpu"
        )
    if wanted == "cuda" or (wanted == "auto" and count > local_rank):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def distribute(module: nn.Module, parallel: Parallel, sharding: Sharding) -> nn.Module:
    """Let processes share a module's gradients (DDP) or also its parameters (FSDP2).

    Parameters must be equal in every process already. FSDP2 shards in place: each block of a
    Transformer is a unit, all else is another; scalars become tensors of one element, and no memory
    layout but the contiguous one stays.
    """
    if parallel.world_size == 1:
        return module
    if sharding == "ddp":
        ids = [parallel.device.index] if parallel.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.dim() == 0 or not parameter.is_contiguous():
                plain = parameter.detach().contiguous()
                setattr(part, name, nn.Parameter(plain.reshape(plain.shape or (1,))))
    mesh = init_device_mesh(parallel.device.type, (parallel.world_size,))
    for name, part in list(module.named_modules()):
        if name.endswith("resblocks"):
            for block in part.children():
                fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


@contextmanager
def without_sync(module: nn.Module) -> Iterator[None]:
    """Gradients of what runs here add up in each process, to be shared in a later backward."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield

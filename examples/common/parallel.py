"""Processes that train one model together (torchrun's, with DDP or FSDP2), and how they stop."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples.common.files import UserError

Sharding = Literal["ddp", "fsdp2"]
CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=30)
"""Longest wait for another process in a collective; no part of a run is as long as that."""


@dataclass(frozen=True)
class Parallel:
    """This process among all.

    Args:
        rank, world_size: this process's number, and how many there are.
        device: where this one computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, *flags: bool) -> list[bool]:
        """Return for each flag if it is set in any process. All must ask at the same place."""
        if self.world_size == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.int32)  # on the CPU: no GPU has to wait
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return [bool(flag) for flag in shared]

    def gather(self, mine: Any) -> list[Any]:
        """Return a picklable object of every process, by rank."""
        if self.world_size == 1:
            return [mine]
        everyones: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyones, mine)
        return everyones

    def same_for_all(self, value: Any) -> Any:
        """Return the first process's picklable object in every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Average over processes, which must have the same names."""
        rows = self.gather(list(values.values()))
        means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        return dict(zip(values, means, strict=True))

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers; running statistics are each one's own."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def together(self, error: Exception | None) -> None:
        """Raise in every process if one of them has an error.

        Raises:
            UserError: this process's error, or the first one of the others.
        """
        told = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise UserError(f"process {rank}: {text}")


@contextmanager
def running(device: str = "auto") -> Iterator[Parallel]:
    """Join the processes that torchrun or srun started, or be this one alone.

    Args:
        device: "cpu", "cuda", or "auto": CUDA if there is any.

    Raises:
        UserError: CUDA is wanted, and there is no such GPU for this process.
    """
    _read_slurm()
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    where = _device(device, local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    started = world > 1 and not dist.is_initialized()
    if started:  # tensors on the CPU always go over gloo: flags, positions, generators
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    yield Parallel(rank, world, where)
    if started:  # not after an error: the others may never come to take part
        dist.destroy_process_group()


def _read_slurm() -> None:
    """Take what srun says of the processes where torchrun has said nothing."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) == 1:
        return
    if "MASTER_ADDR" not in os.environ:
        return  # an sbatch script that does not start us by srun
    for ours, theirs in (
        ("RANK", "SLURM_PROCID"),
        ("WORLD_SIZE", "SLURM_NTASKS"),
        ("LOCAL_RANK", "SLURM_LOCALID"),
    ):
        os.environ[ours] = os.environ[theirs]
    os.environ.setdefault("MASTER_PORT", "29500")


def _device(wanted: str, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return CPU
    if local_rank >= count:
        raise UserError(
            f"--device {wanted}, but process {local_rank} of this machine has no GPU ({count} "
            "found); start as many processes as there are GPUs, or pass --device cpu"
        )
    return torch.device("cuda", local_rank)


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
                shaped, trained = plain.reshape(plain.shape or (1,)), parameter.requires_grad
                setattr(part, name, nn.Parameter(shaped, requires_grad=trained))
    mesh = init_device_mesh(parallel.device.type, (parallel.world_size,))
    for name, part in list(module.named_modules()):
        if name.endswith("resblocks"):
            for block in part.children():
                fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


# ---------------------------------------------------------------- random generators


def seed_generators(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Seed Python's and torch's CPU generators from a name, and put them back afterwards."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
    python, generator = random.getstate(), torch.default_generator
    state = generator.get_state()
    random.seed(seed)
    generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        generator.set_state(state)


def generator_states() -> dict[str, Tensor]:
    """Return the states of Python's, numpy's and torch's generators as tensors."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()  # noqa: NPY002
    _, keys, place, has_gauss, cached = numpy
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    """Put back what `generator_states` returned; a GPU's state only where there is a GPU."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    has_one, gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_one else None))
    *keys, place, has_gauss = states["numpy"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss)
    np.random.set_state((*state, float(states["numpy_gauss"])))  # noqa: NPY002
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

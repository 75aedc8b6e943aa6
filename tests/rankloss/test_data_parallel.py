"""The usual ways to train on several processes, each equal to one process with the whole batch."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rankloss import ClipLoss
from rankloss.grad_cache import GradCache
from tests.helpers.processes import ProcessGroup
from tests.helpers.towers import (
    Batch,
    FeatureTowers,
    Gradients,
    Towers,
    assert_same,
    make_batch,
    with_duplicates,
)

Way = Callable[[nn.Module], tuple[nn.Module, int, int]]  # wrapped model, share of the batch


def build(outside: bool = False) -> Towers:
    """Towers of order 3; FSDP2 wants a scale of one element, not a scalar."""
    model = (FeatureTowers if outside else Towers)({"order": 3, "share_transitions": False})
    model.log_scale = nn.Parameter(model.log_scale.detach().reshape(1))
    return model


def shard(model: nn.Module, **options: Any) -> None:
    """Shard the loss as a unit of its own, each tower as one, and what is left."""
    for unit in ("loss", "image", "text"):
        fully_shard(getattr(model, unit), **options)
    fully_shard(model, **options)


def ddp(model: nn.Module) -> tuple[nn.Module, int, int]:
    return DistributedDataParallel(model), dist.get_rank(), dist.get_world_size()


def fsdp2(model: nn.Module) -> tuple[nn.Module, int, int]:
    shard(model)
    return model, dist.get_rank(), dist.get_world_size()


def hybrid(model: nn.Module) -> tuple[nn.Module, int, int]:
    """Replicate over one dimension of a mesh and shard over the other; all hold other pairs."""
    shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return model, dist.get_rank(), dist.get_world_size()


def two_dimensional(model: nn.Module) -> tuple[nn.Module, int, int]:
    """Shard over data; tensor-parallel neighbours hold the same pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    shard(model, mesh=mesh["dp"])
    loss: Any = model.loss
    loss.process_group = mesh.get_group("dp")
    return model, mesh.get_local_rank("dp"), 2


WAYS: dict[str, tuple[Way, int]] = {
    "ddp": (ddp, 2),
    "fsdp2": (fsdp2, 2),
    "hybrid": (hybrid, 4),
    "two-dimensional": (two_dimensional, 4),
}
each_way = pytest.mark.parametrize("way", WAYS)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_gradients(model: Towers) -> Gradients:
    return {name: whole(x) for name, x in model.gradients().items()}


def trained(way: str, batch: Batch, outside: bool) -> list[tuple[Tensor, Gradients]]:
    """Loss and gradients of two steps, the loss inside the model's forward or after it."""
    model = build(outside)
    parallel, rank, world = WAYS[way][0](model)
    part = {name: x.chunk(world)[rank] for name, x in batch.items()}
    results = []
    for _ in range(2):
        model.zero_grad()
        if outside:
            inputs = {name: part[name] for name in ("images", "texts")}
            ids = {name: part[name] for name in ("image_ids", "text_ids")}
            value = model.loss(**parallel(**inputs), **ids)
        else:
            value = parallel(**part)
        value.backward()
        results.append((value.detach(), whole_gradients(model)))
    return results


def expected(batch: Batch) -> tuple[Tensor, Gradients]:
    model = build()
    value = model(**batch)
    value.backward()
    return value.detach(), model.gradients()


@pytest.mark.parametrize("outside", [False, True])
@each_way
def test_training_is_that_of_one_process(
    groups: dict[int, ProcessGroup], way: str, outside: bool
) -> None:
    batch = with_duplicates(make_batch())
    value, gradients = expected(batch)
    for steps in zip(*groups[WAYS[way][1]].run(trained, way, batch, outside), strict=True):
        torch.testing.assert_close(torch.stack([x for x, _ in steps]).mean(), value)
        for _, actual in steps:
            assert_same(actual, gradients)


def cached(way: str, batch: Batch) -> list[Gradients]:
    model = build(outside=True)
    parallel, rank, world = WAYS[way][0](model)
    part = {name: x.chunk(world)[rank] for name, x in batch.items()}
    step = GradCache(lambda x: parallel(*x), model.loss, modules=[parallel])
    pieces = list(zip(part["images"].chunk(3), part["texts"].chunk(3), strict=True))
    results = []
    for _ in range(2):
        model.zero_grad()
        step(pieces)
        results.append(whole_gradients(model))
    return results


@each_way
def test_cached_gradients_are_those_of_one_process(
    groups: dict[int, ProcessGroup], way: str
) -> None:
    batch = make_batch()
    _, gradients = expected(batch)
    for results in groups[WAYS[way][1]].run(cached, way, batch):
        for actual in results:
            assert_same(actual, gradients)


def in_half_precision(batch: Batch) -> tuple[torch.dtype, torch.dtype, Tensor, Gradients]:
    """Parameters, features and scale in bfloat16, with FSDP2's autocast off."""
    model = build(outside=True).float()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    rank, world = dist.get_rank(), dist.get_world_size()
    outputs = model(**{name: x.chunk(world)[rank].float() for name, x in batch.items()})
    value = model.loss(**outputs)
    value.backward()
    dtype, scale = outputs["image_features"].dtype, outputs["logit_scale"]
    assert scale.shape == (1,)
    return dtype, scale.dtype, value.detach(), whole_gradients(model)


def test_half_precision_under_fsdp2(groups: dict[int, ProcessGroup]) -> None:
    """Against one process with all parameters and inputs in bfloat16."""
    batch = make_batch()
    one = build(outside=True).bfloat16()
    value = one.loss(**one(**{name: x.bfloat16() for name, x in batch.items()}))
    value.backward()
    gradients = {name: x.double() for name, x in one.gradients().items()}
    results = groups[2].run(in_half_precision, batch)
    mean = torch.stack([x[2] for x in results]).mean()
    torch.testing.assert_close(mean, value.detach(), rtol=1e-2, atol=0)
    for features, scale, own, actual in results:
        assert (features, scale, own.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        for name, x in actual.items():
            error = (x.double() - gradients[name]).norm()
            assert error < 0.05 * gradients[name].norm(), name


def compiled_over_a_group(features: Tensor) -> None:
    torch._dynamo.reset()
    warnings.resetwarnings()  # the compiler causes some of its own
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    loss = ClipLoss(process_group=mesh.get_group("dp"), accum_freq=2)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ids = torch.arange(len(features)) // 2
    part = features + 0.1 * mesh.get_local_rank("dp")
    results = []
    for each in (loss, compiled):
        x = F.normalize(part, dim=1).requires_grad_()
        scale = torch.tensor(5.0, requires_grad=True, dtype=x.dtype)
        value = each(x, x.detach(), scale, image_ids=ids, text_ids=ids)
        results.append([value, *torch.autograd.grad(value, (x, scale))])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=0, atol=1e-12)


def test_compiled_over_a_group(groups: dict[int, ProcessGroup]) -> None:
    groups[2].run(compiled_over_a_group, torch.randn(4, 7, dtype=torch.float64))

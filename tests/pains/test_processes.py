"""Pains of training in several processes, and what happens here instead.

Each is described in docs/troubleshooting.md under the name of its test.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from rankloss import CyCLIPLoss, HighOrderPLLoss, SigLipLoss, attach
from rankloss.grad_cache import GradCache
from tests.helpers.processes import ProcessGroup

PAIRS = 8
LOSSES: dict[str, Any] = {
    "order 3": lambda: HighOrderPLLoss(6, 3, transition_dim=4),
    "siglip": SigLipLoss,
    "cyclip": CyCLIPLoss,
}


class Model(nn.Module):
    """Two linear towers with a loss attached."""

    def __init__(self, name: str = "order 3") -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Linear(d, 6) for d in (4, 5))
        self.rank_loss: Any
        attach(self, LOSSES[name]())
        self.double()
        for i, p in enumerate(self.parameters()):
            nn.init.normal_(p, generator=torch.Generator().manual_seed(i))

    def encode(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        pair = [normalize(f(x), dim=1) for f, x in zip(self.towers, (images, texts), strict=True)]
        return {"image_features": pair[0], "text_features": pair[1]}

    def forward(self, images: Tensor, texts: Tensor, **options: Any) -> Tensor:
        value: Tensor = self.rank_loss(**self.encode(images, texts), logit_scale=10.0, **options)
        return value


def share(rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    data = [torch.randn(PAIRS, d, generator=generator).double() for d in (4, 5)]
    return data[0].chunk(world_size)[rank], data[1].chunk(world_size)[rank]


def mine() -> tuple[Tensor, Tensor]:
    return share(dist.get_rank(), dist.get_world_size())


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def under_ddp(name: str) -> list[Tensor]:
    model = DistributedDataParallel(Model(name))
    model(*mine()).backward()
    return gradients(model)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_do_not_depend_on_the_number_of_processes(two: ProcessGroup, name: str) -> None:
    model = Model(name)
    model(*share()).backward()
    for found in two.run(under_ddp, name):
        assert_close(found, gradients(model))


def one_step() -> tuple[bool, list[Tensor]]:
    """Say if the loss's parameters moved, and to where, from unlike starts."""
    model = Model()
    start = list(model.rank_loss.parameters())
    for p in start:
        nn.init.normal_(p, generator=torch.Generator().manual_seed(dist.get_rank()))
    wrapped = DistributedDataParallel(model)
    before = [p.detach().clone() for p in start]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    wrapped(*mine()).backward()
    optimizer.step()
    after = [p.detach() for p in start]
    return not any(map(torch.equal, before, after)), after


def test_parameters_of_the_loss_are_equal_on_every_process(two: ProcessGroup) -> None:
    (moved, first), (_, second) = two.run(one_step)
    assert moved
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def uneven() -> str:
    n = 3 + dist.get_rank()
    with pytest.raises(ValueError, match="drop_last=True") as error:
        Model()(*(x[:n] for x in share()))
    return str(error.value)


def test_uneven_batches_are_an_error_on_every_process(two: ProcessGroup) -> None:
    assert len(two.run(uneven)) == 2


def ids_on_one() -> str:
    ids = torch.arange(4) if dist.get_rank() == 0 else None
    with pytest.raises(ValueError, match="ids") as error:
        Model()(*mine(), text_ids=ids)
    return str(error.value)


def test_ids_on_some_processes_are_an_error_on_every_process(two: ProcessGroup) -> None:
    assert len(two.run(ids_on_one)) == 2


IDS = torch.tensor([0, 1, 2, 3, 3, 5, 0, 7])  # matches across and within the shares


def with_ids() -> float:
    ids = IDS.chunk(dist.get_world_size())[dist.get_rank()]
    return float(Model()(*mine(), text_ids=ids).detach())


def test_gathered_ids_mark_the_right_pairs(two: ProcessGroup) -> None:
    expected = float(Model()(*share(), text_ids=IDS).detach())
    assert float(Model()(*share()).detach()) != pytest.approx(expected)
    values = two.run(with_ids)
    assert sum(values) / 2 == pytest.approx(expected)


def cached() -> tuple[list[Tensor], int]:
    """Gradients of four parts, and how often DistributedDataParallel reduced a bucket."""
    model = Model()
    wrapped = DistributedDataParallel(model)
    reduced = []

    def count(
        state: Any,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.index())
        group: Any = dist.group.WORLD
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, count)
    images, texts = mine()
    parts = [{"images": images[i, None], "texts": texts[i, None]} for i in range(len(images))]
    model.forward = model.encode  # type: ignore[method-assign, assignment]

    def loss(**features: Tensor) -> Tensor:
        value: Tensor = model.rank_loss(**features, logit_scale=10.0)
        return value

    GradCache(lambda part: wrapped(**part), loss, modules=[wrapped])(parts)
    return gradients(model), len(reduced)


def test_cached_gradients_cross_processes_once_a_step(two: ProcessGroup) -> None:
    model = Model()
    model(*share()).backward()
    for found, reductions in two.run(cached):
        assert_close(found, gradients(model))
        assert reductions == 1


def spread_features() -> None:
    images, texts = mine()
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(TypeError, match=r"image_features is a DTensor.*pass \S+\.to_local\(\)"):
        SigLipLoss()(distribute_tensor(images, mesh, [Shard(0)]), texts, 10.0)


def test_distributed_tensors_are_refused(two: ProcessGroup) -> None:
    two.run(spread_features)


def evaluate_on_first() -> float | None:
    if dist.get_rank():
        return None
    with torch.no_grad():
        return float(Model()(*mine(), local=True))


def test_one_process_can_evaluate_alone(two: ProcessGroup) -> None:
    value, none = two.run(evaluate_on_first)
    assert none is None
    assert value == pytest.approx(float(Model()(*share(0, 2)).detach()))


def test_evaluation_needs_no_process_group_after_training_with_one(tmp_path: Any) -> None:
    model = Model()
    dist.init_process_group(
        "gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1
    )
    try:
        before = float(model(*share()).detach())
    finally:
        dist.destroy_process_group()
    assert float(model(*share()).detach()) == before

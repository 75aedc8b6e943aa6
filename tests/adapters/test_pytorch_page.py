"""The functions that docs/codebases/pytorch.md shows for FSDP2 and meshes, in two processes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.helpers.processes import ProcessGroup

PAGE = Path(__file__).parents[2] / "docs" / "codebases" / "pytorch.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="tests run outside the checkout")


def page() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if "for images, texts in" not in block:  # a step of one process
            exec(block, names)
    return names


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 20, generator=generator)


def build(names: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = names["Model"]()
    model.logit_scale = torch.nn.Parameter(torch.tensor([2.659]))
    names["attach"](model, names["HighOrderPLLoss"](embed_dim=16, order=3))
    for p in model.rank_loss.parameters():
        torch.nn.init.normal_(p)
    return model


def sharded() -> tuple[float, Tensor]:
    names = page()
    model = names["shard"](build(names), init_device_mesh("cpu", (2,)))
    loss = model(*(x.chunk(2)[dist.get_rank()] for x in data()))
    loss.backward()
    gradient = model.rank_loss.transition_heads[0].key_weight.grad
    assert isinstance(gradient, DTensor)
    return float(loss.detach()), gradient.full_tensor()


def test_fsdp2(two: ProcessGroup) -> None:
    model = build(page())
    loss = model(*data())
    loss.backward()
    (a, gradient), (b, _) = two.run(sharded)
    assert (a + b) / 2 == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = model.rank_loss.transition_heads[0].key_weight.grad
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def tensor_parallel() -> float:
    """Both processes hold the same pairs: each is a data-parallel group of its own."""
    names = page()
    loss = names["loss_of"](init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")))
    features = torch.nn.functional.normalize(torch.ones(2, 4, 16).tril(), dim=2)
    return float(loss(features[0], features[1], 10.0).detach())


def test_tensor_parallel_neighbours_are_no_negatives(two: ProcessGroup) -> None:
    names = page()
    features = torch.nn.functional.normalize(torch.ones(2, 4, 16).tril(), dim=2)
    alone = names["HighOrderPLLoss"](embed_dim=16, order=3)(features[0], features[1], 10.0)
    for value in two.run(tensor_parallel):
        assert value == pytest.approx(float(alone.detach()))

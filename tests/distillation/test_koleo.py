"""KoLeoLoss: definition, known values, neighbours, groups, processes."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankloss import KoLeoLoss
from tests.helpers.distillation_loops import (
    gradient,
    permutations,
    random_features,
    spread_of_coinciding,
    value_and_gradient,
)
from tests.helpers.distillation_loops import koleo as koleo_by_loops
from tests.helpers.processes import ProcessGroup

# ---------------------------------------------------------------- definition


@settings(max_examples=40)
@given(
    n=st.integers(1, 7),
    width=st.integers(2, 5),
    top_k=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_equals_the_loops(n: int, width: int, top_k: int, seed: int) -> None:
    x = random_features(n, width, seed=seed)
    value, d_x = value_and_gradient(KoLeoLoss(top_k), x)
    leaf = x.requires_grad_()
    expected = koleo_by_loops(leaf, top_k)
    torch.testing.assert_close(value, expected.detach())
    if n > 1:  # alone, its own neighbour: the gradients to both cancel to rounding of 1e8
        torch.testing.assert_close(d_x, gradient(expected, leaf), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("group_size", [None, 4])
def test_gradcheck(group_size: int | None, top_k: int) -> None:
    x = random_features(8, 3).requires_grad_()
    loss = KoLeoLoss(top_k, group_size)
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_invariances() -> None:
    x = random_features(7, 4)
    loss = KoLeoLoss(top_k=2)
    value, d_x = value_and_gradient(loss, x)
    rotation = torch.linalg.qr(random_features(4, 4, seed=1)).Q
    lengths = random_features(7, 1, seed=2).exp()
    torch.testing.assert_close(loss(x @ rotation), value, rtol=1e-6, atol=0)  # eps has a direction
    torch.testing.assert_close(loss(x * lengths), value)
    torch.testing.assert_close(loss(x[permutations(1, 7)[0]]), value)
    assert (d_x * x).sum(1).abs().max() < 1e-14


# ---------------------------------------------------------------- known values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_many_that_coincide(count: int, dtype: torch.dtype) -> None:
    """The largest loss, 17.25 at width 5. Two push each other alike, which is no gradient."""
    x = random_features(1, 5, dtype=dtype).expand(count, 5)
    value, d_x = value_and_gradient(KoLeoLoss(), x)
    assert float(value) == pytest.approx(spread_of_coinciding(5), rel=1e-6)
    assert float(value) == pytest.approx(17.25, abs=0.01)
    assert d_x.isfinite().all()
    assert count > 2 or d_x.abs().max() == 0


def test_one_sample_is_its_own_neighbour() -> None:
    value, d_x = value_and_gradient(KoLeoLoss(top_k=3), random_features(1, 5))
    assert float(value) == pytest.approx(spread_of_coinciding(5))
    assert d_x.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(10))
def test_two_opposite_ones(seed: int, dtype: torch.dtype) -> None:
    """-ln 2, the least loss. Neither is its own neighbour, although its cosine rounds past -1."""
    x = random_features(1, 7, seed=seed, dtype=dtype)
    value, d_x = value_and_gradient(KoLeoLoss(), torch.cat([x, -3 * x]))
    assert float(value) == pytest.approx(-math.log(2), abs=1e-6)
    assert d_x.abs().max() < 1e-6


def test_no_samples() -> None:
    for loss in (KoLeoLoss(), KoLeoLoss(group_size=4), KoLeoLoss(distributed=True)):
        value, d_x = value_and_gradient(loss, torch.zeros(0, 3))
        assert value == 0
        assert d_x.shape == (0, 3)


def test_a_zero_row_is_finite_and_gets_no_gradient() -> None:
    x = random_features(4, 3).index_fill(0, torch.tensor([2]), 0.0)
    value, d_x = value_and_gradient(KoLeoLoss(), x)
    assert value.isfinite()
    assert d_x.isfinite().all()
    assert d_x[2].abs().max() == 0


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("top_k", [1, 2])
def test_groups_equal_separate_calls(top_k: int) -> None:
    x = random_features(12, 3)
    value, d_x = value_and_gradient(KoLeoLoss(top_k, group_size=4), x)
    parts = [value_and_gradient(KoLeoLoss(top_k), part) for part in x.chunk(3)]
    torch.testing.assert_close(value, torch.stack([v for v, _ in parts]).mean())
    torch.testing.assert_close(d_x, torch.cat([d for _, d in parts]) / 3)
    assert KoLeoLoss(top_k, group_size=12)(x) == KoLeoLoss(top_k)(x)
    assert KoLeoLoss(top_k)(x) != value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("apart", [1e-3, 1e-6])
def test_the_gradient_of_a_near_pair_is_what_the_docstring_says(
    apart: float, dtype: torch.dtype
) -> None:
    """A force of 1/(B d) in each direction of a mutual pair, bounded by that of eps."""
    x = torch.eye(4, 8, dtype=torch.float64)
    x[1] = x[0] + apart * torch.eye(8, dtype=torch.float64)[7]
    _, d_x = value_and_gradient(KoLeoLoss(), x.to(dtype))
    assert float(d_x[:2].norm(dim=1).mean()) == pytest.approx(2 / (4 * apart), rel=0.05)
    assert d_x[2:].norm() < 10


# ---------------------------------------------------------------- processes


def _local(x: Tensor, top_k: int, distributed: bool) -> tuple[Tensor, Tensor]:
    part = x.chunk(2)[dist.get_rank()]
    return value_and_gradient(KoLeoLoss(top_k, distributed=distributed), part)


@pytest.mark.parametrize("top_k", [1, 3])
def test_two_processes_equal_one(two: ProcessGroup, top_k: int) -> None:
    """Value and gradient, by DDP's averages over processes; neighbours cross."""
    x = random_features(10, 3)
    value, d_x = value_and_gradient(KoLeoLoss(top_k), x)
    parts = two.run(_local, x, top_k, True)
    torch.testing.assert_close(torch.stack([v for v, _ in parts]).mean(), value)
    torch.testing.assert_close(torch.cat([d for _, d in parts]) / 2, d_x)


def test_processes_look_only_at_their_own_unless_asked(two: ProcessGroup) -> None:
    x = random_features(10, 3)
    for part, actual in zip(x.chunk(2), two.run(_local, x, 1, False), strict=True):
        for a, b in zip(actual, value_and_gradient(KoLeoLoss(), part), strict=True):
            assert torch.equal(a, b)


def _in_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Four processes: 0 and 2 look among each other's samples, and so do 1 and 3."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    group = groups[rank % 2]
    assert isinstance(group, dist.ProcessGroup)
    loss = copy.deepcopy(KoLeoLoss(distributed=True, process_group=group))
    return value_and_gradient(loss, x.chunk(4)[rank])


def test_a_process_group_has_its_own_samples() -> None:
    x = random_features(12, 3)
    four = ProcessGroup(4)
    results = four.run(_in_pairs, x)
    four.close()
    parts = x.chunk(4)
    for pair in ((0, 2), (1, 3)):
        value, d_x = value_and_gradient(KoLeoLoss(), torch.cat([parts[i] for i in pair]))
        torch.testing.assert_close(torch.stack([results[i][0] for i in pair]).mean(), value)
        torch.testing.assert_close(torch.cat([results[i][1] for i in pair]) / 2, d_x)


def test_opposite_ones_on_two_processes(two: ProcessGroup) -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for value, _ in two.run(_local, x, 1, True):
        assert float(value) == pytest.approx(-math.log(2), abs=1e-6)


def _empty() -> tuple[Tensor, Tensor]:
    return value_and_gradient(KoLeoLoss(distributed=True), torch.zeros(0, 3))


def test_empty_processes(two: ProcessGroup) -> None:
    for value, d_x in two.run(_empty):
        assert value == 0
        assert d_x.shape == (0, 3)


def _uneven() -> str:
    with pytest.raises(ValueError, match="uneven local batches") as caught:
        KoLeoLoss(distributed=True)(torch.ones(dist.get_rank(), 3))
    return str(caught.value)


def test_uneven_processes_all_raise(two: ProcessGroup) -> None:
    assert len(set(two.run(_uneven))) == 1

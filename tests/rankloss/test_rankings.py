"""Target rankings: order, ties, partial sorts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankloss import rankings

HALF = [torch.bfloat16, torch.float16]
EVERY = [*HALF, torch.float32, torch.float64]


def by_hand(scores: Tensor, top_k: int | None) -> list[list[int]]:
    """Python's own stable sort, best first."""
    rows = [sorted(range(len(row)), key=lambda d: -row[d]) for row in scores.tolist()]
    return [row[:top_k] for row in rows]


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@given(
    seed=st.integers(0, 999),
    m=st.integers(1, 40),
    top_k=st.none() | st.integers(1, 45),
    levels=st.sampled_from([1, 2, 5, 1000]),
    shift=st.sampled_from([0, 200, -200]),
)
def test_best_first_and_ties_by_lower_id(
    seed: int, m: int, top_k: int | None, levels: int, shift: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (3, m), generator=g) / levels * 100
    scores = torch.where(torch.rand(3, m, generator=g) < 0.5, -scores, scores)  # some -0.0
    scores = (scores + shift).to(dtype)  # of both signs, or of one
    ranking = rankings(scores, top_k)
    assert ranking.dtype == torch.int64
    assert ranking.tolist() == by_hand(scores, top_k)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("top_k", [1, 3, 9, 10, 11, 40, 41, None])
def test_partial_sort_equals_the_full_one_at_the_extremes(
    top_k: int | None, dtype: torch.dtype
) -> None:
    """Around top_k = M / 4 the method changes; the result must not."""
    info = torch.finfo(dtype)
    extremes = torch.tensor(
        [
            *(0.0, -0.0, torch.inf, -torch.inf, info.max, info.min, info.tiny, -info.tiny),
            *(1.0, -1.0, 1 + info.eps, info.tiny * info.eps),  # the last is subnormal
        ],
        dtype=dtype,
    )
    g = torch.Generator().manual_seed(0)
    scores = extremes[torch.randint(len(extremes), (50, 40), generator=g)]
    scores = torch.cat([scores, -scores.abs()])
    full = scores.double().argsort(dim=1, descending=True, stable=True)[:, :top_k]
    assert torch.equal(rankings(scores, top_k), full)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("top_k", [2, None], ids=["partial", "full"])
def test_negative_zero_ties_with_zero(top_k: int | None, dtype: torch.dtype) -> None:
    scores = torch.tensor([[-0.0, 0.0] * 6, [0.0, -0.0] * 6], dtype=dtype)
    ids = torch.arange(12).expand(2, 12)[:, :top_k]
    assert torch.equal(rankings(scores, top_k), ids)


def test_negative_zero_ties_with_zero_when_compiled() -> None:
    """A compiler may drop additions of zero."""
    scores = torch.tensor([[-0.0, 0.0] * 6, [0.0, -0.0] * 6])
    compiled = torch.compile(rankings, fullgraph=True)
    assert torch.equal(compiled(scores, 2), torch.tensor([[0, 1], [0, 1]]))


@pytest.mark.parametrize("top_k", [3, None], ids=["partial", "full"])
def test_any_layout(top_k: int | None) -> None:
    scores = torch.randn(40, 40)
    assert torch.equal(rankings(scores.T, top_k), rankings(scores.T.contiguous(), top_k))
    one_row = scores[:1].expand(4, 40)
    assert torch.equal(rankings(one_row, top_k), rankings(one_row.contiguous(), top_k))


@pytest.mark.parametrize("top_k", [1, 9])
def test_carries_no_gradient_and_leaves_the_scores_alone(top_k: int) -> None:
    scores = torch.randn(3, 9, requires_grad=True)
    before = scores.detach().clone()
    ranking = rankings(scores, top_k)
    assert not ranking.requires_grad
    assert torch.equal(scores, before)
    assert scores._version == 0


def test_empty_batch() -> None:
    assert rankings(torch.empty(0, 5), 2).shape == (0, 2)


@pytest.mark.parametrize("top_k", [2, 15, 39])
def test_no_view_of_the_full_sort(top_k: int) -> None:
    """Rankings kept for the backward pass are N x K, not N x M."""
    ranking = rankings(torch.randn(50, 40), top_k)
    assert ranking.untyped_storage().nbytes() == 8 * 50 * top_k

"""Tiles left out: that there are any, and that leaving them out is below rounding."""

import math

import pytest
import torch
from torch import Tensor

from rankloss.kernels.configurations import using
from tests.helpers.triton_cases import (
    DEVICE,
    SMALL_TILES,
    Inputs,
    Results,
    assert_close,
    can_run,
    expected,
    guarded,
    make_inputs,
    run,
)

pytestmark = can_run

LOST = 2.0**-24  # all a row may skip, of a total of 1: half a unit in the last place

each_walk = pytest.mark.parametrize(("m", "k"), [(70, 70), (70, 50), (70, 20)])


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """nll, log-sum-exps and the record of live tiles."""
    with guarded(), using(SMALL_TILES):
        nll, lse, live = torch.ops.rankloss.plackett_luce(*inputs, "triton")
    return nll, lse, live


def visited(m: int, k: int) -> Tensor:
    """(place tiles, candidate tiles), whether some place still has a candidate of the tile."""
    rows, columns = torch.arange(-(-k // 16)), torch.arange(-(-m // 16))
    return (columns >= rows[:, None]) | (2 * k < m)


def both(inputs: Inputs) -> tuple[Results, Results]:
    """With tiles skipped, and without."""
    with guarded(), using(SMALL_TILES):
        return run(inputs), run(inputs, "triton-dense")


def in_ranked_order(scores: Tensor, k: int, order: int, m: int, *, strength: float) -> Inputs:
    """A problem whose j-th ranked candidate is candidate j, so that both walks meet it there."""
    inputs = make_inputs(1, m, k, order, strength=strength)
    ranking = torch.arange(k, device=DEVICE)[None]
    return inputs._replace(scores=scores[None].to(DEVICE), ranking=ranking)


# ---------------------------------------------------------------- the record


def test_record_of_live_tiles() -> None:
    """Falling scores: a place sees its own tile, and tiles only so far below it."""
    inputs = in_ranked_order(-torch.arange(70.0), 70, 2, 70, strength=0.01)
    live = forward(inputs)[2][0]
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    assert (live[columns < rows] == 0).all()  # taken
    assert (live[columns == rows] == 1).all()  # holds the place's own candidate
    assert (live[columns > rows + 2] == 0).all()  # e^-32 and less
    assert live[0, 1] == 1  # e^-1


@each_walk
def test_record_is_defined_everywhere(m: int, k: int) -> None:
    """Though the kernel visits neither taken tiles nor places that do not count."""
    inputs = make_inputs(2, m, k, 2, ragged=True)
    live = forward(inputs)[2]
    assert ((live == 0) | (live == 1)).all()
    assert (live[1] == 0).all()  # of length 0
    assert (live[0].diagonal() == 1).all()


# ---------------------------------------------------------------- how much is skipped


@each_walk
@pytest.mark.parametrize("order", [2, 3])
def test_peaked_problems_skip_tiles_and_lose_nothing(order: int, m: int, k: int) -> None:
    inputs = make_inputs(1, m, k, order, scale=100.0, strength=0.3, consistent=True)
    dead = (forward(inputs)[2][0] == 0)[visited(m, k)].float().mean()
    assert dead >= (0.25 if 2 * k >= m else 0.05)  # in natural order the maximum comes late
    skipping, dense = both(inputs)
    assert_close(skipping, expected(inputs), inputs)
    assert_close(dense, expected(inputs), inputs)


@each_walk
def test_flat_problems_skip_nothing(m: int, k: int) -> None:
    inputs = make_inputs(1, m, k, 2)
    assert (forward(inputs)[2][0] == 1)[visited(m, k)].all()
    skipping, dense = both(inputs)
    for a, b in zip(skipping, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("k", "bits"), [(70, 16.0), (70, 24.5), (70, 28.0), (70, 40.0), (20, 24.5), (20, 40.0)]
)
def test_what_a_row_skips_is_half_a_unit_in_the_last_place(k: int, bits: float) -> None:
    """One candidate far ahead of a level field of 2^-bits each, around the threshold of
    24 + log2(70) = 30.1 bits. The field's sum counts in every place up to the leader's."""
    m = 70
    scores = torch.full((m,), -bits * math.log(2))
    scores[15] = 0.0
    inputs = in_ranked_order(scores, k, 2, m, strength=0.0)
    skipping, dense = both(inputs)
    wanted = expected(inputs)
    rounding = 4 * torch.finfo(torch.float32).eps
    for actual in (skipping, dense):
        error = (actual.lse - wanted.lse)[0, :16].abs().max()
        assert error <= (LOST + rounding) / math.log(2)
        d = (actual.d_scores - wanted.d_scores).abs()
        assert d.sum() <= k * (LOST + rounding)
    lost = (skipping.d_scores - dense.d_scores).abs().sum()
    assert lost <= 2 * k * LOST  # by each place, of its probabilities and through its total
    assert (forward(inputs)[2][0, 0] == 0).any() == (bits > 30)


# ---------------------------------------------------------------- what may not be skipped


@each_walk
@pytest.mark.parametrize("impl", ["triton", "triton-dense"])
def test_the_place_s_own_candidate_counts_however_unlikely(impl: str, m: int, k: int) -> None:
    """Ranked against the scores: every place's probability is 0, its gradient -1."""
    rising = torch.linspace(-90, 90, m)
    inputs = in_ranked_order(rising, k, 2, m, strength=0.1)
    with guarded(), using(SMALL_TILES):
        actual = run(inputs, impl)
    assert_close(actual, expected(inputs), inputs)
    assert actual.nll > 40 * k


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("k", [20, 70])
def test_the_bound_allows_for_transitions(k: int, order: int) -> None:
    """Scores alone say that the last tiles are negligible; strong transitions say otherwise."""
    m = 70
    falling = torch.where(torch.arange(m) < 35, 0.0, -45.0)
    inputs = in_ranked_order(falling, k, order, m, strength=12.0)
    with guarded(), using(SMALL_TILES):
        actual = run(inputs)
    assert_close(actual, expected(inputs), inputs)


@pytest.mark.parametrize("k", [20, 70])
def test_the_bound_covers_every_block_of_columns(k: int) -> None:
    """All of the transitions lie in the last of several blocks."""
    m, r = 70, 40
    falling = torch.where(torch.arange(m) < 35, 0.0, -45.0)
    inputs = in_ranked_order(falling, k, 2, m, strength=0.0)
    generator = torch.Generator().manual_seed(5)
    tables = torch.zeros(2, 1, m, r)
    tables[..., -4:] = 4 * torch.randn(2, 1, m, 4, generator=generator)
    inputs = inputs._replace(predecessors=tables[0].to(DEVICE), keys=tables[1].to(DEVICE))
    with guarded(), using(SMALL_TILES):
        actual = run(inputs)
    assert_close(actual, expected(inputs), inputs)

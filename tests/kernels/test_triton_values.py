"""The Triton kernels against float64, sanitised, with NaN in every fresh buffer."""

import pytest
import torch

from rankloss.kernels import first_order
from rankloss.kernels.configurations import Plan, Tile, plan, using
from tests.helpers.triton_cases import (
    DEVICE,
    SMALL_TILES,
    Inputs,
    assert_close,
    can_run,
    expected,
    guarded,
    make_inputs,
    run,
)

pytestmark = can_run


def check(inputs: Inputs, config: Plan) -> None:
    """Value and gradients equal those of float64."""
    with guarded(), using(config):
        actual = run(inputs)
    assert_close(actual, expected(inputs), inputs)


# ---------------------------------------------------------------- orders, widths, dtypes

WIDTHS = [  # order, r: blocks of 32 columns hold W = (R-1) r
    (1, 8),
    (2, 8),  # one block of the smallest width
    (2, 20),  # padded within a block
    (3, 8),
    (3, 20),  # two blocks; the first ends inside the second term
    (3, 32),  # two blocks, one for each term
    (4, 20),  # padded to two blocks
    (5, 8),
    (5, 20),  # three blocks, all four terms
    (2, 128),  # four blocks of one term
]


@pytest.mark.parametrize(("order", "r"), WIDTHS)
def test_order_and_width(order: int, r: int) -> None:
    check(make_inputs(2, 21, 19, order, r, ragged=True, discount=True), SMALL_TILES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("k", "order", "r"), [(19, 1, 8), (19, 2, 20), (19, 3, 8), (19, 5, 8), (19, 3, 20), (7, 3, 20)]
)
def test_half_precision(k: int, order: int, r: int, dtype: torch.dtype) -> None:
    check(make_inputs(2, 21, k, order, r, dtype=dtype, ragged=True, discount=True), SMALL_TILES)


@pytest.mark.parametrize(("order", "r"), [(3, 128), (5, 32)])
@pytest.mark.parametrize("columns", [64, 256])
def test_wide_terms_in_wide_blocks(order: int, r: int, columns: int) -> None:
    config = Plan(Tile(32, 32), Tile(32, 32), columns=columns)
    check(make_inputs(1, 35, 34, order, r), config)


# ---------------------------------------------------------------- sizes

SIZES = [  # n, m, k
    (3, 1, 1),  # nothing to choose from: value and gradients are 0
    (1, 2, 1),
    (1, 2, 2),
    (3, 17, 1),  # one place: no predecessors
    (1, 17, 17),  # one more than a tile
    (2, 31, 2),  # natural walk
    (1, 48, 23),  # natural walk, two tiles of places
    (1, 48, 24),  # ranked walk of a completed ranking
    (1, 33, 20),  # the same; the last candidate has a tile of its own
    (1, 31, 31),
    (1, 32, 32),  # whole tiles, no masks
    (1, 130, 5),  # long rows
]


@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize(("n", "m", "k"), SIZES)
def test_size(n: int, m: int, k: int, order: int) -> None:
    check(make_inputs(n, m, k, order, discount=True), SMALL_TILES)


@pytest.mark.parametrize(("m", "k"), [(65, 65), (130, 130), (130, 64)])
@pytest.mark.parametrize("order", [1, 3])
def test_large_tiles(m: int, k: int, order: int) -> None:
    """The tiles that are really used; 130 is two of them and a rest."""
    check(make_inputs(1, m, k, order, 32), plan("sm_90", torch.float16, 64, k))


@pytest.mark.parametrize(("m", "k"), [(49, 49), (49, 11), (49, 30)])
@pytest.mark.parametrize(("places", "candidates"), [(16, 64), (64, 16)])
def test_oblong_tiles(places: int, candidates: int, m: int, k: int) -> None:
    """The diagonal crosses several tiles of a row or of a column."""
    config = Plan(Tile(places, candidates), Tile(candidates, places), columns=16)
    check(make_inputs(1, m, k, 3), config)


@pytest.mark.parametrize(("m", "k"), [(50, 50), (33, 33), (50, 40), (50, 3)])
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_scans_of_several_blocks(
    scale: float, m: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order 1 scans blocks of up to 1024 places; here of 16, carried from one to the next."""
    monkeypatch.setattr(first_order, "_block", lambda k: 16)
    check(make_inputs(2, m, k, 1, scale=scale, masked=True, discount=True), SMALL_TILES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [3, 40])
def test_configurations_of_the_table(k: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 45, k, 3, 20, dtype=dtype)
    with guarded():
        actual = run(inputs)
    assert_close(actual, expected(inputs), inputs)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize(("m", "k"), [(20, 18), (20, 3)])
def test_no_anchors(m: int, k: int, order: int) -> None:
    scores, ranking, lengths, weights, *tables = make_inputs(0, 20, 18, order)
    tables = [t[:, :m] for t in tables]
    inputs = Inputs(scores[:, :m], ranking[:, :k], lengths, weights[:k], *tables)
    with guarded() as report:
        actual = run(inputs)
    assert_close(actual, expected(inputs), inputs)
    assert actual.nll.shape == (0,)
    assert actual.d_keys.abs().sum() == 0
    assert report.programs == 0


# ---------------------------------------------------------------- values of the inputs

each_walk = pytest.mark.parametrize(
    ("m", "k"), [(21, 21), (21, 18), (21, 5)], ids=["full", "completed", "natural"]
)
each_order = pytest.mark.parametrize("order", [1, 3])


@each_walk
@each_order
@pytest.mark.parametrize("ragged", [False, True])
def test_masked_candidates(ragged: bool, order: int, m: int, k: int) -> None:
    inputs = make_inputs(4, m, k, order, masked=True, ragged=ragged, discount=True, seed=2)
    check(inputs, SMALL_TILES)


@each_walk
@each_order
def test_every_candidate_masked(order: int, m: int, k: int) -> None:
    inputs = make_inputs(2, m, k, order)
    inputs.scores[0] = -torch.inf
    inputs.lengths[0] = 0
    check(inputs, SMALL_TILES)


@each_walk
@each_order
@pytest.mark.parametrize("consistent", [False, True])
def test_scale_of_100(consistent: bool, order: int, m: int, k: int) -> None:
    inputs = make_inputs(2, m, k, order, scale=100.0, consistent=consistent, seed=3)
    check(inputs, SMALL_TILES)


@each_walk
@each_order
def test_ties(order: int, m: int, k: int) -> None:
    check(make_inputs(2, m, k, order, ties=True, ragged=True), SMALL_TILES)


@each_walk
@each_order
def test_equal_scores(order: int, m: int, k: int) -> None:
    inputs = make_inputs(2, m, k, order)
    check(inputs._replace(scores=torch.zeros_like(inputs.scores)), SMALL_TILES)


@each_walk
@each_order
def test_weights_of_zero(order: int, m: int, k: int) -> None:
    inputs = make_inputs(2, m, k, order)
    weights = inputs.weights.clone()
    weights[: k // 2] = 0
    check(inputs._replace(weights=weights), SMALL_TILES)
    nothing = run(inputs._replace(weights=torch.zeros(k, device=DEVICE)))
    assert all(x.abs().sum() == 0 for x in (nothing.nll, *nothing.gradients()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_upstream_far_from_one_keeps_half_precision_gradients(
    size: float, dtype: torch.dtype
) -> None:
    """Weights and upstream multiply in float32: neither under- nor overflow between kernels."""
    inputs = make_inputs(2, 37, 37, 3, dtype=dtype)
    inputs = inputs._replace(weights=inputs.weights * size)
    grad = torch.full((2,), 1 / size, device=DEVICE)
    with guarded(), using(SMALL_TILES):
        actual = run(inputs, grad=grad)
    assert_close(actual, expected(inputs, grad), inputs)

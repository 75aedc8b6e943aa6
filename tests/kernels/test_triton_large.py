"""Offsets beyond 2^31: the last anchors of a huge problem, in memory that is reserved, not used."""

import math
import mmap
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloss.kernels import first_order_kernels, high_order_kernels
from tests.helpers.sanitizer import WHY_NOT, sanitize
from tests.helpers.triton_cases import Inputs, make_inputs

pytestmark = pytest.mark.skipif(
    WHY_NOT is not None or sys.platform != "linux", reason=WHY_NOT or "needs Linux's mmap"
)

MAP_NORESERVE = 0x4000
M = K = 20
R, WIDTH, BLOCK = 2, 16, 16
TILES = 2  # of 16 places, or candidates
ANCHORS = 2**31 // M + 10**6  # N M is just past 2^31, N K W far

CONSTANTS = {
    "R": R,
    "r": 8,
    "BW": WIDTH,
    "SPLITS": 1,
    "BK": BLOCK,
    "BJ": BLOCK,
    "RANKED": True,
    "SKIP": True,
    "PRECISION": "ieee",
}


def reserve(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros; pages that nothing touches take no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def huge(last: Tensor, rows: int) -> Tensor:
    """(rows, ...) whose last row is that of `last`, (1, ...)."""
    table = reserve(rows, *last.shape[1:], dtype=last.dtype)
    table[-1] = last[0]
    return table


def at_the_end(
    launch: Callable[[int], dict[str, Tensor]], programs_per_anchor: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The last rows of what `launch` writes: for ANCHORS anchors, for one."""
    saved()  # not among the launches that count as the last ones
    with sanitize(races=False, first_program=(ANCHORS - 1) * programs_per_anchor):
        many = launch(ANCHORS)
    with sanitize():
        one = launch(1)
    return {name: x[-1] for name, x in many.items()}, {name: x[-1] for name, x in one.items()}


def assert_equal(many: dict[str, Tensor], one: dict[str, Tensor]) -> None:
    for name, x in one.items():
        assert x.abs().sum() > 0, f"{name} was not written"
        assert torch.equal(many[name], x), name


def problem(order: int) -> Inputs:
    return make_inputs(1, M, K, order, r=8, discount=True)


def forward_high_order(x: Inputs, n: int) -> dict[str, Tensor]:
    out = {
        "lse": huge(torch.zeros(1, K), n),
        "nll": huge(torch.zeros(1, TILES), n),
        "live": huge(torch.zeros(1, TILES, TILES, dtype=torch.int8), n),
    }
    high_order_kernels.forward_kernel[(TILES,)](
        *inputs_of(x, n),
        x.predecessors,
        x.keys,
        x.keys.square().sum((0, 2)).sqrt(),
        *out.values(),
        K,
        M,
        28.0,
        **CONSTANTS,
    )
    return out


def inputs_of(x: Inputs, n: int) -> tuple[Tensor, ...]:
    """scores, ranking, places, lengths, weights, as kernels take them."""
    places = x.ranking.argsort(1).int()
    rows = (huge(t, n) for t in (x.scores, x.ranking, places))
    return *rows, huge(x.lengths[:, None], n).view(n), x.weights


def test_forward() -> None:
    assert_equal(*at_the_end(lambda n: forward_high_order(problem(R), n), TILES))


@lru_cache
def saved() -> dict[str, Tensor]:
    """What the forward pass leaves for the backward pass of one anchor."""
    return forward_high_order(problem(R), 1)


def backward_inputs(x: Inputs, n: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What backward kernels take before and after the upstream gradient."""
    tables = x.predecessors, x.keys, huge(saved()["lse"], n), huge(saved()["live"], n)
    return inputs_of(x, n), tables


@pytest.mark.parametrize("in_one_chunk", [True, False])
def test_backward_queries(in_one_chunk: bool) -> None:
    """Either the place within the chunk is huge, or the anchor at which the chunk starts."""

    def launch(n: int) -> dict[str, Tensor]:
        before, after = backward_inputs(problem(R), n)
        rows, first = (n, 0) if in_one_chunk else (1, n - 1)
        d_queries = huge(torch.zeros(1, K, WIDTH), rows)
        high_order_kernels.backward_queries_kernel[(TILES, 1)](
            *before, *after, d_queries, first, K, M, **CONSTANTS
        )
        return {"d_queries": d_queries}

    assert_equal(*at_the_end(launch, TILES if in_one_chunk else 0))


@pytest.mark.parametrize("in_one_chunk", [True, False])
def test_backward_keys(in_one_chunk: bool) -> None:
    def launch(n: int) -> dict[str, Tensor]:
        before, after = backward_inputs(problem(R), n)
        rows, first = (n, 0) if in_one_chunk else (1, n - 1)
        out = huge(torch.zeros(1, M), n), huge(torch.zeros(1, M, WIDTH), rows)
        grad = huge(torch.ones(1, 1), n).view(n)
        high_order_kernels.backward_keys_kernel[(TILES, 1)](
            *before, grad, *after, *out, first, K, M, **CONSTANTS
        )
        return {"d_scores": out[0], "d_keys": out[1]}

    assert_equal(*at_the_end(launch, TILES if in_one_chunk else 0))


def collect(ranking: Tensor, places: Tensor, *rest: Any, candidates: int, programs: int) -> None:
    """`rest`: grad, predecessors, buffers, tables of gradients, first anchor, anchors."""
    high_order_kernels.collect_kernel[(programs, 2)](
        ranking,
        places,
        *rest,
        candidates,
        candidates,
        R=R,
        r=8,
        W=WIDTH,
        BR=8,
        BN=8,
        BA=16,
        RANKED=True,
    )


def test_collect_from_the_last_anchors() -> None:
    """The chunk starts past 2^31 / M anchors; its last anchor alone has gradients."""

    def launch(n: int) -> dict[str, Tensor]:
        x = problem(R)
        chunk = min(n, 3)
        _, ranking, places, _, _ = inputs_of(x, n)
        grad = huge(torch.ones(1, 1), n).view(n)
        generator = torch.Generator().manual_seed(0)
        buffers = [huge(torch.randn(1, M, WIDTH, generator=generator), chunk) for _ in range(2)]
        out = torch.zeros(1, M, 8), torch.zeros(1, M, 8)
        where = n - chunk, chunk
        collect(
            ranking, places, grad, x.predecessors, *buffers, *out, *where, candidates=M, programs=2
        )
        return {"d_predecessors": out[0], "d_keys": out[1]}

    assert_equal(*at_the_end(launch, 0))


def test_collect_from_a_huge_buffer() -> None:
    """Nine anchors with so many candidates that their buffer passes 2^31 elements."""
    anchors, m = 9, 2**24 + 16
    assert (anchors - 1) * m * WIDTH > 2**31
    last = torch.arange(m - 16, m)
    ranking = reserve(anchors, m, dtype=torch.int64)
    places = reserve(anchors, m, dtype=torch.int32)
    d_queries, d_keys = (reserve(anchors, m, WIDTH) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 16, WIDTH, generator=generator)
    ranking[-1, -16:], places[-1, -16:] = last, last.int()
    d_queries[-1, -16:], d_keys[-1, -16:] = values
    out = reserve(1, m, 8), reserve(1, m, 8)
    with sanitize(races=False, first_program=m // 16 - 1):
        collect(
            ranking,
            places,
            torch.ones(anchors),
            reserve(1, m, 8),
            d_queries,
            d_keys,
            *out,
            0,
            anchors,
            candidates=m,
            programs=1,
        )
    assert torch.equal(out[1][0, -16:], values[1, :, :8])
    assert torch.equal(out[0][0, -16:-1], values[0, 1:, :8])  # of the place after one's own


def test_first_order() -> None:
    x = problem(1)

    def launch(n: int) -> dict[str, Tensor]:
        out = {"lse": huge(torch.zeros(1, K), n), "nll": huge(torch.zeros(1, 1), n)}
        constants: dict[str, Any] = {"B": 32, "COMPLETE": True}
        scores, ranking, places, lengths, weights = inputs_of(x, n)
        first_order_kernels.forward_kernel[(1,)](
            scores, ranking, places, lengths, weights, *out.values(), K, M, **constants
        )
        out["d_scores"] = huge(torch.zeros(1, M), n)
        first_order_kernels.backward_kernel[(1,)](
            huge(torch.ones(1, 1), n),
            scores,
            ranking,
            places,
            weights,
            out["lse"],
            out["d_scores"],
            K,
            M,
            **constants,
        )
        return out

    assert_equal(*at_the_end(launch, 1))

"""Offsets beyond 2^31: the last anchors of a huge problem, in memory that is reserved, not used."""

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloss.kernels import first_order, high_order
from tests.helpers.sanitizer import WHY_NOT, sanitize
from tests.helpers.triton_cases import Inputs, make_inputs, reserve

pytestmark = pytest.mark.skipif(
    WHY_NOT is not None or sys.platform != "linux", reason=WHY_NOT or "needs Linux's mmap"
)

M = K = 20
R, WIDTH, BLOCK = 2, 16, 16
TILES = 2  # of 16 places, or candidates
ANCHORS = 2**31 // M + 10**6  # N M is just past 2^31, N K W far

CONSTANTS = {"W": WIDTH, "BW": WIDTH, "BK": BLOCK, "BJ": BLOCK, "PRECISION": "ieee"}
P = 32  # places, or candidates, in whole tiles


def huge(last: Tensor, rows: int) -> Tensor:
    """(rows, ...) whose last row is that of `last`, (1, ...)."""
    table = reserve(rows, *last.shape[1:], dtype=last.dtype)
    table[-1] = last[0]
    return table


def at_the_end(
    launch: Callable[[int], dict[str, Tensor]], programs_per_anchor: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The last rows of what `launch` writes: for ANCHORS anchors, for one."""
    prepared()  # not among the launches that count as the last ones
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


def inputs_of(x: Inputs, n: int) -> tuple[Tensor, ...]:
    """scores, ranking, places, lengths, weights."""
    places = x.ranking.argsort(1).int()
    rows = (huge(t, n) for t in (x.scores, x.ranking, places))
    return *rows, huge(x.lengths[:, None], n).view(n), x.weights


@lru_cache
def prepared() -> dict[str, Tensor]:
    """Operands of one anchor, its padded weights, and what the forward pass leaves behind."""
    x = problem(R)
    out = {
        "Q": torch.zeros(1, P, WIDTH),
        "C": torch.zeros(1, P, WIDTH),
        "S": torch.zeros(1, P),
        "places": torch.zeros(1, M, dtype=torch.int32),
    }
    prepare(x, x.scores, x.ranking, out, first=0, programs=1)
    out["weights"] = torch.nn.functional.pad(x.weights, (0, P - K))
    rest = torch.full((1, P), -torch.inf)
    rest[:, :M] = x.scores
    out["rest_scores"], out["rest_keys"] = rest, out["C"][0].clone()
    made = forward(x, out, 1, ranked=True)
    return out | made


def prepare(
    x: Inputs, scores: Tensor, ranking: Tensor, out: dict[str, Tensor], *, first: int, programs: int
) -> None:
    high_order.prepare_kernel[(programs, 1)](
        scores,
        ranking,
        x.predecessors,
        x.keys,
        *out.values(),
        first,
        first,
        K,
        M,
        M,
        P,
        P,
        R=R,
        r=8,
        W=WIDTH,
        BW=WIDTH,
        BP=P,
        PLACES=True,
    )


def operands(n: int, *names: str) -> list[Tensor]:
    return [huge(prepared()[name], n) if n > 1 else prepared()[name] for name in names]


chunks = pytest.mark.parametrize("in_one_chunk", [True, False])
"""Either the row within the chunk is huge, or the anchor at which the chunk starts."""


def where(n: int, in_one_chunk: bool) -> tuple[int, int]:
    """Rows of the chunk's buffers, and its first anchor."""
    return (n, 0) if in_one_chunk else (1, n - 1)


@chunks
def test_prepare(in_one_chunk: bool) -> None:
    x = problem(R)

    def launch(n: int) -> dict[str, Tensor]:
        rows, first = where(n, in_one_chunk)
        scores, ranking, *_ = inputs_of(x, n)
        out = {
            "Q": huge(torch.zeros(1, P, WIDTH), rows),
            "C": huge(torch.zeros(1, P, WIDTH), rows),
            "S": huge(torch.zeros(1, P), rows),
            "places": huge(torch.zeros(1, M, dtype=torch.int32), rows),
        }
        prepare(x, scores, ranking, out, first=first, programs=1)
        return out

    assert_equal(*at_the_end(launch, 1 if in_one_chunk else 0))


def forward(
    x: Inputs, given: dict[str, Tensor], n: int, *, ranked: bool, in_one_chunk: bool = True
) -> dict[str, Tensor]:
    rows, first = where(n, in_one_chunk)
    out = {
        "nll": huge(torch.zeros(1, TILES), n),
        "shifted": huge(torch.zeros(1, P), rows),
        "dQ": huge(torch.zeros(1, P, WIDTH), rows),
    }
    high_order.forward_kernel[(TILES, 1)](
        *(huge(given[name], rows) for name in ("Q", "C", "S")),
        given["rest_keys"],
        huge(given["rest_scores"], rows),
        inputs_of(x, n)[3],
        given["weights"],
        *out.values(),
        first,
        P,
        P,
        P,
        RANKED=ranked,
        GRAD=True,
        **CONSTANTS,
    )
    return out


@chunks
@pytest.mark.parametrize("ranked", [True, False])
def test_forward(ranked: bool, in_one_chunk: bool) -> None:
    def launch(n: int) -> dict[str, Tensor]:
        return forward(problem(R), prepared(), n, ranked=ranked, in_one_chunk=in_one_chunk)

    assert_equal(*at_the_end(launch, TILES if in_one_chunk else 0))


@chunks
def test_backward(in_one_chunk: bool) -> None:
    x = problem(R)

    def launch(n: int) -> dict[str, Tensor]:
        rows, first = where(n, in_one_chunk)
        _, ranking, _, lengths, _ = inputs_of(x, n)
        out = huge(torch.zeros(1, M), n), huge(torch.zeros(1, P, WIDTH), rows)
        high_order.backward_kernel[(TILES, 1)](
            *operands(rows, "Q", "C", "S"),
            ranking,
            lengths,
            prepared()["weights"],
            huge(torch.ones(1, 1), n).view(n),
            *operands(rows, "shifted"),
            *out,
            first,
            first,
            M,
            M,
            P,
            P,
            **CONSTANTS,
        )
        return {"d_scores": out[0], "d_keys": out[1]}

    assert_equal(*at_the_end(launch, TILES if in_one_chunk else 0))


def test_backward_of_the_rest() -> None:
    x = problem(R)

    def launch(n: int) -> dict[str, Tensor]:
        d_scores, d_rest = huge(torch.zeros(1, M), n), torch.zeros(1, P, WIDTH)
        high_order.backward_rest_kernel[(TILES, 1, 1)](
            *operands(1, "Q", "rest_keys", "rest_scores"),
            inputs_of(x, n)[3],
            huge(torch.ones(1, 1), n).view(n),
            *operands(1, "shifted"),
            d_scores,
            d_rest,
            n - 1,
            1,
            1,
            M,
            P,
            P,
            **CONSTANTS,
        )
        return {"d_scores": d_scores, "d_rest": d_rest}

    assert_equal(*at_the_end(launch, 0))


def collect(
    ranking: Tensor, places: Tensor, *rest: Any, m: int, padded: int, programs: int
) -> None:
    """`rest`: grad, predecessors, dQ, dC, tables of gradients, first anchor, its row, anchors."""
    high_order.collect_kernel[(programs, 2)](
        ranking, places, *rest, m, m, m, padded, padded, R=R, r=8, W=WIDTH, BR=8, BN=8, BA=16
    )


def test_collect_from_the_last_anchors() -> None:
    """The chunk starts past 2^31 / M anchors; its last anchor alone has gradients."""

    def launch(n: int) -> dict[str, Tensor]:
        x = problem(R)
        chunk = min(n, 3)
        _, ranking, places, _, _ = inputs_of(x, n)
        grad = huge(torch.ones(1, 1), n).view(n)
        generator = torch.Generator().manual_seed(0)
        buffers = [huge(torch.randn(1, P, WIDTH, generator=generator), chunk) for _ in range(2)]
        out = torch.zeros(1, M, 8), torch.zeros(1, M, 8)
        rest = grad, x.predecessors, *buffers, *out, n - chunk, n - chunk, chunk
        collect(ranking, places[-chunk:], *rest, m=M, padded=P, programs=2)
        return {"d_predecessors": out[0], "d_keys": out[1]}

    assert_equal(*at_the_end(launch, 0))


def test_collect_from_a_huge_buffer() -> None:
    """Nine anchors with so many candidates that their buffer passes 2^31 elements."""
    anchors, m = 9, 2**24 + 16
    assert (anchors - 1) * m * WIDTH > 2**31
    last = torch.arange(m - 16, m)
    ranking = reserve(anchors, m, dtype=torch.int64)
    places = reserve(anchors, m, dtype=torch.int32)
    dQ, dC = (reserve(anchors, m, WIDTH) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 16, WIDTH, generator=generator)
    ranking[-1, -16:], places[-1, -16:] = last, last.int()
    dQ[-1, -16:], dC[-1, -16:] = values
    out = reserve(1, m, 8), reserve(1, m, 8)
    rest = torch.ones(anchors), reserve(1, m, 8), dQ, dC, *out, 0, 0, anchors
    with sanitize(races=False, first_program=m // 16 - 1):
        collect(ranking, places, *rest, m=m, padded=m, programs=1)
    assert torch.equal(out[1][0, -16:], values[1, :, :8])
    assert torch.equal(out[0][0, -16:-1], values[0, 1:, :8])  # of the place after one's own


def test_first_order() -> None:
    x = problem(1)

    def launch(n: int) -> dict[str, Tensor]:
        out = {"lse": huge(torch.zeros(1, K), n), "nll": huge(torch.zeros(1, 1), n)}
        constants: dict[str, Any] = {"B": 32, "COMPLETE": True, "GATED": False}
        scores, ranking, places, lengths, weights = inputs_of(x, n)
        first_order.forward_kernel[(1,)](
            scores, ranking, places, lengths, weights, *out.values(), lengths, K, M, **constants
        )
        out["d_scores"] = huge(torch.zeros(1, M), n)
        first_order.backward_kernel[(1,)](
            huge(torch.ones(1, 1), n),
            scores,
            ranking,
            places,
            weights,
            out["lse"],
            out["d_scores"],
            lengths,
            K,
            M,
            **constants,
        )
        return out

    assert_equal(*at_the_end(launch, 1))

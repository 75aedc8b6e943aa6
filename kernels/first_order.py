"""The likelihood of order 1 in Triton: scans over ranked scores, one pass each way.

Without transitions the remaining mass of place k is a suffix sum, sum over j >= k of exp(s_j),
and the gradient a prefix sum, exp(s_j) * sum over k <= j of w_k exp(-lse_k). Both run as scans of
(maximum, scaled sum) pairs: no difference of sums anywhere, so nothing cancels at any scale.
Candidates outside the ranking (K < M) enter both as one total. One program owns one anchor.

A higher order whose keys are all zero is order 1, and has its bits: `replace_at_zero_keys` launches
the same kernels behind the tiles', gated by the keys, so that nothing waits to know.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankloss.kernels.launch import on_device_of
from rankloss.kernels.signature import Lists

LOG2E = tl.constexpr(1.4426950408889634)

_SIZES = ["K", "M"]


@triton.jit
def merge(top_a, sum_a, top_b, sum_b):
    """Add two sums given as 2^top * sum."""
    top = tl.maximum(top_a, top_b)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, sum_a * tl.exp2(top_a - base) + sum_b * tl.exp2(top_b - base)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    scores,  # (N, M) float32
    ranking,  # (N, K) int64
    places,  # (N, M) int32, K for unranked; read when K < M
    lengths,  # (N,) int64
    weights,  # (K,) float32
    lse,  # out (N, K) float32, in binary orders; +inf for places that do not count
    nll,  # out (N,) float32
    moved,  # 0-D uint8; GATED
    K,
    M,
    B: tl.constexpr,
    COMPLETE: tl.constexpr,
    GATED: tl.constexpr,
):
    if GATED:  # noqa: SIM102 - compiled only where it is so
        if tl.load(moved) != 0:
            return
    i = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, B)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    if not COMPLETE:
        for d0 in range(0, M, B):
            d = d0 + b
            unranked = tl.load(places + i * M + d, mask=d < M, other=0) >= K
            s = tl.load(scores + i * M + d, mask=(d < M) & unranked, other=float("-inf")) * LOG2E
            best = tl.max(s, 0, keep_dims=True)
            base = tl.where(best == float("-inf"), 0.0, best)
            top, total = merge(top, total, best, tl.sum(tl.exp2(s - base), 0, keep_dims=True))
    count = tl.load(lengths + i)
    loss = tl.zeros((B,), tl.float32)
    blocks = tl.cdiv(K, B)
    for back in range(blocks):
        k = (blocks - 1 - back) * B + b
        ids = tl.load(ranking + i * K + k, mask=k < K, other=0)
        s = tl.load(scores + i * M + ids, mask=k < K, other=float("-inf")) * LOG2E
        ones = tl.where(s == float("-inf"), 0.0, 1.0)
        tops, sums = tl.associative_scan((s, ones), 0, merge, reverse=True)
        tops, sums = merge(tops, sums, top, total)
        counts = k < count
        row = tl.where(counts, tops, float("inf")) + tl.log2(tl.where(counts, sums, 1.0))
        weight = tl.load(weights + k, mask=k < K, other=0.0)
        loss += (tl.where(counts, row, 0.0) - tl.where(counts, s, 0.0)) * weight
        tl.store(lse + i * K + k, row, mask=k < K)
        first = b == 0
        top = tl.max(tl.where(first, tops, float("-inf")), 0, keep_dims=True)
        total = tl.sum(tl.where(first, sums, 0.0), 0, keep_dims=True)
    tl.store(nll + i, tl.sum(loss, 0) / LOG2E)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    grad,  # (N,) float32
    scores,
    ranking,
    places,
    weights,
    lse,
    d_scores,  # out (N, M) float32
    moved,  # 0-D uint8; GATED
    K,
    M,
    B: tl.constexpr,
    COMPLETE: tl.constexpr,
    GATED: tl.constexpr,
):
    if GATED:  # noqa: SIM102 - compiled only where it is so
        if tl.load(moved) != 0:
            return
    i = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, B)
    upstream = tl.load(grad + i)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for k0 in range(0, K, B):
        k = k0 + b
        ids = tl.load(ranking + i * K + k, mask=k < K, other=0)
        s = tl.load(scores + i * M + ids, mask=k < K, other=float("-inf")) * LOG2E
        row = tl.load(lse + i * K + k, mask=k < K, other=float("inf"))
        weight = tl.load(weights + k, mask=k < K, other=0.0)
        weight = tl.where(row < float("inf"), weight, 0.0)
        tops, sums = tl.associative_scan((-row, weight), 0, merge)
        tops, sums = merge(tops, sums, top, total)
        mass = tl.exp2(s + tops) * sums
        tl.store(d_scores + i * M + ids, (mass - weight) * upstream, mask=k < K)
        last = b == B - 1
        top = tl.max(tl.where(last, tops, float("-inf")), 0, keep_dims=True)
        total = tl.sum(tl.where(last, sums, 0.0), 0, keep_dims=True)
    if not COMPLETE:
        for d0 in range(0, M, B):
            d = d0 + b
            unranked = tl.load(places + i * M + d, mask=d < M, other=0) >= K
            s = tl.load(scores + i * M + d, mask=(d < M) & unranked, other=float("-inf")) * LOG2E
            out = tl.exp2(s + top) * total * upstream
            tl.store(d_scores + i * M + d, out, mask=(d < M) & unranked)


# ---------------------------------------------------------------- launches


def nll(x: Lists) -> Tensor:
    """sum_k w_k l_ik, (N,)."""
    value = x.scores.new_zeros(len(x.scores))
    _forward(x, _places(x), value)
    return value


def nll_and_gradients(upstream: Tensor, x: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and the gradients of sum_i upstream_i nll_i; those of the tables are empty."""
    places, value = _places(x), x.scores.new_zeros(len(x.scores))
    d_scores = torch.empty_like(x.scores)
    _backward(upstream, x, places, _forward(x, places, value), d_scores)
    tables = (torch.empty_like(t, dtype=value.dtype) for t in (x.predecessors, x.keys))
    d_predecessors, d_keys = tables
    return value, d_scores, d_predecessors, d_keys


def replace_at_zero_keys(
    x: Lists, value: Tensor, upstream: Tensor | None = None, d_scores: Tensor | None = None
) -> None:
    """Overwrite a higher order's (N,) values, and its gradient of scores, if all keys are zero.

    They are order 1's then, and rounding in tiles must not tell them apart.
    """
    moved, places = x.keys.any().view(torch.uint8), _places(x)
    lse = _forward(x, places, value, moved)
    if upstream is not None and d_scores is not None:
        _backward(upstream, x, places, lse, d_scores, moved)


def _forward(x: Lists, places: Tensor, value: Tensor, moved: Tensor | None = None) -> Tensor:
    """Fill `value`; return log-sum-exps (N, K) in binary orders. Nothing is filled if `moved`."""
    lse = x.scores.new_empty(x.ranking.shape)
    if x.scores.numel():
        with on_device_of(x.scores):
            forward_kernel[(len(value),)](
                x.scores,
                x.ranking,
                places,
                x.lengths,
                x.weights,
                lse,
                value,
                x.lengths if moved is None else moved,
                *_sizes(x),
                **_constants(x, moved),
            )
    return lse


def _backward(
    upstream: Tensor,
    x: Lists,
    places: Tensor,
    lse: Tensor,
    d_scores: Tensor,
    moved: Tensor | None = None,
) -> None:
    """Fill `d_scores`, unless `moved`."""
    if x.scores.numel():
        with on_device_of(x.scores):
            backward_kernel[(len(lse),)](
                upstream,
                x.scores,
                x.ranking,
                places,
                x.weights,
                lse,
                d_scores,
                x.lengths if moved is None else moved,
                *_sizes(x),
                **_constants(x, moved),
            )


def _sizes(x: Lists) -> tuple[int, int]:
    return x.ranking.shape[1], x.scores.shape[1]


def _constants(x: Lists, moved: Tensor | None) -> dict[str, int | bool]:
    k, m = _sizes(x)
    return {"B": _block(k), "COMPLETE": k == m, "GATED": moved is not None}


def _block(k: int) -> int:
    """Elements of a row scanned at a time."""
    return max(16, min(1024, 1 << (k - 1).bit_length()))


def _places(x: Lists) -> Tensor:
    """(N, M) int32 place of every candidate, K where it has none; empty when all have one."""
    k, m = _sizes(x)
    if k == m:
        return x.ranking.new_empty(0, dtype=torch.int32)
    place = torch.arange(k, dtype=torch.int32, device=x.ranking.device)
    places = torch.full(x.scores.shape, k, dtype=torch.int32, device=x.ranking.device)
    return places.scatter_(1, x.ranking.long(), place.expand(x.ranking.shape))

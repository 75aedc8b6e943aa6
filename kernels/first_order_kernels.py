"""Triton device code of order 1, launched by `first_order_triton.py`."""

import triton
import triton.language as tl

from rankloss.kernels.tiles import LOG2E

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
    K,
    M,
    B: tl.constexpr,
    COMPLETE: tl.constexpr,
):
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
    K,
    M,
    B: tl.constexpr,
    COMPLETE: tl.constexpr,
):
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

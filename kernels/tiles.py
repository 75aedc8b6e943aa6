"""Triton building blocks of the high-order kernels: candidates, query and key tiles.

Columns of a tile run over the concatenated width W = (R-1) r of all transition terms: column c
belongs to term m = c // r + 1 and component c % r. One dot product over W therefore adds up all
terms, and any r and R are padded once, at the end of W.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def query_tile(
    pi_row,  # ranking of one anchor, int64
    predecessors,  # (R(R-1)/2, M, r)
    k,  # (BK,) places, from 0
    K,
    M,
    w,  # (BW,) columns of W
    R: tl.constexpr,
    r: tl.constexpr,
):
    """Products of predecessor rows, (BK, BW) float32; 0 where a place has too few predecessors."""
    m = w // r + 1
    term = (m * (m - 1) // 2).to(tl.int64)
    used = (k[:, None] >= m[None, :]) & (k < K)[:, None] & (m < R)[None, :]
    q = tl.where(used, 1.0, 0.0)
    for j in tl.static_range(1, R):
        a = tl.load(pi_row + k - j, mask=(k >= j) & (k < K), other=0)  # (BK,)
        rows = (term + j - 1)[None, :] * M + a[:, None]
        factor = tl.load(
            predecessors + rows * r + (w % r)[None, :],
            mask=used & (m >= j)[None, :],
            other=1.0,
        )
        q *= factor.to(tl.float32)
    return q


@triton.jit
def key_tile(
    keys,  # (R-1, M, r)
    ids,  # (BJ,) int64
    inside,  # (BJ,)
    M,
    w,  # (BW,)
    R: tl.constexpr,
    r: tl.constexpr,
):
    """Keys of some candidates, (BJ, BW) in their own dtype."""
    rows = (w // r).to(tl.int64)[None, :] * M + ids[:, None]
    mask = inside[:, None] & (w < (R - 1) * r)[None, :]
    return tl.load(keys + rows * r + (w % r)[None, :], mask=mask, other=0.0)


@triton.jit
def candidates(pi_row, place_row, j, M, RANKED: tl.constexpr):
    """Ids, places and validity of the candidates at positions j of the walk.

    The walk follows the (completed) ranking, so that position is place, or the natural order.
    """
    inside = j < M
    if RANKED:
        ids = tl.load(pi_row + j, mask=inside, other=0)
        place = j
    else:
        ids = j.to(tl.int64)
        place = tl.load(place_row + j, mask=inside, other=-1)
    return ids, place, inside


@triton.jit
def utilities(
    pi_row,
    predecessors,
    keys,
    q,  # (BK, W) in the keys' dtype; used when one block of columns holds all of W
    s,  # (BJ,) scores of the candidates, times log2(e)
    ids,
    inside,
    k,
    K,
    M,
    R: tl.constexpr,
    r: tl.constexpr,
    BW: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Utilities times log2(e), (BK, BJ) float32, of candidates whether taken or not."""
    w = tl.arange(0, BW)
    if SPLITS == 1:
        c = key_tile(keys, ids, inside, M, w, R, r)
        u = tl.dot(q, tl.trans(c), input_precision=PRECISION)
    else:
        u = tl.zeros((k.shape[0], ids.shape[0]), tl.float32)
        for split in range(SPLITS):  # unrolled, all blocks' queries would be kept in registers
            part = query_tile(pi_row, predecessors, k, K, M, w + split * BW, R, r)
            c = key_tile(keys, ids, inside, M, w + split * BW, R, r)
            u = tl.dot(part.to(c.dtype), tl.trans(c), u, input_precision=PRECISION)
    return u * LOG2E + s[None, :]

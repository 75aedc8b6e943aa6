"""Triton device code of the high-order likelihood, launched by `high_order_triton.py`."""

import triton
import triton.language as tl

from rankloss.kernels.tiles import LOG2E, candidates, key_tile, query_tile, utilities

_SIZES = ["K", "M", "first", "chunk"]  # never specialised on: one compilation serves all shapes


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    scores,  # (N, M) float32
    ranking,  # (N, M if RANKED else K) int64
    places,  # (N, M) int32, K for unranked; natural walk only
    lengths,  # (N,) int64
    weights,  # (K,) float32
    predecessors,
    keys,
    key_norms,  # (M,) float32; SKIP only
    lse,  # out (N, K) float32, in binary orders
    nll,  # out (N, place tiles) float32: weighted sums over a tile
    live,  # out (N, place tiles, candidate tiles) int8; SKIP only
    K,
    M,
    T,
    R: tl.constexpr,
    r: tl.constexpr,
    BW: tl.constexpr,
    SPLITS: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    RANKED: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(K, BK)
    i = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    k = tile * BK + tl.arange(0, BK)
    count = tl.load(lengths + i)
    counts = k < count
    pi_row = ranking + i * (M if RANKED else K)
    place_row = places + i * M
    w = tl.arange(0, BW)
    q = query_tile(pi_row, predecessors, k, K, M, w, R, r)
    norm = tl.sqrt(tl.sum(q * q, 1))
    if SKIP:
        for split in range(1, SPLITS):
            more = query_tile(pi_row, predecessors, k, K, M, w + split * BW, R, r)
            norm = tl.sqrt(norm * norm + tl.sum(more * more, 1))
    q = q.to(keys.dtype.element_ty)

    top = tl.full((BK,), float("-inf"), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    chosen = tl.zeros((BK,), tl.float32)
    start = (tile * BK) // BJ * BJ if RANKED else 0
    stop = tl.where(tile * BK < count, M, start)
    live_row = live + (i * tiles + tile) * tl.cdiv(M, BJ)
    for j0 in range(start, stop, BJ):
        j = j0 + tl.arange(0, BJ)
        ids, place, inside = candidates(pi_row, place_row, j, M, RANKED)
        s = tl.load(scores + i * M + ids, mask=inside, other=float("-inf")) * LOG2E
        holds = (place[None, :] == k[:, None]) & counts[:, None]  # its place's own candidate
        if SKIP:
            norms = tl.load(key_norms + ids, mask=inside, other=0.0)
            # 1% covers the rounding of q to the keys' dtype
            bound = tl.max(s, 0) + 1.01 * LOG2E * norm * tl.max(norms, 0)
            needed = tl.max(((bound > top - T) & counts).to(tl.int32), 0)
            needed = tl.maximum(needed, tl.max(tl.max(holds.to(tl.int32), 1), 0))
        else:
            needed = 1
        if needed > 0:
            u = utilities(
                pi_row, predecessors, keys, q, s, ids, inside, k, K, M, R, r, BW, SPLITS, PRECISION
            )
            u = tl.where(inside[None, :] & (place[None, :] >= k[:, None]), u, float("-inf"))
            best = tl.max(u, 1)
            higher = tl.maximum(top, best)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(u - base[:, None]), 1)
            chosen += tl.sum(tl.where(holds, u, 0.0), 1)
            if SKIP:
                needed = tl.max(((best > higher - T) & counts).to(tl.int32), 0)
                needed = tl.maximum(needed, tl.max(tl.max(holds.to(tl.int32), 1), 0))
            top = higher
        if SKIP:
            tl.store(live_row + j0 // BJ, needed.to(tl.int8))

    row = tl.where(counts, top + tl.log2(tl.where(counts, total, 1.0)), float("inf"))
    tl.store(lse + i * K + k, row, mask=k < K)
    weight = tl.load(weights + k, mask=k < K, other=0.0)
    loss = tl.where(counts, row - chosen, 0.0) * weight / LOG2E
    tl.store(nll + i * tiles + tile, tl.sum(loss, 0))


@triton.jit
def probability_errors(u, lse_tile, k, place, inside):
    """p - [taken here], (BK, BJ) float32; 0 outside the list."""
    remaining = inside[None, :] & (place[None, :] >= k[:, None])
    p = tl.exp2(tl.where(remaining, u - lse_tile[:, None], float("-inf")))
    here = (place[None, :] == k[:, None]) & (lse_tile < float("inf"))[:, None]
    return tl.where(here, p - 1.0, p)


@triton.jit(do_not_specialize=_SIZES)
def backward_queries_kernel(
    scores,
    ranking,
    places,
    lengths,
    weights,
    predecessors,
    keys,
    lse,
    live,
    d_queries,  # out (chunk, K, W): w_k sum_d (p - [taken]) C[d]
    first,  # anchor at which the chunk starts
    K,
    M,
    R: tl.constexpr,
    r: tl.constexpr,
    BW: tl.constexpr,
    SPLITS: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    RANKED: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(K, BK)
    local = (tl.program_id(0) // tiles).to(tl.int64)
    i = first + local
    tile = tl.program_id(0) % tiles
    k = tile * BK + tl.arange(0, BK)
    pi_row = ranking + i * (M if RANKED else K)
    place_row = places + i * M
    w = tl.arange(0, BW)
    own = w + tl.program_id(1) * BW  # the columns this program makes
    q = query_tile(pi_row, predecessors, k, K, M, w, R, r).to(keys.dtype.element_ty)
    lse_tile = tl.load(lse + i * K + k, mask=k < K, other=float("inf"))
    start = (tile * BK) // BJ * BJ if RANKED else 0
    stop = tl.where(tile * BK < tl.load(lengths + i), M, start)
    live_row = live + (i * tiles + tile) * tl.cdiv(M, BJ)
    acc = tl.zeros((BK, BW), tl.float32)
    for j0 in range(start, stop, BJ):
        needed = tl.load(live_row + j0 // BJ).to(tl.int32) if SKIP else 1
        if needed > 0:
            j = j0 + tl.arange(0, BJ)
            ids, place, inside = candidates(pi_row, place_row, j, M, RANKED)
            s = tl.load(scores + i * M + ids, mask=inside, other=float("-inf")) * LOG2E
            u = utilities(
                pi_row, predecessors, keys, q, s, ids, inside, k, K, M, R, r, BW, SPLITS, PRECISION
            )
            error = probability_errors(u, lse_tile, k, place, inside)
            c = key_tile(keys, ids, inside, M, own, R, r)
            acc = tl.dot(error.to(c.dtype), c, acc, input_precision=PRECISION)
    weight = tl.load(weights + k, mask=k < K, other=0.0)
    out = d_queries + (local * K + k)[:, None] * (SPLITS * BW) + own[None, :]
    acc = acc * weight[:, None]
    tl.store(out, acc.to(d_queries.dtype.element_ty), mask=(k < K)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def backward_keys_kernel(
    scores,
    ranking,
    places,
    lengths,
    weights,
    grad,  # (N,) float32
    predecessors,
    keys,
    lse,
    live,
    d_scores,  # out (N, M) float32
    d_keys,  # out (chunk, M, W), in the order of the walk: sum_k w_k (p - [taken]) Q_k
    first,
    K,
    M,
    R: tl.constexpr,
    r: tl.constexpr,
    BW: tl.constexpr,
    SPLITS: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    RANKED: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(M, BJ)
    local = (tl.program_id(0) // tiles).to(tl.int64)
    i = first + local
    tile = tl.program_id(0) % tiles
    j = tile * BJ + tl.arange(0, BJ)
    pi_row = ranking + i * (M if RANKED else K)
    ids, place, inside = candidates(pi_row, places + i * M, j, M, RANKED)
    s = tl.load(scores + i * M + ids, mask=inside, other=float("-inf")) * LOG2E
    w = tl.arange(0, BW)
    own = w + tl.program_id(1) * BW
    stop = tl.load(lengths + i).to(tl.int32)  # places in 64 bits cost registers
    if RANKED:
        stop = tl.minimum(stop, (tile + 1) * BJ)  # later places never see these candidates
    column = live + i * tl.cdiv(K, BK) * tiles + tile
    acc = tl.zeros((BJ, BW), tl.float32)
    acc_scores = tl.zeros((BJ,), tl.float32)
    for k0 in range(0, stop, BK):
        needed = tl.load(column + (k0 // BK) * tiles.to(tl.int64)).to(tl.int32) if SKIP else 1
        if needed > 0:
            k = k0 + tl.arange(0, BK)
            q = query_tile(pi_row, predecessors, k, K, M, w, R, r).to(keys.dtype.element_ty)
            u = utilities(
                pi_row, predecessors, keys, q, s, ids, inside, k, K, M, R, r, BW, SPLITS, PRECISION
            )
            lse_tile = tl.load(lse + i * K + k, mask=k < K, other=float("inf"))
            weight = tl.load(weights + k, mask=k < K, other=0.0)
            error = probability_errors(u, lse_tile, k, place, inside) * weight[:, None]
            acc_scores += tl.sum(error, 0)
            if SPLITS > 1:
                q = query_tile(pi_row, predecessors, k, K, M, own, R, r).to(keys.dtype.element_ty)
            acc = tl.dot(tl.trans(error.to(q.dtype)), q, acc, input_precision=PRECISION)
    first_split = tl.program_id(1) == 0  # the others would store the same values
    d_scores_row = acc_scores * tl.load(grad + i)
    tl.store(d_scores + i * M + ids, d_scores_row, mask=inside & first_split)
    out = d_keys + (local * M + j)[:, None] * (SPLITS * BW) + own[None, :]
    tl.store(out, acc.to(d_keys.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=_SIZES)
def collect_kernel(
    ranking,
    places,  # (N, M) int32 place of every candidate; K and more: unranked
    grad,
    predecessors,
    d_queries,  # (chunk, K, W)
    d_keys,  # (chunk, M, W)
    d_predecessors,  # in and out (R(R-1)/2, M, r) float32
    d_key_table,  # in and out (R-1, M, r) float32
    first,
    chunk,
    K,
    M,
    R: tl.constexpr,
    r: tl.constexpr,
    W: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BA: tl.constexpr,
    RANKED: tl.constexpr,
):
    """Add the chunk's gradients of one term, program axis 1 choosing the table, axis 0 its rows."""
    a = tl.program_id(0) * BA + tl.arange(0, BA)
    component = tl.arange(0, BR)
    table = tl.program_id(1)
    row = tl.arange(0, BN * BA)  # anchors x candidates
    candidate = tl.program_id(0) * BA + row % BA
    big = M.to(tl.int64)
    acc = tl.zeros((BA, BR), tl.float32)
    for term in tl.static_range(1, R):
        for back in tl.static_range(0, term + 1):  # 0: the key, else the factor taken `back` ago
            if table == term * (term + 1) // 2 - 1 + back:
                for n0 in range(0, chunk, BN):
                    local = n0 + row // BA
                    valid = (local < chunk) & (candidate < M)
                    i = (first + local).to(tl.int64)
                    place = tl.load(places + i * M + candidate, mask=valid, other=0)
                    columns = ((term - 1) * r + component)[None, :]
                    if back == 0:
                        source = place if RANKED else candidate
                        used = valid[:, None] & (component < r)[None, :]
                        at = (local.to(tl.int64) * M + source)[:, None] * W + columns
                        value = tl.load(d_keys + at, mask=used, other=0.0).to(tl.float32)
                    else:
                        k = place + back
                        reached = valid & (k < K) & (k >= term)
                        used = reached[:, None] & (component < r)[None, :]
                        at = (local.to(tl.int64) * K + k)[:, None] * W + columns
                        value = tl.load(d_queries + at, mask=used, other=0.0).to(tl.float32)
                        for other in tl.static_range(1, term + 1):
                            if other != back:
                                before = tl.load(
                                    ranking + i * (M if RANKED else K) + k - other,
                                    mask=reached,
                                    other=0,
                                )
                                at = (term * (term - 1) // 2 + other - 1) * M + before
                                value *= tl.load(
                                    predecessors + at[:, None] * r + component[None, :],
                                    mask=used,
                                    other=0.0,
                                ).to(tl.float32)
                    upstream = tl.load(grad + i, mask=valid, other=0.0)
                    value *= upstream[:, None]
                    acc += tl.sum(tl.reshape(value, (BN, BA, BR)), 0)
                inside = (a < M)[:, None] & (component < r)[None, :]
                if back == 0:
                    out = d_key_table + ((term - 1) * big + a)[:, None] * r
                else:
                    out = (
                        d_predecessors
                        + ((term * (term - 1) // 2 + back - 1) * big + a)[:, None] * r
                    )
                out += component[None, :]
                tl.store(out, tl.load(out, mask=inside, other=0.0) + acc, mask=inside)

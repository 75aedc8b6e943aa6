"""The likelihood of orders >= 2 in Triton: two streaming passes over prepared operands.

    prepare   queries Q (products of predecessor rows), the list's keys C and scores S of a chunk
              of anchors, in the order of the walk, padded to whole tiles
    forward   log-sum-exp of every place, and with it dQ: attention whose values are its keys
    backward  dC and dS, on transposed tiles (rows are candidates)
    collect   dQ and dC, gathered for every candidate, become the gradients of the tables

A place sees the candidates that are not yet taken. They come as a *list*, which starts with the
ranked candidates in their order, so that a place's tile masks its own diagonal and nothing else,
and (natural walk) the *rest*: all candidates in the order of their ids, whose keys need no copy for
each anchor, the ranked ones at score -inf. The *ranked walk* (K near M) has everything in the list
and no rest. `walks_ranked` has the rule. Scores of padding are -inf, log-sum-exps of padding and of
places that do not count +inf: then no tile but the diagonal's is masked, and probabilities are 0.

Numbers. Logarithms are binary. dQ is w (sum_j p_j C_j - C_taken), subtracted in float32 before any
rounding, for a confident place's gradient is the small difference of the two; so is p - w on the
diagonal. The running maximum starts at -1e38, not -inf: no infinities are subtracted. Weights
are near 1, for which callers see, and with tables of half precision p carries a factor 2^LIFT in
the backward pass: both keep products within range. No atomics: results repeat bit for bit.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankloss.kernels.configurations import Plan, plan_for
from rankloss.kernels.launch import on_device_of
from rankloss.kernels.signature import Lists

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HALF_LIFT = tl.constexpr(8.0)  # binary orders; 1/M of a long, level list is no normal float16
LOWEST = tl.constexpr(-1e38)

# No kernel is specialised on sizes, so one compilation serves all shapes. Sizes in whole tiles are
# specialised on, for they all divide by 16, which lets loads be wide.
# ---------------------------------------------------------------- prepare


@triton.jit(do_not_specialize=["first", "listing_first", "K", "M", "L"])
def prepare_kernel(
    scores,  # (N, M) float32
    listing,  # ids of the list, rows of L
    predecessors,  # (R(R-1)/2, M, r)
    keys,  # (R-1, M, r)
    Q,  # out (chunk, places_padded, W) products of predecessor rows
    C,  # out (chunk, P, W) keys
    S,  # out (chunk, P) scores in binary orders
    places,  # out (chunk, M) int32 position in the list, at the list's candidates; PLACES
    first,  # anchor at which the chunk starts
    listing_first,  # row of `listing` at which it starts
    K,
    M,
    L,
    P,
    places_padded,
    R: tl.constexpr,
    r: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
    BP: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Program axis 0: anchor and BP positions of its list; axis 1: BW columns."""
    tiles = P // BP
    local = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BP + tl.arange(0, BP)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    row = listing + (listing_first + local) * L
    ids = tl.load(row + t, mask=t < L, other=0).to(tl.int64)

    term = w // r + 1
    real = (w < (R - 1) * r)[None, :]
    at = ((term - 1).to(tl.int64)[None, :] * M + ids[:, None]) * r + (w % r)[None, :]
    c = tl.load(keys + at, mask=(t < L)[:, None] & real, other=0.0)
    tl.store(C + (local * P + t)[:, None] * W + w[None, :], c)
    if tl.program_id(1) == 0:
        inside = scores + (first + local) * M + ids
        s = tl.load(inside, mask=t < L, other=float("-inf"))
        tl.store(S + local * P + t, s * LOG2E)
        if PLACES:
            tl.store(places + local * M + ids, t, mask=t < L)

    used = (t[:, None] >= term[None, :]) & (t < K)[:, None] & real
    table = (term * (term - 1) // 2).to(tl.int64)
    q = tl.where(used, 1.0, 0.0)
    for j in tl.static_range(1, R):
        before = tl.load(row + t - j, mask=(t >= j) & (t < K), other=0).to(tl.int64)
        at = ((table + j - 1)[None, :] * M + before[:, None]) * r + (w % r)[None, :]
        mask = used & (term >= j)[None, :]
        q *= tl.load(predecessors + at, mask=mask, other=1.0).to(tl.float32)
    out = Q + (local * places_padded + t)[:, None] * W + w[None, :]
    tl.store(out, q.to(Q.dtype.element_ty), mask=(t < places_padded)[:, None])


# ---------------------------------------------------------------- what both passes share


@triton.jit
def load_rows(x, rows, W: tl.constexpr, BW: tl.constexpr, block):
    """BW columns, from number block * BW, of some rows of a table of width W; int32 offsets."""
    w = block * BW + tl.arange(0, BW)
    return tl.load(x + rows[:, None] * W + w[None, :])


@triton.jit
def products(
    a,  # tile of rows of A, used when W is one block
    b,  # of rows of B
    A,
    a_rows,
    B,
    b_rows,
    W: tl.constexpr,
    BW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<row of A, row of B> for all pairs, float32."""
    if W == BW:
        u = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        u = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
        for block in range(W // BW):  # unrolled, all blocks would be in shared memory at once
            left = load_rows(A, a_rows, W, BW, block)
            right = load_rows(B, b_rows, W, BW, block)
            u = tl.dot(left, tl.trans(right), u, input_precision=PRECISION)
    return u


# ---------------------------------------------------------------- forward


@triton.jit
def utilities(
    q,  # (BK, BW), used when W is one block
    Q,
    places,
    C,
    S,
    rows,
    own,
    W: tl.constexpr,
    BW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Utilities of a tile in binary orders, (BK, BJ), and block `own` of its keys."""
    c = load_rows(C, rows, W, BW, own)
    s = tl.load(S + rows)
    return products(q, c, Q, places, C, rows, W, BW, PRECISION) * LOG2E + s[None, :], c


@triton.jit
def absorb(u, c, top, total, acc, GRAD: tl.constexpr, PRECISION: tl.constexpr):
    """Add a tile of utilities to the running maximum, sum and (GRAD) sum of keys."""
    highest = tl.maximum(top, tl.max(u, 1))
    shrink = tl.exp2(top - highest)
    p = tl.exp2(u - highest[:, None])
    total = total * shrink + tl.sum(p, 1)
    if GRAD:
        acc = tl.dot(p.to(c.dtype), c, acc * shrink[:, None], input_precision=PRECISION)
    return highest, total, acc


@triton.jit(do_not_specialize=["first"])
def forward_kernel(
    Q,  # (chunk, places_padded, W)
    C,  # (chunk, P, W)
    S,  # (chunk, P)
    rest_keys,  # (rest_padded, W); natural walk
    rest_scores,  # (chunk, rest_padded), ranked candidates at -inf; natural walk
    lengths,  # (N,) int64
    weights,  # (places_padded,) float32, the heaviest near 1, 0 beyond K
    nll,  # out (N, place tiles): sums of w l over a tile's places
    shifted,  # out (chunk, places_padded): log-sum-exp - log2(w) - LIFT, +inf where nothing counts
    dQ,  # out (chunk, places_padded, W): w (sum_j p_j C_j - C_taken); GRAD
    first,
    P,
    places_padded,
    rest_padded,
    W: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    RANKED: tl.constexpr,
    GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program axis 0: anchor and BK places; axis 1: the columns of dQ it makes."""
    LIFT: tl.constexpr = 0.0 if Q.dtype.element_ty == tl.float32 else HALF_LIFT
    tiles = places_padded // BK
    local = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    own = tl.program_id(1)
    k = tile * BK + tl.arange(0, BK)
    jj = tl.arange(0, BJ)
    count = tl.load(lengths + first + local).to(tl.int32)
    weight = tl.where(k < count, tl.load(weights + k), 0.0)
    Q += local * places_padded * W
    C += local * P * W
    S += local * P
    rest_scores += local * rest_padded
    shifted += local * places_padded
    dQ += local * places_padded * W
    q = load_rows(Q, k, W, BW, 0)
    top = tl.full((BK,), LOWEST, tl.float32)
    total = tl.zeros((BK,), tl.float32)
    taken = tl.zeros((BK,), tl.float32)
    acc = tl.zeros((BK, BW), tl.float32)

    some = tile * BK < count
    start = tile * BK // BJ * BJ
    middle = tl.where(some, tl.cdiv(tile * BK + BK, BJ) * BJ, start)
    for j0 in range(start, middle, BJ):  # the diagonal
        j = j0 + jj
        u, c = utilities(q, Q, k, C, S, j, own, W, BW, PRECISION)
        u = tl.where(j[None, :] >= k[:, None], u, float("-inf"))
        taken += tl.sum(tl.where(j[None, :] == k[:, None], u, 0.0), 1)
        top, total, acc = absorb(u, c, top, total, acc, GRAD, PRECISION)
    for j0 in range(middle, tl.where(some, P, middle), BJ):
        u, c = utilities(q, Q, k, C, S, j0 + jj, own, W, BW, PRECISION)
        top, total, acc = absorb(u, c, top, total, acc, GRAD, PRECISION)
    if not RANKED:
        for j0 in range(0, tl.where(some, rest_padded, 0), BJ):
            u, c = utilities(q, Q, k, rest_keys, rest_scores, j0 + jj, own, W, BW, PRECISION)
            top, total, acc = absorb(u, c, top, total, acc, GRAD, PRECISION)

    counts = (total != 0) & (weight > 0)  # a total that is NaN counts
    total = tl.where(counts, total, 1.0)
    lse = top + tl.log2(total)
    loss = tl.where(counts, weight, 0.0) * (lse - tl.where(counts, taken, lse))
    if own == 0:
        tl.store(nll + (first + local) * tiles + tile, tl.sum(loss, 0) * LN2)
        shift = lse - tl.log2(tl.where(counts, weight, 1.0)) - LIFT
        tl.store(shifted + k, tl.where(counts, shift, float("inf")))
    if GRAD:
        key = load_rows(C, k, W, BW, own).to(tl.float32)
        gradient = tl.where(counts, weight, 0.0)[:, None] * (acc / total[:, None] - key)
        out = dQ + k[:, None] * W + (own * BW + tl.arange(0, BW))[None, :]
        tl.store(out, gradient.to(dQ.dtype.element_ty))


# ---------------------------------------------------------------- backward


@triton.jit
def pushed(
    c,  # (BJ, BW), used when W is one block
    s,  # (BJ,)
    C,
    rows,
    Q,
    places,
    shifted,
    own,
    W: tl.constexpr,
    BW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2(w p 2^LIFT) of a transposed tile, (BJ, BK), with queries and shifts of its places."""
    q = load_rows(Q, places, W, BW, own)
    shift = tl.load(shifted + places)
    u = products(c, q, C, rows, Q, places, W, BW, PRECISION) * LOG2E + s[:, None]
    return u - shift[None, :], q, shift


@triton.jit(do_not_specialize=["first", "listing_first", "M", "L"])
def backward_kernel(
    Q,
    C,
    S,
    listing,
    lengths,
    weights,
    grad,  # (N,) float32
    shifted,
    d_scores,  # out (N, M), at the list's candidates
    dC,  # out (chunk, P, W): sum_k w_k (p - [taken]) Q_k
    first,
    listing_first,
    M,
    L,
    P,
    places_padded,
    W: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program axis 0: anchor and BJ candidates of its list; axis 1: the columns of dC it makes."""
    LIFT: tl.constexpr = 0.0 if Q.dtype.element_ty == tl.float32 else HALF_LIFT
    tiles = P // BJ
    local = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest first
    own = tl.program_id(1)
    j = tile * BJ + tl.arange(0, BJ)
    kk = tl.arange(0, BK)
    Q += local * places_padded * W
    C += local * P * W
    dC += local * P * W
    shifted += local * places_padded
    c = load_rows(C, j, W, BW, 0)
    s = tl.load(S + local * P + j)
    acc = tl.zeros((BJ, BW), tl.float32)
    ds = tl.zeros((BJ,), tl.float32)

    stop = tl.cdiv(tl.load(lengths + first + local).to(tl.int32), BK) * BK
    middle = tl.minimum(tile * BJ // BK * BK, stop)
    for k0 in range(0, middle, BK):
        u, q, _ = pushed(c, s, C, j, Q, k0 + kk, shifted, own, W, BW, PRECISION)
        p = tl.exp2(u)
        ds += tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), q, acc, input_precision=PRECISION)
    for k0 in range(middle, tl.minimum(tl.cdiv(tile * BJ + BJ, BK) * BK, stop), BK):  # diagonal
        k = k0 + kk
        u, q, shift = pushed(c, s, C, j, Q, k, shifted, own, W, BW, PRECISION)
        weight = tl.where(shift < float("inf"), tl.load(weights + k), 0.0) * (2.0**LIFT)
        p = tl.exp2(tl.where(k[None, :] <= j[:, None], u, float("-inf")))
        p = tl.where(k[None, :] == j[:, None], p - weight[None, :], p)
        ds += tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), q, acc, input_precision=PRECISION)

    if own == 0:
        ids = tl.load(listing + (listing_first + local) * L + j, mask=j < L, other=0)
        ds *= tl.load(grad + first + local) * (2.0**-LIFT)
        tl.store(d_scores + (first + local) * M + ids, ds, mask=j < L)
    out = dC + j[:, None] * W + (own * BW + tl.arange(0, BW))[None, :]
    tl.store(out, (acc * (2.0**-LIFT)).to(dC.dtype.element_ty))


@triton.jit(do_not_specialize=["first", "anchors", "group", "M"])
def backward_rest_kernel(
    Q,
    rest_keys,
    rest_scores,
    lengths,
    grad,
    shifted,
    d_scores,  # out (N, M), at every candidate; the list's are overwritten later
    d_rest,  # in and out (groups, rest_padded, W) float32
    first,
    anchors,  # in the chunk
    group,  # anchors that one program adds up
    M,
    places_padded,
    rest_padded,
    W: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Natural walk. Program axis 0: BJ candidates; axis 1: columns; axis 2: some of the anchors."""
    LIFT: tl.constexpr = 0.0 if Q.dtype.element_ty == tl.float32 else HALF_LIFT
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    own = tl.program_id(1)
    kk = tl.arange(0, BK)
    c = load_rows(rest_keys, j, W, BW, 0)
    kept = tl.program_id(2).to(tl.int64) * rest_padded + j
    kept = d_rest + kept[:, None] * W + (own * BW + tl.arange(0, BW))[None, :]
    gathered = tl.load(kept)
    begin = tl.program_id(2).to(tl.int64) * group
    for step in range(tl.minimum(group, anchors - begin).to(tl.int32)):
        local = begin + step
        s = tl.load(rest_scores + local * rest_padded + j)
        upstream = tl.load(grad + first + local)
        stop = tl.cdiv(tl.load(lengths + first + local).to(tl.int32), BK) * BK
        Q_i, shifted_i = Q + local * places_padded * W, shifted + local * places_padded
        acc = tl.zeros((BJ, BW), tl.float32)
        ds = tl.zeros((BJ,), tl.float32)
        for k0 in range(0, stop, BK):
            k = k0 + kk
            u, q, _ = pushed(c, s, rest_keys, j, Q_i, k, shifted_i, own, W, BW, PRECISION)
            p = tl.exp2(u)
            ds += tl.sum(p, 1)
            acc = tl.dot(p.to(q.dtype), q, acc, input_precision=PRECISION)
        upstream *= 2.0**-LIFT
        gathered += acc * upstream
        if own == 0:
            tl.store(d_scores + (first + local) * M + j, ds * upstream, mask=j < M)
    tl.store(kept, gathered)


# ---------------------------------------------------------------- collect


@triton.jit(do_not_specialize=["first", "listing_first", "anchors", "K", "M", "L"])
def collect_kernel(
    listing,
    places,  # (chunk, M) int32 position of every candidate in the list; L: not in it
    grad,
    predecessors,
    dQ,
    dC,
    d_predecessors,  # in and out (R(R-1)/2, M, r) float32; out where `first` is 0
    d_keys,  # in and out (R-1, M, r) float32; the same
    first,
    listing_first,
    anchors,
    K,
    M,
    L,
    P,
    places_padded,
    R: tl.constexpr,
    r: tl.constexpr,
    W: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BA: tl.constexpr,
):
    """Add the chunk's gradients of one table, by program axis 1; axis 0: BA of its rows."""
    a = tl.program_id(0) * BA + tl.arange(0, BA)
    component = tl.arange(0, BR)
    table = tl.program_id(1)
    row = tl.arange(0, BN * BA)  # anchors x candidates
    candidate = tl.program_id(0) * BA + row % BA
    big = M.to(tl.int64)
    for term in tl.static_range(1, R):
        for back in tl.static_range(0, term + 1):  # 0: the key, else the factor taken `back` ago
            if table == term * (term + 1) // 2 - 1 + back:
                acc = tl.zeros((BA, BR), tl.float32)
                columns = ((term - 1) * r + component)[None, :]
                for n0 in range(0, anchors, BN):
                    local = (n0 + row // BA).to(tl.int64)
                    valid = (local < anchors) & (candidate < M)
                    place = tl.load(places + local * M + candidate, mask=valid, other=0)
                    if back == 0:
                        used = (valid & (place < L))[:, None] & (component < r)[None, :]
                        at = (local * P + place)[:, None] * W + columns
                        value = tl.load(dC + at, mask=used, other=0.0).to(tl.float32)
                    else:
                        k = place + back
                        reached = valid & (k < K) & (k >= term)
                        used = reached[:, None] & (component < r)[None, :]
                        at = (local * places_padded + k)[:, None] * W + columns
                        value = tl.load(dQ + at, mask=used, other=0.0).to(tl.float32)
                        for other in tl.static_range(1, term + 1):
                            if other != back:
                                before = listing + (listing_first + local) * L + k - other
                                before = tl.load(before, mask=reached, other=0).to(tl.int64)
                                at = (term * (term - 1) // 2 + other - 1) * big + before
                                at = at[:, None] * r + component[None, :]
                                factor = tl.load(predecessors + at, mask=used, other=0.0)
                                value *= factor.to(tl.float32)
                    upstream = tl.load(grad + first + local, mask=valid, other=0.0)
                    value *= upstream[:, None]
                    acc += tl.sum(tl.reshape(value, (BN, BA, BR)), 0)
                inside = (a < M)[:, None] & (component < r)[None, :]
                if back == 0:
                    out = d_keys + ((term - 1) * big + a)[:, None] * r
                else:
                    out = d_predecessors
                    out += ((term * (term - 1) // 2 + back - 1) * big + a)[:, None] * r
                out += component[None, :]
                before = tl.load(out, mask=inside & (first > 0), other=0.0)
                tl.store(out, before + acc, mask=inside)


def collect_blocks(r: int) -> dict[str, int]:
    """Tile of the collecting kernel: BN anchors, BA candidates, BR components; 4096 numbers."""
    components = triton.next_power_of_2(r)
    candidates = 16 if components <= 64 else 8
    anchors = max(1, min(32, 4096 // (candidates * components)))
    return {"BR": components, "BN": anchors, "BA": candidates}


# ---------------------------------------------------------------- sizes

SMALL_CHUNK = 56 << 20  # bytes of a chunk's buffers when five of them are enough: few launches
LARGE_CHUNK = 30 << 20  # the same when it takes more: they stay in a GPU's L2 cache
MOST = 96 << 20  # the same for many scores, of which it may be five floats each: few launches
LONG = 1 << 20  # bytes of an anchor's buffers from which on few anchors occupy a GPU
GROUPS = 256  # programs among which the gradient of the rest's keys is shared, about
PREPARED_ROWS = 32  # positions that one program prepares, at most


def walks_ranked(k: int, m: int) -> bool:
    """Say if the list holds all candidates.

    Then a place visits M - K/2 of them on average, and M + K/2 in the natural walk, where
    however keys are read in place: none are copied for each anchor, none collected from a copy.
    """
    return 2 * k >= m


class Sizes(NamedTuple):
    """Sizes of one call; those in whole tiles are multiples of every tile's sides."""

    n: int
    m: int
    k: int
    order: int
    r: int
    width: int  # W, in whole blocks
    block: int  # columns of one matrix product
    ranked: bool
    listed: int  # L, candidates of a list
    padded: int  # P, the same in whole tiles
    places: int  # K in whole tiles
    rest: int  # M in whole tiles in the natural walk, else 0

    @property
    def completed(self) -> bool:
        """Say if unranked candidates have to be added to the list."""
        return self.listed > self.k

    def chunk(self, element: int, gradients: bool) -> int:
        """Anchors prepared at a time, for tables of so many bytes a number."""
        own = 2 if self.width > self.block else 1  # else dC stands where C was
        rows = self.padded + self.places  # C, Q
        rows = self.padded * own + self.places * 2 if gradients else rows
        row = rows * self.width * element + 4 * (self.padded + self.places + self.rest)
        row += (4 + 20 * self.completed) * self.m  # places, and what completes a ranking
        few = row <= LONG and self.n * row <= 5 * SMALL_CHUNK
        large = LARGE_CHUNK
        if gradients:
            large = max(large, min(MOST, 5 * 4 * self.n * self.m))
        budget = SMALL_CHUNK if few else large
        most = max(1, min(self.n, budget // row))
        return triton.cdiv(self.n, triton.cdiv(self.n, most)) if self.n else 1


def sizes_of(x: Lists, plan: Plan) -> Sizes:
    (n, m), k = x.scores.shape, x.ranking.shape[1]
    terms, _, r = x.keys.shape
    ranked = walks_ranked(k, m)
    listed = m if ranked else k
    block = plan.block(terms * r)
    padded, rest = (triton.cdiv(x, plan.side) * plan.side for x in (listed, 0 if ranked else m))
    places = triton.cdiv(k, plan.place_side) * plan.place_side
    width = triton.cdiv(terms * r, block) * block
    return Sizes(n, m, k, terms + 1, r, width, block, ranked, listed, padded, places, rest)


# ---------------------------------------------------------------- launches


def nll(x: Lists) -> Tensor:
    """sum_k w_k l_ik, (N,)."""
    return _Call(x, None).run()


def nll_and_gradients(upstream: Tensor, x: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and the gradients of sum_i upstream_i nll_i to scores, predecessors and keys.

    Those of the tables are float32.
    """
    call = _Call(x, upstream)
    value = call.run()
    if not call.size.ranked:
        call.d_keys += _as_table(call.d_rest.sum(0), call.size)
    return value, call.d_scores, call.d_predecessors, call.d_keys


class _Chunk(NamedTuple):
    """Some anchors' buffers."""

    first: int
    anchors: int
    listing: Tensor
    listing_first: int
    places: Tensor  # (anchors, M) int32 position in the list; read for gradients
    Q: Tensor
    C: Tensor
    S: Tensor
    rest_scores: Tensor  # of any size in the ranked walk

    def programs(self, rows: int, tile: int) -> int:
        return self.anchors * (rows // tile)


class _Call:
    """One call: its inputs, what all its chunks share, and what they fill."""

    def __init__(self, x: Lists, upstream: Tensor | None) -> None:
        self.x = x
        width = x.keys.shape[0] * x.keys.shape[2]
        self.plan = plan_for(x.scores.device, x.keys.dtype, width, x.ranking.shape[1])
        self.size = size = sizes_of(x, self.plan)
        padding = size.places - size.k
        self.weights = torch.nn.functional.pad(x.weights, (0, padding)) if padding else x.weights
        self.rest_keys = x.keys if size.ranked else _rest_keys(x.keys, size)
        self.partial = x.scores.new_empty(size.n, size.places // self.plan.forward.places)
        self.grads = upstream is not None
        if upstream is not None:
            self.upstream = upstream
            self.d_scores = torch.empty_like(x.scores)
            make = torch.empty_like if size.n else torch.zeros_like  # the first chunk writes all
            self.d_predecessors = make(x.predecessors, dtype=torch.float32)
            self.d_keys = make(x.keys, dtype=torch.float32)
            shape = (self._groups(), size.rest, size.width)
            self.d_rest = torch.zeros(shape, dtype=torch.float32, device=x.scores.device)

    def run(self) -> Tensor:
        """Fill everything, a chunk of anchors at a time; (N,) values."""
        step = self.size.chunk(self.x.keys.element_size(), self.grads)
        with on_device_of(self.x.scores):
            for first in range(0, self.size.n, step):
                self._run_chunk(first, min(step, self.size.n - first))
        return self.partial.sum(1)

    def _run_chunk(self, first: int, anchors: int) -> None:
        """Fill some anchors' share; their buffers are free again before the next ones'."""
        chunk = self._prepare(first, anchors)
        shifted, dQ = self._forward(chunk)
        if self.grads:
            if not self.size.ranked:
                self._backward_rest(chunk, shifted)
            self._collect(chunk, dQ, self._backward(chunk, shifted))

    def _groups(self) -> int:
        programs = self.size.rest // self.plan.backward_rest.candidates
        return min(self.size.n, triton.cdiv(GROUPS, programs)) if programs else 0

    def _prepare(self, first: int, anchors: int) -> _Chunk:
        x, size = self.x, self.size
        ids = x.ranking[first : first + anchors]
        listing, listing_first = x.ranking, first
        places = x.scores.new_empty((anchors, size.m) if self.grads else 0, dtype=torch.int32)
        if size.completed:
            listing, places = _completed(_places(ids, size), size)
            listing_first = 0
        elif self.grads and not size.ranked:
            places.fill_(size.listed)
        rest = x.scores
        if not size.ranked:
            rest = _rest_scores(x.scores[first : first + anchors], ids, size)
        queries = x.keys.new_empty(anchors, size.places, size.width)
        keys = x.keys.new_empty(anchors, size.padded, size.width)
        scores = x.scores.new_empty(anchors, size.padded)
        chunk = _Chunk(first, anchors, listing, listing_first, places, queries, keys, scores, rest)
        rows = min(PREPARED_ROWS, self.plan.side)
        prepare_kernel[(chunk.programs(size.padded, rows), self._blocks())](
            x.scores,
            listing,
            x.predecessors,
            x.keys,
            queries,
            keys,
            scores,
            places,
            first,
            listing_first,
            size.k,
            size.m,
            size.listed,
            size.padded,
            size.places,
            R=size.order,
            r=size.r,
            W=size.width,
            BW=size.block,
            BP=rows,
            PLACES=self.grads and not size.completed,
        )
        return chunk

    def _blocks(self) -> int:
        return self.size.width // self.size.block

    def _forward(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """Shifted log-sum-exps and dQ; fills the chunk's rows of `partial`."""
        size, tile = self.size, self.plan.forward
        shifted = chunk.S.new_empty(chunk.anchors, size.places)
        dQ = torch.empty_like(chunk.Q) if self.grads else chunk.Q
        blocks = self._blocks() if self.grads else 1
        forward_kernel[(chunk.programs(size.places, tile.places), blocks)](
            chunk.Q,
            chunk.C,
            chunk.S,
            self.rest_keys,
            chunk.rest_scores,
            self.x.lengths,
            self.weights,
            self.partial,
            shifted,
            dQ,
            chunk.first,
            size.padded,
            size.places,
            size.rest,
            RANKED=size.ranked,
            GRAD=self.grads,
            **self.plan.constants(tile, size.width, size.block),
        )
        return shifted, dQ

    def _backward_rest(self, chunk: _Chunk, shifted: Tensor) -> None:
        """Add to `d_rest`; fill the chunk's rows of `d_scores`."""
        size, tile = self.size, self.plan.backward_rest
        groups = len(self.d_rest)
        backward_rest_kernel[(size.rest // tile.candidates, self._blocks(), groups)](
            chunk.Q,
            self.rest_keys,
            chunk.rest_scores,
            self.x.lengths,
            self.upstream,
            shifted,
            self.d_scores,
            self.d_rest,
            chunk.first,
            chunk.anchors,
            triton.cdiv(chunk.anchors, groups),
            size.m,
            size.places,
            size.rest,
            **self.plan.constants(tile, size.width, size.block),
        )

    def _backward(self, chunk: _Chunk, shifted: Tensor) -> Tensor:
        """dC; fills the list's part of the chunk's rows of `d_scores`."""
        size, tile = self.size, self.plan.backward
        # a program reads the keys of its own rows alone, unless it makes some columns of several
        dC = chunk.C if self._blocks() == 1 else torch.empty_like(chunk.C)
        backward_kernel[(chunk.programs(size.padded, tile.candidates), self._blocks())](
            chunk.Q,
            chunk.C,
            chunk.S,
            chunk.listing,
            self.x.lengths,
            self.weights,
            self.upstream,
            shifted,
            self.d_scores,
            dC,
            chunk.first,
            chunk.listing_first,
            size.m,
            size.listed,
            size.padded,
            size.places,
            **self.plan.constants(tile, size.width, size.block),
        )
        return dC

    def _collect(self, chunk: _Chunk, dQ: Tensor, dC: Tensor) -> None:
        size = self.size
        blocks, terms = collect_blocks(size.r), size.order - 1
        collect_kernel[(triton.cdiv(size.m, blocks["BA"]), terms * (terms + 3) // 2)](
            chunk.listing,
            chunk.places,
            self.upstream,
            self.x.predecessors,
            dQ,
            dC,
            self.d_predecessors,
            self.d_keys,
            chunk.first,
            chunk.listing_first,
            chunk.anchors,
            size.k,
            size.m,
            size.listed,
            size.padded,
            size.places,
            R=size.order,
            r=size.r,
            W=size.width,
            **blocks,
        )


# ---------------------------------------------------------------- what PyTorch prepares


def _places(ids: Tensor, size: Sizes) -> Tensor:
    """(anchors, M) int32 position of every candidate in the list; L where it is not in it."""
    place = torch.arange(size.k, dtype=torch.int32, device=ids.device)
    shape = (ids.shape[0], size.m)
    places = torch.full(shape, size.listed, dtype=torch.int32, device=ids.device)
    return places.scatter_(1, ids.long(), place.expand_as(ids))


def _completed(places: Tensor, size: Sizes) -> tuple[Tensor, Tensor]:
    """The list of all candidates, int32, the unranked ones last by id; and places in it."""
    outside = places == size.listed
    behind = outside.cumsum(1, dtype=torch.int32).add_(size.k - 1)
    places = torch.where(outside, behind, places)
    candidates = torch.arange(size.m, dtype=torch.int32, device=places.device)
    listing = torch.empty_like(places)
    return listing.scatter_(1, places.long(), candidates.expand_as(places)), places


def _rest_keys(keys: Tensor, size: Sizes) -> Tensor:
    """(rest, W): keys of all candidates, one row for all terms."""
    flat = keys.transpose(0, 1).flatten(1)
    padding = (0, size.width - flat.shape[1], 0, size.rest - size.m)
    return torch.nn.functional.pad(flat, padding).contiguous()


def _rest_scores(scores: Tensor, ids: Tensor, size: Sizes) -> Tensor:
    """(anchors, rest) in binary orders, -inf at ranked candidates and padding."""
    rest = scores.new_full((ids.shape[0], size.rest), -math.inf)
    torch.mul(scores, LOG2E.value, out=rest[:, : size.m])
    return rest.scatter_(1, ids.long(), -math.inf)


def _as_table(flat: Tensor, size: Sizes) -> Tensor:
    """(rest, W) -> (R-1, M, r)."""
    terms = size.order - 1
    table = flat[: size.m, : terms * size.r]
    return table.reshape(size.m, terms, size.r).transpose(0, 1)

"""Streaming PyTorch implementations of both ops.

The likelihood: the N x K x M utilities exist one tile at a time.

For each block of anchors the ranked candidates' keys are gathered in ranked order, so that what
remains at place k is the suffix k, k+1, ... and each tile of places touches no taken candidate
but those of its own diagonal. Candidates outside the ranking (K < M) are one further,
unordered, group of columns. A tile becomes exponentials, whose sums are the value, and whose
products with keys and queries, divided by those sums, the gradients: each is computed once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.kernels.reference import row_norms
from rankloss.kernels.signature import Lists

TILE = 1 << 19  # utilities alive at a time: 2 MiB in float32, near the cores and worth sharing
GRAM_TILE = 1 << 22  # entries of a Gram matrix, or of rows, alive at a time; 16 MiB in float32
ROWS = 64  # most places in a tile: the diagonal block wastes half of ROWS^2


def nll(x: Lists) -> Tensor:
    """sum_k w_k l_ik, (N,)."""
    x = x._replace(ranking=x.ranking.long())
    if len(x.keys) == 0:
        return _first_order(x)[0]
    value = x.scores.new_zeros(len(x.scores))
    for block in _blocks(x, _concatenate(x.keys)):
        for places in _place_tiles(block):
            _exponentials(block, places, value)
    _replace_at_zero_keys(x, value)
    return value


def nll_and_gradients(upstream: Tensor, x: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and the gradients of sum_i upstream_i nll_i to scores, predecessors and keys."""
    x = x._replace(ranking=x.ranking.long())
    d_predecessors, d_keys = (
        x.predecessors.new_zeros(x.predecessors.shape),
        torch.zeros_like(x.keys),
    )
    if len(x.keys) == 0:
        value, shift = _first_order(x)
        d_scores = _first_order_gradient(x, shift).mul_(upstream[:, None])
        return value, d_scores, d_predecessors, d_keys
    value, d_scores = x.scores.new_zeros(len(x.scores)), torch.zeros_like(x.scores)
    flat = _concatenate(x.keys)
    d_flat = torch.zeros_like(flat)
    for block in _blocks(x, flat):
        _add_gradients(block, upstream[block.rows], value, d_scores, d_predecessors, d_flat)
    _replace_at_zero_keys(x, value, upstream, d_scores)
    d_keys = d_flat.view(-1, x.keys.shape[0], x.keys.shape[2]).transpose(0, 1).contiguous()
    return value, d_scores, d_predecessors, d_keys


# ---------------------------------------------------------------- order 1: one scan, no tiles


def _first_order(x: Lists) -> tuple[Tensor, Tensor]:
    """Values, and log-sum-exps minus log w of every place, +inf where it does not count."""
    counts = torch.arange(x.ranking.shape[1], device=x.scores.device) < x.lengths[:, None]
    ranked = x.scores.gather(1, x.ranking)  # (N, K)
    rest = _unranked(x.scores, x.ranking)
    backwards = ranked.flip(1)
    if rest is not None:
        backwards = torch.cat([rest.logsumexp(1, keepdim=True), backwards], 1)
    lse = backwards.logcumsumexp(1).flip(1)[:, : ranked.shape[1]]
    value = torch.where(counts, lse - ranked, 0.0) @ x.weights
    return value, torch.where(counts, lse, torch.inf) - x.weights.log()


def _first_order_gradient(x: Lists, shift: Tensor) -> Tensor:
    """dS = exp(S_j + log sum over k <= j of w_k exp(-lse_k)): a forward scan of positive terms."""
    taken = torch.where(shift < torch.inf, x.weights, 0.0)  # the gradient of -u at its place
    log_mass = (-shift).logcumsumexp(1)  # (N, K)
    rest = _unranked(x.scores, x.ranking)
    mass = (x.scores.gather(1, x.ranking) + log_mass).exp_().sub_(taken)
    if rest is None:
        return torch.empty_like(x.scores).scatter_(1, x.ranking, mass)
    return rest.add_(log_mass[:, -1:]).exp_().scatter_(1, x.ranking, mass)


def _replace_at_zero_keys(
    x: Lists, value: Tensor, upstream: Tensor | None = None, d_scores: Tensor | None = None
) -> None:
    """Overwrite a higher order's values and gradient of scores, if all keys are zero.

    They are order 1's then, and rounding in tiles must not tell them apart.
    """
    moved = x.keys.any()
    if moved.is_cpu and moved:  # elsewhere nothing waits to know
        return
    first, shift = _first_order(x)
    torch.where(moved, value, first, out=value)
    if upstream is not None and d_scores is not None:
        gradient = _first_order_gradient(x, shift).mul_(upstream[:, None])
        torch.where(moved, d_scores, gradient, out=d_scores)


def _unranked(scores: Tensor, ranking: Tensor) -> Tensor | None:
    """Scores with the ranked candidates at -inf, or None when every candidate is ranked."""
    if ranking.shape[1] == scores.shape[1]:
        return None
    return scores.scatter(1, ranking, -torch.inf)


# ---------------------------------------------------------------- order >= 2: tiles


class _Block(NamedTuple):
    """Some anchors' tensors, n of them, with L gathered candidates of which K places count."""

    rows: slice
    columns: Tensor  # (n, L) int64, candidate ids in ranked order; L = K or M
    ranked: Tensor  # (n, L) scores in ranked order
    ranked_keys: Tensor  # (n, L, W), W = (R-1) r
    factors: list[list[Tensor]]  # per order m: gathered P_m1 ... P_mm, each (n, K-m, r)
    queries: Tensor  # (n, K, W)
    rest: Tensor | None  # (n, M) scores of candidates outside `columns`, the others -inf
    keys: Tensor  # (M, W)
    weights: Tensor  # (n, K), 0 at places that do not count


def _concatenate(keys: Tensor) -> Tensor:
    """(R-1, M, r) -> (M, (R-1) r): all orders' transition terms are one dot product."""
    return keys.transpose(0, 1).flatten(1)


def _blocks(x: Lists, keys: Tensor) -> Iterator[_Block]:
    (n, m), k = x.scores.shape, x.ranking.shape[1]
    place = torch.arange(k, device=x.scores.device)
    gather_all = 2 * k > m  # then gathering the rest too costs less than masking it
    width = m if gather_all else k
    step = max(1, TILE // max(1, min(ROWS, k) * (width if gather_all else m)))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        s, columns = x.scores[rows], x.ranking[rows]
        rest = None if gather_all else _unranked(s, columns)
        if width > k:
            columns = _complete(columns, m)
        factors = _gather_factors(columns[:, :k], x.predecessors)
        yield _Block(
            rows,
            columns,
            s.gather(1, columns),
            _rows_of(keys, columns),
            factors,
            _queries(factors, k, keys),
            rest,
            keys,
            torch.where(place < x.lengths[rows, None], x.weights, 0.0),
        )


def _complete(ranking: Tensor, m: int) -> Tensor:
    """Append the unranked candidates, in any order: (n, K) -> (n, M)."""
    n, k = ranking.shape
    place = torch.arange(k, device=ranking.device).expand(n, k)
    return ranking.new_full((n, m), k).scatter_(1, ranking, place).argsort(1)


def _rows_of(table: Tensor, ids: Tensor) -> Tensor:
    return table.index_select(0, ids.flatten()).view(*ids.shape, table.shape[1])


def _gather_factors(ranking: Tensor, predecessors: Tensor) -> list[list[Tensor]]:
    """P_mj rows of the candidate taken j places earlier, for places m+1 ... K of every order m."""
    k = ranking.shape[1]
    tables = iter(predecessors)
    return [
        [_rows_of(next(tables), ranking[:, m - j : max(k - j, m - j)]) for j in range(1, m + 1)]
        for m in range(1, _order(predecessors))
    ]


def _order(predecessors: Tensor) -> int:
    count, order = predecessors.shape[0], 1
    while order * (order - 1) // 2 < count:
        order += 1
    return order


def _product(factors: list[Tensor], without: int = -1) -> Tensor | None:
    result: Tensor | None = None
    for j, factor in enumerate(factors):
        if j != without:
            result = factor if result is None else result * factor
    return result


def _queries(factors: list[list[Tensor]], k: int, keys: Tensor) -> Tensor:
    n, _, r = factors[0][0].shape
    queries = keys.new_zeros(n, k, keys.shape[1])
    for m, terms in enumerate(factors, start=1):
        product = _product(terms)
        if product is not None and m < k:
            queries[:, m:, (m - 1) * r : m * r] = product
    return queries


def _place_tiles(block: _Block) -> Iterator[slice]:
    k = block.queries.shape[1]
    for start in range(0, k, ROWS):
        yield slice(start, min(start + ROWS, k))


def _utilities(scores: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """scores (n, c) + queries (n, t, W) . keys (n, c, W), as (n, t, c)."""
    bias = scores[:, None, :].expand(-1, queries.shape[1], -1)
    return torch.baddbmm(bias, queries, keys.transpose(1, 2))


class _Exponentials(NamedTuple):
    """exp(u - top) of a tile of places, where `top` is the largest of a place."""

    listed: Tensor  # (n, t, L - start), candidates in ranked order
    rest: Tensor | None  # (n, t, M), those outside `columns`
    total: Tensor  # (n, t), their sums


def _exponentials(block: _Block, places: slice, value: Tensor) -> _Exponentials:
    """Also adds the places' w_k l_ik to `value`."""
    start, queries = places.start, block.queries[:, places]
    u = _utilities(block.ranked[:, start:], queries, block.ranked_keys[:, start:])
    square = u[:, :, : u.shape[1]]
    square.masked_fill_(_below_diagonal(u.shape[1], u.device), -torch.inf)  # taken
    chosen = square.diagonal(dim1=1, dim2=2).clone()
    top = u.amax(2)
    rest = None
    if block.rest is not None:
        rest = _utilities(block.rest, queries, block.keys.expand(len(queries), -1, -1))
        top = torch.maximum(top, rest.amax(2))
    top = top.clamp_(min=torch.finfo(u.dtype).min)  # nothing left: subtract no infinities
    total = u.sub_(top[:, :, None]).exp_().sum(2)
    if rest is not None:
        total += rest.sub_(top[:, :, None]).exp_().sum(2)
    weights = block.weights[:, places]
    loss = torch.where(weights > 0, (top + total.log() - chosen) * weights, 0.0)
    value[block.rows] += loss.sum(1)
    return _Exponentials(u, rest, total)


def _add_gradients(
    block: _Block,
    upstream: Tensor,
    value: Tensor,
    d_scores: Tensor,
    d_predecessors: Tensor,
    d_keys: Tensor,
) -> None:
    """Add what the block's anchors give to their values and to all gradients."""
    k = block.queries.shape[1]
    taken = (block.weights * upstream[:, None])[:, :, None]  # (n, K, 1)
    d_ranked = torch.zeros_like(block.ranked)
    d_ranked_keys = torch.zeros_like(block.ranked_keys)
    d_queries = torch.empty_like(block.queries)
    for places in _place_tiles(block):
        start, queries = places.start, block.queries[:, places]
        e = _exponentials(block, places, value)
        g = torch.where(e.total > 0, taken[:, places, 0] / e.total, 0.0)[:, :, None]  # (n, t, 1)
        scaled = queries * g
        d_ranked[:, start:] += (g.transpose(1, 2) @ e.listed).squeeze(1)
        d_queries[:, places] = (e.listed @ block.ranked_keys[:, start:]) * g
        d_ranked_keys[:, start:] += e.listed.transpose(1, 2) @ scaled  # in place it is one by one
        if e.rest is not None:
            d_scores[block.rows] += (g.transpose(1, 2) @ e.rest).squeeze(1)
            d_queries[:, places] += (e.rest @ block.keys) * g
            d_keys.addmm_(e.rest.flatten(0, 1).T, scaled.flatten(0, 1))
    d_ranked[:, :k] -= taken.squeeze(2)
    d_queries -= taken * block.ranked_keys[:, :k]
    d_ranked_keys[:, :k] -= taken * block.queries
    d_scores[block.rows].scatter_add_(1, block.columns, d_ranked)
    d_keys.index_add_(0, block.columns.flatten(), d_ranked_keys.flatten(0, 1))
    _add_factor_gradients(block, d_queries, d_predecessors)


def _add_factor_gradients(block: _Block, d_queries: Tensor, d_predecessors: Tensor) -> None:
    """The product rule: dP_mj[pi(k-j)] += dQ_m(k) * product of the other factors."""
    k = d_queries.shape[1]
    table = 0
    for m, factors in enumerate(block.factors, start=1):
        r = factors[0].shape[2]
        d_query = d_queries[:, m:, (m - 1) * r : m * r]
        for j in range(1, m + 1):
            others = _product(factors, without=j - 1)
            d_factor = d_query if others is None else d_query * others
            ids = block.columns[:, m - j : max(k - j, m - j)]
            d_predecessors[table].index_add_(0, ids.flatten(), d_factor.flatten(0, 1))
            table += 1


def _below_diagonal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_(-1)


# ---------------------------------------------------------------- the Gram distance


def gram_distance(student: Tensor, teacher: Tensor, negatives: str) -> tuple[Tensor, Tensor]:
    """(B,) distances and the gradient of their sum to the student, a tile at a time.

    Rows too are normalised for a few images at a time: all of them would take more than the tiles.
    """
    b, p, ds = student.shape
    distance, gradient = student.new_zeros(b), torch.empty_like(student)
    images = max(1, GRAM_TILE // max(1, p * p, p * (ds + teacher.shape[2])))
    rows = max(1, min(p, GRAM_TILE // max(1, p)))
    for i in range(0, b, images):
        norms = row_norms(student[i : i + images])
        s = student[i : i + images] / norms
        t = teacher[i : i + images] / row_norms(teacher[i : i + images])
        for j in range(0, p, rows):
            ours = s[:, j : j + rows] @ s.transpose(1, 2)  # (images, rows, P)
            theirs = t[:, j : j + rows] @ t.transpose(1, 2)
            difference = _difference(ours, theirs, negatives)
            distance[i : i + images] += torch.linalg.vector_norm(difference, dim=(1, 2)).square()
            if negatives == "clamp":
                difference.masked_fill_(ours < 0, 0.0)
            gradient[i : i + images, j : j + rows] = 4 * (difference @ s)
        through_normalisation_(gradient[i : i + images], s, norms)
    return distance, gradient


def through_normalisation_(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """A gradient to unit rows becomes, in place, one to the rows they were made of."""
    gradient -= (gradient * unit).sum(-1, keepdim=True) * unit
    return gradient.div_(norms)


def _difference(ours: Tensor, theirs: Tensor, negatives: str) -> Tensor:
    """Their difference as `negatives` counts it; `theirs` is overwritten."""
    if negatives == "keep":
        return torch.sub(ours, theirs, out=theirs)
    if negatives == "clamp":
        return theirs.clamp_(min=0).neg_().add_(ours.clamp(min=0))
    both = (ours < 0) & (theirs < 0)  # then both count as 0
    return theirs.clamp_(min=0).neg_().add_(ours).masked_fill_(both, 0.0)

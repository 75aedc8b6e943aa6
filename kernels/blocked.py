"""Streaming PyTorch implementation: the N x K x M utilities exist one tile at a time.

For each block of anchors the ranked candidates' keys are gathered in ranked order, so that what
remains at place k is the suffix k, k+1, ... and each tile of places touches no taken candidate
but those of its own diagonal. Candidates outside the ranking (K < M) are one further,
unordered, group of columns. The backward pass recomputes each tile from the saved log-sum-exp.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 1 << 19  # utilities alive at a time: 2 MiB in float32, near the cores and worth sharing
ROWS = 64  # most places in a tile: the diagonal block wastes half of ROWS^2


def forward(
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
    *,
    skip: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_k w_k l_ik (N,), log-sum-exp of every place (N, K) with +inf for unused ones, nothing."""
    del skip  # tiles here are too large for any to be skipped
    k = ranking.shape[1]
    counts = torch.arange(k, device=scores.device) < lengths[:, None]
    if keys.shape[0] == 0:
        nll, lse = _first_order_forward(scores, ranking)
    else:
        nll, lse = torch.empty_like(counts, dtype=scores.dtype), scores.new_empty(counts.shape)
        keys = _concatenate(keys)
        for block in _blocks(scores, ranking, predecessors, keys):
            _forward_block(block, nll, lse)
    nll = torch.where(counts, nll, 0.0)
    no_tiles = torch.empty(0, dtype=torch.int8, device=scores.device)
    return nll @ weights, torch.where(counts, lse, torch.inf), no_tiles


def backward(
    grad: Tensor,
    lse: Tensor,
    live: Tensor,
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_i grad_i nll_i to scores (N, M), predecessors and keys."""
    del live, lengths  # places that do not count have lse = +inf, hence probability 0
    taken = torch.where(lse.isfinite(), weights, 0.0)  # (N, K), the gradient of -u at its place
    shift = lse - weights.log()  # exp(u - shift) = w p
    d_scores = scores.new_zeros(scores.shape)
    d_predecessors = predecessors.new_zeros(predecessors.shape)
    if keys.shape[0] == 0:
        _first_order_backward(scores, ranking, shift, d_scores)
        d_keys = keys.new_zeros(keys.shape)
    else:
        flat = _concatenate(keys)
        d_flat = torch.zeros_like(flat)
        for block in _blocks(scores, ranking, predecessors, flat):
            _backward_block(block, shift, taken, grad, d_scores, d_predecessors, d_flat)
        d_keys = d_flat.view(-1, keys.shape[0], keys.shape[2]).transpose(0, 1).contiguous()
    d_scores.scatter_add_(1, ranking, -taken)
    return d_scores.mul_(grad[:, None]), d_predecessors, d_keys


# ---------------------------------------------------------------- order 1: one scan, no tiles


def _first_order_forward(scores: Tensor, ranking: Tensor) -> tuple[Tensor, Tensor]:
    ranked = scores.gather(1, ranking)  # (N, K)
    rest = _unranked(scores, ranking)
    backwards = ranked.flip(1)
    if rest is not None:
        backwards = torch.cat([rest.logsumexp(1, keepdim=True), backwards], 1)
    lse = backwards.logcumsumexp(1).flip(1)[:, : ranked.shape[1]]
    return lse - ranked, lse


def _first_order_backward(scores: Tensor, ranking: Tensor, shift: Tensor, d_scores: Tensor) -> None:
    """dS = exp(S_j + log sum over k <= j of w_k exp(-lse_k)): a forward scan of positive terms."""
    log_mass = (-shift).logcumsumexp(1)  # (N, K)
    rest = _unranked(scores, ranking)
    if rest is not None:
        d_scores.copy_(rest.add_(log_mass[:, -1:]).exp_())
    d_scores.scatter_(1, ranking, (scores.gather(1, ranking) + log_mass).exp_())


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


def _concatenate(keys: Tensor) -> Tensor:
    """(R-1, M, r) -> (M, (R-1) r): all orders' transition terms are one dot product."""
    return keys.transpose(0, 1).flatten(1)


def _blocks(
    scores: Tensor, ranking: Tensor, predecessors: Tensor, keys: Tensor
) -> Iterator[_Block]:
    n, m = scores.shape
    k = ranking.shape[1]
    gather_all = 2 * k > m  # then gathering the rest too costs less than masking it
    width = m if gather_all else k
    step = max(1, TILE // max(1, min(ROWS, k) * (width if gather_all else m)))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        s, columns = scores[rows], ranking[rows]
        rest = None if gather_all else _unranked(s, columns)
        if width > k:
            columns = _complete(columns, m)
        factors = _gather_factors(columns[:, :k], predecessors)
        yield _Block(
            rows,
            columns,
            s.gather(1, columns),
            _rows_of(keys, columns),
            factors,
            _queries(factors, k, keys),
            rest,
            keys,
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


def _tile(block: _Block, places: slice, shift: Tensor | None) -> Tensor:
    """Utilities (minus shift) of candidates places.start, ... in ranked order: (n, t, L-start).

    Entries below the diagonal of the leading square belong to taken candidates.
    """
    keys = block.ranked_keys[:, places.start :]
    return _utilities(block.ranked[:, places.start :], block.queries[:, places], keys, shift)


def _rest_tile(block: _Block, rest: Tensor, places: slice, shift: Tensor | None) -> Tensor:
    """The same of the candidates outside `columns`, in natural order: (n, t, M)."""
    queries = block.queries[:, places]
    return _utilities(rest, queries, block.keys.expand(len(queries), -1, -1), shift)


def _utilities(scores: Tensor, queries: Tensor, keys: Tensor, shift: Tensor | None) -> Tensor:
    """scores (n, c) + queries (n, t, W) . keys (n, c, W) - shift (n, t), as (n, t, c)."""
    if shift is None:
        bias = scores[:, None, :].expand(-1, queries.shape[1], -1)
        return torch.baddbmm(bias, queries, keys.transpose(1, 2))
    return (scores[:, None, :] - shift[:, :, None]).baddbmm_(queries, keys.transpose(1, 2))


def _forward_block(block: _Block, nll: Tensor, lse: Tensor) -> None:
    for places in _place_tiles(block):
        u = _tile(block, places, None)
        t = u.shape[1]
        u[:, :, :t].masked_fill_(_below_diagonal(t, u.device), -torch.inf)
        chosen = u[:, :, :t].diagonal(dim1=1, dim2=2).clone()
        if block.rest is not None:
            u = torch.cat([u, _rest_tile(block, block.rest, places, None)], 2)
        tile_nll = -u.log_softmax(2)[:, :, :t].diagonal(dim1=1, dim2=2)
        nll[block.rows, places] = tile_nll
        lse[block.rows, places] = chosen + tile_nll


def _backward_block(
    block: _Block,
    shift: Tensor,
    taken: Tensor,
    grad: Tensor,
    d_scores: Tensor,
    d_predecessors: Tensor,
    d_keys: Tensor,
) -> None:
    shift, taken, grad = shift[block.rows], taken[block.rows], grad[block.rows]
    k = block.queries.shape[1]
    d_ranked = torch.zeros_like(block.ranked)
    d_ranked_keys = torch.zeros_like(block.ranked_keys)
    d_queries = torch.empty_like(block.queries)
    for places in _place_tiles(block):
        queries = block.queries[:, places]
        start = places.start
        p = _tile(block, places, shift[:, places]).exp_()  # (n, t, L-start)
        p[:, :, : p.shape[1]].triu_()
        d_ranked[:, start:] += p.sum(1)
        d_queries[:, places] = p @ block.ranked_keys[:, start:]
        d_ranked_keys[:, start:] += p.transpose(1, 2) @ queries  # in place it is one by one
        if block.rest is not None:
            p = _rest_tile(block, block.rest, places, shift[:, places]).exp_()  # (n, t, M)
            d_scores[block.rows] += p.sum(1)
            d_queries[:, places] += p @ block.keys
            p = p.mul_(grad[:, None, None]).flatten(0, 1)
            d_keys.addmm_(p.T, queries.flatten(0, 1))
    d_scores[block.rows].scatter_add_(1, block.columns, d_ranked)
    d_queries -= taken[:, :, None] * block.ranked_keys[:, :k]
    d_ranked_keys[:, :k] -= taken[:, :, None] * block.queries
    d_ranked_keys *= grad[:, None, None]
    d_keys.index_add_(0, block.columns.flatten(), d_ranked_keys.flatten(0, 1))
    _add_factor_gradients(block, d_queries.mul_(grad[:, None, None]), d_predecessors)


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

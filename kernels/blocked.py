"""Streaming PyTorch implementations of both ops.

The likelihood: the N x K x M utilities exist one tile at a time, and become in place the
exponentials whose sums are the value, and whose products with keys and queries, divided by those
sums, are the gradients. Each is computed once. Candidates are walked in one of two ways.

- Ranked walk (K > M / 2): keys and scores are gathered in ranked order, so that what remains at
  place k is the suffix k, k+1, ...: a tile of places visits no taken candidate but those of its own
  diagonal.
- Natural walk: candidates stay in the order of their ids, so that all anchors share one table of
  keys and products are of two large matrices. What earlier tiles of places took has score -inf; a
  tile's own places, a square, are masked apart.

Buffers are taken once a call, and blocks of anchors take turns in them: on a CPU the first touch of
fresh memory costs more than the arithmetic on it. They hold at most five times `TILE` numbers on a
CPU (20 MiB in float32), and five times `GPU_TILE` on other devices (320 MiB), where every operation
is a launch: 2,438 of them for values and gradients of order 3 at N = M = K = 1024.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankloss.kernels.reference import row_norms
from rankloss.kernels.signature import Lists

TILE = 1 << 20  # numbers in the largest buffer; small enough to stay near a CPU's cores
ROWS = 64  # most places in a tile: the diagonal square wastes half of ROWS^2
GPU_TILE = 1 << 24  # the same where each operation is a launch: few, and large
GPU_ROWS = 128
GRAM_TILE = 1 << 22  # entries of a Gram matrix, or of rows, alive at a time; 16 MiB in float32
LOG2E = 1.4426950408889634  # exp2 takes a third of the time of exp on a CPU


def nll(x: Lists) -> Tensor:
    """sum_k w_k l_ik, (N,)."""
    x = x._replace(ranking=x.ranking.long())
    if len(x.keys) == 0:
        return _first_order(x)[0]
    value = _Call(x, None).run()
    _replace_at_zero_keys(x, value)
    return value


def nll_and_gradients(upstream: Tensor, x: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and the gradients of sum_i upstream_i nll_i to scores, predecessors and keys."""
    x = x._replace(ranking=x.ranking.long())
    if len(x.keys) == 0:
        value, shift = _first_order(x)
        d_scores = _first_order_gradient(x, shift).mul_(upstream[:, None])
        return value, d_scores, torch.zeros_like(x.predecessors), torch.zeros_like(x.keys)
    call = _Call(x, upstream)
    value = call.run()
    _replace_at_zero_keys(x, value, upstream, call.d_scores)
    return value, call.d_scores, *call.table_gradients()


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


class _Buffers:
    """Memory by name, kept from one block to the next."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Numbers of an earlier use, in a contiguous tensor of this shape."""
        size = math.prod(shape)
        if name not in self.kept or len(self.kept[name]) < size:
            self.kept[name] = self.like.new_empty(size)
        return self.kept[name][:size].view(shape)


class _Tile(NamedTuple):
    """Some places of a block: t of them, n anchors. All but `start` are views of the block's."""

    start: int
    ids: Tensor  # (n, t) int64, what is taken
    queries: Tensor  # (n, t, W)
    top: Tensor  # (n, t), filled: the largest utility,
    total: Tensor  # (n, t), the sum of exp(u - top),
    chosen: Tensor  # (n, t), the utility of the candidate that is taken
    lags: Tensor  # (R-1, n, t, W) factors of the queries


class _Block(NamedTuple):
    """Some anchors' tensors, n of them."""

    rows: slice
    columns: Tensor  # (n, M) int64 candidate ids in ranked order; (n, K) in the natural walk
    ids: Tensor  # (G,) int64 rows of the call's table: keys of the ranked walk, then lags
    keys: Tensor  # (n, M, W); none in the natural walk
    scores: Tensor  # (n, M) in the order of the walk; natural: -inf once an earlier tile took it
    weights: Tensor  # (n, K), 0 at places that do not count
    places: Tensor  # (3, n, K): top, total and chosen of all tiles
    tiles: list[_Tile]


class _Call:
    """One call: its inputs in the form that tiles read, its buffers, and what they fill.

    W = (R-1) r: all orders' transition terms are one product of a query and a key. A query is a
    product too, of R-1 rows: that of lag j has the P_mj of the candidate taken j places earlier,
    and ones at the terms m < j, which reach less far back. Keys and the rows of all lags make one
    table, so that a block gathers once, and adds its gradients once.
    """

    def __init__(self, x: Lists, upstream: Tensor | None) -> None:
        (self.n, self.m), self.k = x.scores.shape, x.ranking.shape[1]
        self.terms, _, self.r = x.keys.shape
        self.width = self.terms * self.r
        self.x, self.upstream = x, upstream
        self.ranked = 2 * self.k > self.m
        self.rows, self.step = self._sizes()
        self.table = torch.cat([x.keys.transpose(0, 1).flatten(1), *self._lag_tables()])
        self.keys = self.table[: self.m]
        self.below = x.scores.new_full((self.rows, self.rows), -torch.inf).tril_(-1)
        self.buffers = _Buffers(x.scores)
        self.value = x.scores.new_zeros(self.n)
        if upstream is not None:
            self.d_scores = torch.empty_like(x.scores)
            self.d_table = torch.zeros_like(self.table)

    def _sizes(self) -> tuple[int, int]:
        """Places of a tile, and anchors of a block: eight blocks at least, unless they are small.

        Then there is little memory to touch for the first time.
        """
        most, rows = (TILE, ROWS) if self.x.scores.is_cpu else (GPU_TILE, GPU_ROWS)
        rows = max(1, min(rows, self.k))
        gathered = (self.m * self.ranked + self.terms * self.k) * self.width
        each = max(1, rows * self.m, gathered)
        return rows, max(1, min(most, max(most // 4, self.n * each // 8)) // each)

    def run(self) -> Tensor:
        """Fill everything, a block of anchors at a time; (N,) values."""
        for start in range(0, self.n, self.step):
            block = self._block(slice(start, min(start + self.step, self.n)))
            if self.upstream is None:
                for tile in block.tiles:
                    self._exponentials(block, tile)
            else:
                self._add_gradients(block, block.weights * self.upstream[block.rows, None])
            top, total, chosen = block.places
            loss = (top + total.log() - chosen) * block.weights
            self.value[block.rows] = torch.where(block.weights > 0, loss, 0.0).sum(1)
        return self.value

    # ------------------------------------------------------------ tables

    def _lag_tables(self) -> Iterator[Tensor]:
        """(M + 1, W) for every lag; the last row is that of places with too few predecessors."""
        for j in range(1, self.terms + 1):
            rows = self.x.keys.new_ones(self.m + 1, self.terms, self.r)
            rows[:-1, j - 1 :] = self._of_lag(self.x.predecessors, j).transpose(0, 1)
            rows[-1, j - 1 :] = 0.0
            yield rows.flatten(1)

    def _of_lag(self, predecessors: Tensor, j: int) -> Tensor:
        """P_mj for m = j ... R-1, (R-j, M, r)."""
        orders = range(j, self.terms + 1)
        return torch.stack([predecessors[m * (m - 1) // 2 + j - 1] for m in orders])

    def table_gradients(self) -> tuple[Tensor, Tensor]:
        """Those of predecessors and keys, in their shapes."""
        d_keys, d_lags = self.d_table.view(-1, self.terms, self.r).tensor_split([self.m])
        d_lags = d_lags.view(self.terms, self.m + 1, self.terms, self.r)[:, :-1]
        pairs = [(m, j) for m in range(self.terms) for j in range(m + 1)]
        d_predecessors = torch.stack([d_lags[j, :, m] for m, j in pairs])
        return d_predecessors, d_keys.transpose(0, 1).contiguous()

    # ------------------------------------------------------------ blocks

    def _block(self, rows: slice) -> _Block:
        x, s, columns = self.x, self.x.scores[rows], self.x.ranking[rows]
        n, k = len(s), self.k
        lags = [pad(columns, (j, 0), value=self.m)[:, :k] for j in range(1, self.terms + 1)]
        ids = [lag.flatten() + (self.m + j * (self.m + 1)) for j, lag in enumerate(lags)]
        scores = self.buffers.take("scores", n, self.m)
        taken = torch.split(columns, self.rows, 1)
        if self.ranked:
            columns = columns if k == self.m else _complete(columns, self.m)
            torch.gather(s, 1, columns, out=scores)
            ids.insert(0, columns.flatten())
        else:
            scores.copy_(s)
        every = torch.cat(ids)
        gathered = self.buffers.take("gathered", len(every), self.width)
        torch.index_select(self.table, 0, every, out=gathered)
        keys, factors = self._parts(gathered, n)
        counts = torch.arange(k, device=s.device) < x.lengths[rows, None]
        weights = torch.where(counts, x.weights, 0.0)
        places = self.buffers.take("places", 3, n, k)
        views = [torch.split(x, self.rows, 1) for x in (self._queries(factors), *places)]
        views = [taken, *views, torch.split(factors, self.rows, 2)]
        tiles = [_Tile(*tile) for tile in zip(range(0, k, self.rows), *views, strict=True)]
        return _Block(rows, columns, every, keys, scores, weights, places, tiles)

    def _parts(self, gathered: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Keys (n, M, W) and lags (R-1, n, K, W) among a block's gathered rows."""
        keys, lags = gathered.tensor_split([n * self.m * self.ranked])
        shape = self.terms, n, self.k, self.width
        return keys.view(n * self.ranked, self.m, self.width), lags.view(shape)

    def _queries(self, lags: Tensor) -> Tensor:
        if self.terms == 1:
            return lags[0]
        queries = torch.mul(lags[0], lags[1], out=self.buffers.take("queries", *lags[0].shape))
        for lag in lags[2:]:
            queries *= lag
        return queries

    # ------------------------------------------------------------ exponentials

    def _exponentials(self, block: _Block, tile: _Tile) -> Tensor:
        """exp(u - top) of a tile, (n, t, candidates); fills the tile's places."""
        u = (
            self._ranked_utilities(block, tile)
            if self.ranked
            else self._natural_utilities(block, tile)
        )
        top = torch.amax(u, 2, out=tile.top)
        top.clamp_(min=torch.finfo(u.dtype).min)  # nothing left: subtract no infinities
        u.sub_(top[:, :, None]).mul_(LOG2E).exp2_()
        torch.sum(u, 2, out=tile.total)
        return u

    def _ranked_utilities(self, block: _Block, tile: _Tile) -> Tensor:
        """Utilities of the candidates from the tile's first on, (n, t, M - start)."""
        n, t, _ = tile.queries.shape
        u = self.buffers.take("u", n, t, self.m - tile.start)
        keys, scores = block.keys[:, tile.start :], block.scores[:, None, tile.start :]
        torch.baddbmm(scores.expand(-1, t, -1), tile.queries, keys.transpose(1, 2), out=u)
        square = u[:, :, :t].add_(self.below[:t, :t])
        tile.chosen.copy_(square.diagonal(dim1=1, dim2=2))
        return u

    def _natural_utilities(self, block: _Block, tile: _Tile) -> Tensor:
        """Utilities of all candidates, (n, t, M)."""
        n, t, _ = tile.queries.shape
        u = self.buffers.take("u", n, t, self.m)
        torch.mm(tile.queries.flatten(0, 1), self.keys.T, out=u.view(n * t, self.m))
        u.add_(block.scores[:, None])
        own = tile.ids[:, None].expand(-1, t, -1)
        square = torch.gather(u, 2, own, out=self.buffers.take("square", n, t, t))
        u.scatter_(2, own, square.add_(self.below[:t, :t]))
        tile.chosen.copy_(square.diagonal(dim1=1, dim2=2))
        block.scores.scatter_(1, tile.ids, -torch.inf)  # for the tiles that follow
        return u

    # ------------------------------------------------------------ gradients

    def _add_gradients(self, block: _Block, taken: Tensor) -> None:
        """Fill the block's places, and add what its anchors give to all gradients.

        A place's gradient is taken (p - 1) at the candidate that it takes, taken p at the others.
        """
        gathered = self.buffers.take("d_gathered", len(block.ids), self.width)
        d_keys, d_lags = self._parts(gathered, len(taken))
        d_scores = self.buffers.take("d_scores", *block.scores.shape)
        tiny = torch.finfo(taken.dtype).tiny
        parts = zip(
            block.tiles,
            torch.split(taken, self.rows, 1),
            torch.split(d_lags, self.rows, 2),
            strict=True,
        )
        for tile, share, d_factors in parts:
            e = self._exponentials(block, tile)
            if self.ranked:
                e.diagonal(dim1=1, dim2=2).sub_(tile.total)
            else:
                e.scatter_add_(2, tile.ids[:, :, None], -tile.total[:, :, None])
            total = tile.total.clamp(min=tiny)  # nothing left: 0 / 0 is 0
            e.mul_((share / total)[:, :, None])
            if tile.start == 0:
                torch.sum(e, 1, out=d_scores)
            else:  # the candidates from the tile's first on, or all
                d_scores[:, -e.shape[2] :].add_(e.sum(1))
            d_query = self.buffers.take("d_query", *tile.queries.shape)
            if self.ranked:
                self._ranked_products(e, block, tile, d_query, d_keys)
            else:
                self._natural_products(e, tile, d_query)
            _product_rule(d_query, tile.lags, d_factors)
        if self.ranked:
            self.d_scores[block.rows].scatter_(1, block.columns, d_scores)
        else:
            self.d_scores[block.rows] = d_scores
        self.d_table.index_add_(0, block.ids, gathered)

    def _ranked_products(
        self, e: Tensor, block: _Block, tile: _Tile, d_query: Tensor, d_keys: Tensor
    ) -> None:
        """Fill the gradient of a tile's queries, and add to that of keys."""
        torch.bmm(e, block.keys[:, tile.start :], out=d_query)
        if tile.start == 0:
            torch.bmm(e.transpose(1, 2), tile.queries, out=d_keys)
            return
        part = d_keys[:, tile.start :]  # written into it, products would be made one by one
        d_key = self.buffers.take("d_key", *part.shape)
        part.add_(torch.bmm(e.transpose(1, 2), tile.queries, out=d_key))

    def _natural_products(self, e: Tensor, tile: _Tile, d_query: Tensor) -> None:
        e = e.flatten(0, 1)
        torch.mm(e, self.keys, out=d_query.view(len(e), self.width))
        self.d_table[: self.m].addmm_(e.T, tile.queries.flatten(0, 1))


def _product_rule(d_query: Tensor, factors: Tensor, d_factors: Tensor) -> None:
    """The gradient of each factor: that of their product, times all others."""
    for j, product in enumerate(d_factors):
        others = [factor for i, factor in enumerate(factors) if i != j]
        if others:
            torch.mul(d_query, others[0], out=product)
        else:
            product.copy_(d_query)
        for other in others[1:]:
            product *= other


def _complete(ranking: Tensor, m: int) -> Tensor:
    """Append the unranked candidates, in any order: (n, K) -> (n, M)."""
    n, k = ranking.shape
    place = torch.arange(k, device=ranking.device).expand(n, k)
    return ranking.new_full((n, m), k).scatter_(1, ranking, place).argsort(1)


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

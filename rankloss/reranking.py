"""Plackett-Luce likelihood of graded labels, for rerankers: padding, ties, weights."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rankloss import kernels
from rankloss.checks import check_mask, check_option
from rankloss.fusion.masks import Mask
from rankloss.options import Reduction
from rankloss.plackett_luce import rankings

Ties = Literal["exact", "random"]
PlaceWeights = Literal["none", "log"] | Tensor | Callable[[Tensor], Tensor]
CHUNK = 1 << 24  # numbers of a tie's integrals held at once


class PlackettLuceLoss(nn.Module):
    """Negative log-likelihood of the ranking that graded labels give, for scores of any reranker.

        nll_i = sum_k w_k l_ik / sum_k w_k      l_ik = log sum over documents d at places >= k of
                                                       exp(score_d)  -  score of the k-th

    over the places of list i, best label first; ListMLE when all w_k are 1, p-ListMLE otherwise.
    Sources: Xia et al. 2008, Lan et al. 2014; the treatment of ties is this project's choice.

    Args:
        ties: how documents with equal labels are ranked among themselves. "exact": any order will
            do, the likelihood of the labels is the sum of those of all orders (computed as an
            integral, to rounding, whatever the size of the tie). A tie at places k..l then has
            weight mean(w_k..w_l). "random": a new order at every call.
        place_weights: w_k of place k = 1, 2, ...: "none" is 1, "log" is 1/ln(k+1); or weights
            (places,), with 0 for places beyond; or a function of the places (a float tensor).
        top_k: the first places that count, against all documents still left; None is all.
        ignore_index: label of documents that are padding.
        reduction: "mean" over the lists that rank anything, weighted; "sum"; or "none", (N,).

    Raises:
        ValueError: an unknown option, or top_k < 1.

    >>> loss = PlackettLuceLoss()
    >>> scores = torch.tensor([[2.0, 0.0, 1.0, 0.0]], requires_grad=True)
    >>> labels = torch.tensor([[3, 1, 1, -100]])     # one best, two equally good, one padding
    >>> round(loss(scores, labels).item(), 4)
    0.1359
    """

    def __init__(
        self,
        *,
        ties: Ties = "exact",
        place_weights: PlaceWeights = "none",
        ignore_index: int = -100,
        top_k: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_option("ties", ties, Ties)
        check_option("reduction", reduction, Reduction)
        if isinstance(place_weights, str) and place_weights not in ("none", "log"):
            raise ValueError(f"unknown place_weights {place_weights!r}; choose 'none' or 'log'")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}; None ranks everything")
        self.ties, self.place_weights, self.top_k = ties, place_weights, top_k
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(
        self, scores: Tensor, labels: Tensor, mask: Mask = None, list_weights: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch of lists; 0 for lists that leave nothing to rank.

        Args:
            scores: (N, M) floating, the reranker's; computed in float32, or float64 if given so.
            labels: (N, M), more is better; `ignore_index` marks padding.
            mask: (N, M) bool, False marks further padding.
            list_weights: (N,) non-negative.

        Raises:
            TypeError: scores are not floating, or mask is not bool.
            ValueError: shapes do not fit.
        """
        _check(scores, labels, mask, list_weights)
        kept = labels != self.ignore_index
        kept = kept if mask is None else kept & mask
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        order, sorted_labels, lengths = self._order(labels, kept)
        weights = self._weights(scores.shape[1], wide)
        if self.ties == "exact":
            ranked = wide.gather(1, order)
            nll = _tied_nll(ranked, sorted_labels, lengths, weights)
        else:
            out = wide.masked_fill(~kept, -torch.inf)
            no_terms = wide.new_empty(0, wide.shape[1], 0)
            nll = kernels.plackett_luce(out, order, lengths, weights, no_terms, no_terms.clone())
        total = weights.cumsum(0)[(lengths - 1).clamp(min=0)]
        nll = torch.where(total > 0, nll / total.clamp(min=torch.finfo(wide.dtype).tiny), 0.0)
        return self._reduce(nll, lengths > 0, list_weights)

    def _order(self, labels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Documents best label first, padding last, (N, M); their labels; documents a list."""
        keys = labels.to(torch.float64).masked_fill(~kept, -torch.inf)
        if self.ties == "exact":
            order = rankings(keys)
        else:
            shuffled = torch.rand(keys.shape, device=keys.device).argsort(1)
            order = shuffled.gather(1, rankings(keys.gather(1, shuffled)))
        return order, keys.gather(1, order), kept.sum(1)

    def _weights(self, m: int, scores: Tensor) -> Tensor:
        """w_k of places 1..M, (M,)."""
        place = torch.arange(1, m + 1, device=scores.device, dtype=scores.dtype)
        given = self.place_weights
        if isinstance(given, Tensor):
            weights = F.pad(given.to(place)[:m], (0, max(0, m - len(given))))
        elif callable(given):
            weights = given(place).to(place)
        else:
            weights = 1 / torch.log1p(place) if given == "log" else torch.ones_like(place)
        return weights if self.top_k is None else weights.masked_fill(place > self.top_k, 0.0)

    def _reduce(self, nll: Tensor, ranked: Tensor, list_weights: Tensor | None) -> Tensor:
        weights = ranked.to(nll.dtype)
        if list_weights is not None:
            weights = weights * list_weights.to(nll.dtype)
        if self.reduction == "none":
            return nll * weights
        total = (nll * weights).sum()
        if self.reduction == "sum":
            return total
        return total / weights.sum().clamp(min=torch.finfo(nll.dtype).tiny)


def _tied_nll(scores: Tensor, labels: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    """(N,) sum over groups of equal labels of their weight times -log P(the group is next).

    scores, labels: (N, M) best label first, padding last; lengths: (N,); weights: (M,).
    """
    n, m = scores.shape
    place = torch.arange(m, device=scores.device).expand(n, m)
    valid = place < lengths[:, None]
    changes = (labels[:, 1:] != labels[:, :-1]) & valid[:, 1:]
    group = F.pad(changes.cumsum(1), (1, 0))  # (N, M), number of the document's group
    size = torch.zeros_like(group).scatter_add(1, group, valid.long())
    mean_weight = torch.zeros_like(scores).scatter_add(1, group, weights * valid)
    mean_weight = mean_weight / size.clamp(min=1)
    rest, left = _rest(scores, valid, size.cumsum(1).gather(1, group), lengths)
    here = size.gather(1, group)
    alone = F.softplus(rest - scores).masked_fill(~(valid & left & (here == 1)), 0.0)
    total = (alone * mean_weight.gather(1, group)).sum(1)
    tied = valid & left & (here > 1)
    largest = int((here * tied).max()) if n else 0
    if largest < 2:
        return total
    nodes = _nodes(scores, largest)
    rows = max(1, CHUNK // (m * len(nodes)))
    parts = []
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        inputs = (scores - rest)[part], tied[part], group[part], nodes
        log_p = checkpoint(_log_first, *inputs, use_reentrant=False)
        parts.append((log_p * mean_weight[part]).sum(1))
    return total - torch.cat(parts)


def _rest(scores: Tensor, valid: Tensor, ends: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp of the scores after each document's group, (N, M), and whether there are any."""
    low = torch.finfo(scores.dtype).min / 4  # stands for -inf, whose gradients are NaN
    suffix = scores.masked_fill(~valid, low).flip(1).logcumsumexp(1).flip(1)
    suffix = F.pad(suffix, (0, 1), value=low)
    left = ends < lengths[:, None]
    rest = suffix.gather(1, ends)
    return torch.where(left, rest, scores.detach()), left


def _log_first(lead: Tensor, tied: Tensor, group: Tensor, nodes: Tensor) -> Tensor:
    """(N, M) log-probability that all of a group come before all of the rest, at its number.

    Documents arrive after exponential times with rates exp(score); the rest's first one at T. All
    of the group are earlier with probability E[prod (1 - exp(-rate T))], an integral over
    x = log(T / mean of T) whose integrand is smooth, log-concave and analytic: the trapezoid rule
    is exact to rounding.

    Args:
        lead: (N, M) score less the rest's log-sum-exp.
        tied: (N, M) bool, in a group of several with a rest.
        group: (N, M) its number.
        nodes: (Q,) equally spaced values of x.
    """
    y = lead.masked_fill(~tied, 0.0)[..., None] + nodes  # (N, M, Q)
    terms = _log1m_exp_exp(y).masked_fill(~tied[..., None], 0.0)
    index = group[..., None].expand_as(terms)
    logs = torch.zeros_like(terms).scatter_add(1, index, terms) + nodes - nodes.exp()
    log_p = logs.logsumexp(2) + (nodes[1] - nodes[0]).log()
    has_tie = torch.zeros_like(group).scatter_add(1, group, tied.long()) > 0
    return log_p.masked_fill(~has_tie, 0.0)


def _log1m_exp_exp(y: Tensor) -> Tensor:
    """log(1 - exp(-exp(y)))."""
    small = y < -30  # the exponential is about to underflow
    rate = y.masked_fill(small, 0.0).clamp(max=6.0).exp()
    return torch.where(small, y - y.clamp(max=0.0).exp() / 2, (-torch.expm1(-rate)).log())


def _nodes(like: Tensor, ties: int) -> Tensor:
    """Values of x, (Q,), for ties of up to so many documents.

    The integrand's largest value lies between x = 0 and log(ties + 1); it falls at least like
    exp(x) to the left and double-exponentially to the right, over a width of 1 / sqrt(ties + 1).
    """
    double = like.dtype == torch.float64
    low, coarse, share = (-40.0, 0.2, 0.7) if double else (-20.0, 0.4, 1.0)
    step = min(coarse, share / math.sqrt(ties + 1))
    high = math.log(ties + 1) + 4.0
    return torch.arange(low, high, step, dtype=like.dtype, device=like.device)


def _check(scores: Tensor, labels: Tensor, mask: Mask, list_weights: Tensor | None) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"PlackettLuceLoss: scores must be floating point, got {scores.dtype}")
    if scores.dim() != 2 or labels.shape != scores.shape:
        raise ValueError(
            "PlackettLuceLoss: scores and labels must both be (N, M), one row a list; got "
            f"{tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if mask is not None:
        shape = {str(tuple(scores.shape)): scores.shape}
        check_mask("PlackettLuceLoss", mask, shape, ("scores", scores))
    if list_weights is not None and list_weights.shape != scores.shape[:1]:
        raise ValueError(
            f"PlackettLuceLoss: list_weights must be ({len(scores)},), got "
            f"{tuple(list_weights.shape)}"
        )

"""The ranking family as pure functions: rankings and their likelihoods.

CLIP, RankCLIP and the higher orders are one likelihood: at place k of a ranking, the candidate
standing there must win a softmax over all candidates not yet taken, whose utilities are their
scores plus, from order 2 on, terms that depend on which candidates were taken just before.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rankloss import kernels
from rankloss.checks import (
    check_inputs,
    check_option,
    check_ranking_values,
    check_score_values,
    check_scores,
    hunts_anomalies,
    should_check_ranking,
)
from rankloss.options import Discount, Reduction
from rankloss.transitions import Transitions


def rankings(scores: Tensor, top_k: int | None = None) -> Tensor:
    """Candidate ids of each row, best score first; equal scores by lower id. Carries no gradient.

    Args:
        scores: (N, M) floating. Compared in float32 (float64 if given so): half-precision
            scores would tie by the hundred after any arithmetic.
        top_k: keep the first `top_k` places; None or more than M keeps all M.

    Returns:
        (N, K) int64.

    Raises:
        TypeError: scores are not floating.
        ValueError: scores are not 2-D, or top_k < 1.

    >>> rankings(torch.tensor([[0.1, 0.9, 0.1], [3.0, 1.0, 2.0]]))
    tensor([[1, 0, 2],
            [0, 2, 1]])
    """
    check_scores("rankings", scores)
    if top_k is not None and top_k < 1:
        raise ValueError(f"rankings: top_k must be at least 1, got {top_k}; None ranks everything")
    m = scores.shape[1]
    scores = scores.detach().to(_compute_dtype(scores))
    if top_k is None or 4 * top_k > m or scores.dtype == torch.float64:
        order = scores.argsort(dim=1, descending=True, stable=True)
        return order if top_k is None or top_k >= m else order[:, :top_k].clone()
    return _stable_keys(scores).topk(top_k, dim=1).indices


def _stable_keys(scores: Tensor) -> Tensor:
    """int64 keys ordered like (score, lower id first), so that a partial sort is stable too."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)  # -0.0 equals 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(scores.shape[1], device=scores.device)
    return ordered.bitwise_left_shift_(32).sub_(ids)


def plackett_luce_nll(
    scores: Tensor,
    ranking: Tensor,
    transitions: Transitions | None = None,
    *,
    discount: Discount = "none",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    impl: str = "auto",
    validate: bool | None = None,
) -> Tensor:
    """Negative log-likelihood of the first K places of each ranking, averaged over places.

        l_ik  = logsumexp over d not in pi_i(<k) of u_ik(d)  -  u_ik(pi_i(k))
        nll_i = sum_k w_k l_ik / sum_k w_k

    The candidates of place k are *all* those not yet taken, not just those of the top K. With
    K = 1 this is InfoNCE, without transitions and with K = M it is ListMLE. Sources: Plackett
    (1975), Luce (1959); RankCLIP for order 1; this project's choice for the transitions.

    Args:
        scores: S, (N, M) floating: logits, logit scale included. Computed in float32, or
            float64 if given so.
        ranking: pi, (N, K) integers in [0, M), distinct within a row, best first.
        transitions: tables of the order >= 2 terms, or None for order 1.
        discount: "none": w_k = 1; "log": w_k = 1 / ln(k + 1) with k from 1.
        mask: (N, M) or (M,) bool, False removes a candidate: the result is that of the problem
            with the candidate's column and its place deleted.
        reduction: "mean" over the anchors with at least one place (0 when there is none),
            "sum", or "none" for (N,).
        impl: "auto", or an implementation by name (see `rankloss.kernels.IMPLEMENTATIONS`).
        validate: check values too: ranking in range and distinct, scores neither NaN nor
            infinite where unmasked. True always does, False never. None checks the ranking on
            the CPU (on a GPU it would synchronise), and the scores inside
            `torch.autograd.detect_anomaly()`; neither under torch.compile.

    Returns:
        A scalar, or (N,); float32, or float64 if scores or transitions are.

    Raises:
        TypeError: scores are not floating, ranking is not integer, or mask is not bool.
        ValueError: shapes, devices or values do not fit, or an option is unknown.

    >>> scores = torch.tensor([[2.0, 1.0, 0.0]])
    >>> first, second = (torch.tensor([order]) for order in ([0, 1, 2], [2, 1, 0]))
    >>> bool(plackett_luce_nll(scores, first) < plackett_luce_nll(scores, second))
    True
    >>> plackett_luce_nll(scores, first[:, :1])  # one place: the cross-entropy of its candidate
    tensor(0.4076)
    """
    check_inputs(scores, ranking, transitions, mask)
    check_option("discount", discount, Discount)
    check_option("reduction", reduction, Reduction)
    if should_check_ranking(scores, validate):
        check_ranking_values(ranking, scores.shape[1])
    if validate or (validate is None and hunts_anomalies()):
        check_score_values(scores, mask)
    ranking, lengths = ranking.long(), None
    if mask is not None:
        mask = mask.expand_as(scores)
        scores = scores.masked_fill(~mask, -torch.inf)
        ranking, lengths = _masked_last(ranking, mask)
    divisor: Tensor | int | None = None if reduction == "none" else 1
    if reduction == "mean":
        divisor = len(scores) if lengths is None else (lengths > 0).sum()
    return ranked_nll(
        scores, ranking, lengths, transitions, discount=discount, impl=impl, divisor=divisor
    )


def ranked_nll(
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor | None,
    transitions: Transitions | None,
    *,
    discount: Discount,
    impl: str,
    divisor: Tensor | int | None = None,
) -> Tensor:
    """`plackett_luce_nll` of valid input, over the first `lengths` (N,) places of each row.

    Candidates at score -inf are out of the list; `lengths` None means all K places count. (N,)
    without a `divisor`; else their sum over it (over 1, if it is 0), whose gradients are made
    together with the value.
    """
    (n, k), dtype = ranking.shape, _compute_dtype(scores, *(transitions or ()))
    if lengths is None:
        places = all_places(n, k, discount, dtype, scores.device)
    else:
        places = first_places(lengths, k, discount, dtype)
    lists = lists_of(scores, ranking, places, transitions)
    if divisor is None:
        return kernels.plackett_luce(*lists, impl) / places.total
    least = divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1)
    share = places.weights.new_ones(n) / (least * places.total)
    return kernels.plackett_luce(*lists, impl, share)


class Places(NamedTuple):
    """Places of rankings that count.

    Attributes:
        lengths: (N,) int64, how many of each row.
        weights: (K,), of all.
        total: sum of a row's weights, (N,) or 0-D or a number; 1 where no place counts.
    """

    lengths: Tensor
    weights: Tensor
    total: Tensor | int


def all_places(
    n: int, k: int, discount: Discount, dtype: torch.dtype, device: torch.device
) -> Places:
    """Return the places of n rankings all K of which count."""
    weights = _place_weights(k, discount, dtype, device)
    lengths = torch.full((n,), k, dtype=torch.int64, device=device)
    return Places(lengths, weights, max(k, 1) if discount == "none" else weights.sum())


def first_places(lengths: Tensor, k: int, discount: Discount, dtype: torch.dtype) -> Places:
    """Return the first `lengths` (N,) of K places; those beyond K count as K."""
    weights = _place_weights(k, discount, dtype, lengths.device)
    lengths = lengths.clamp(max=k)
    counts = torch.arange(k, device=lengths.device) < lengths[:, None]
    total = torch.where(counts, weights, 0.0).sum(1)  # cumsum is not deterministic on CUDA
    return Places(lengths, weights, torch.where(lengths > 0, total, 1.0))


def lists_of(
    scores: Tensor, ranking: Tensor, places: Places, transitions: Transitions | None
) -> kernels.Lists:
    """Return the arguments of the op."""
    tables = transitions or _no_transitions(scores)
    return kernels.Lists(scores, ranking, places.lengths, places.weights, *tables)


def _place_weights(k: int, discount: Discount, dtype: torch.dtype, device: torch.device) -> Tensor:
    if discount == "none":
        return torch.ones(k, dtype=dtype, device=device)
    return 1 / torch.log1p(torch.arange(1, k + 1, dtype=dtype, device=device))


def _no_transitions(scores: Tensor) -> Transitions:
    # two tensors: torch.compile refuses one tensor given twice to an autograd.Function
    return Transitions(*(scores.new_empty(0, scores.shape[1], 0) for _ in range(2)))


def _masked_last(ranking: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move places held by masked candidates to the end; return the number of the others."""
    counts = mask.gather(1, ranking)
    order = (~counts).to(torch.uint8).argsort(dim=1, stable=True)
    return ranking.gather(1, order), counts.sum(1)


def _compute_dtype(*given: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32

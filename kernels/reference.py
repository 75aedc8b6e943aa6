"""The plain PyTorch twin of every op: readable, any floating dtype, differentiable twice.

It materialises the N x K x M utilities, so it is for checking and for small problems.
"""

import torch
from torch import Tensor

from rankloss.kernels.signature import Lists


def plackett_luce(x: Lists) -> Tensor:
    """Weighted Plackett-Luce negative log-likelihood, sum_k w_k l_ik over k < length_i, as (N,)."""
    scores, ranking, lengths, weights, predecessors, keys = x._replace(ranking=x.ranking.long())
    n, m = scores.shape
    k = ranking.shape[1]
    utilities = scores[:, None, :] + _transition_scores(ranking, predecessors, keys)  # (N, K, M)
    chosen = utilities.gather(2, ranking[:, :, None]).squeeze(2)  # (N, K)

    place = torch.arange(k, device=scores.device)
    place_of = ranking.new_full((n, m), k).scatter(1, ranking, place.expand(n, k))  # unranked: K
    taken = place_of[:, None, :] < place[None, :, None]  # (N, K, M)
    counts = place < lengths[:, None]  # (N, K)
    remaining = utilities.masked_fill(taken, -torch.inf)
    remaining = torch.where(counts[:, :, None], remaining, 0.0)  # an empty row has a finite lse
    nll = torch.where(counts, remaining.logsumexp(2) - chosen, 0.0)
    return (nll * weights).sum(1)


def _transition_scores(ranking: Tensor, predecessors: Tensor, keys: Tensor) -> Tensor:
    """sum_m tau_m(pi(k-1), ..., pi(k-m); d) for every place k and candidate d, as (N, K, M)."""
    n, k = ranking.shape
    total = keys.new_zeros(n, k, keys.shape[1])
    for m in range(1, keys.shape[0] + 1):
        tables = predecessors[m * (m - 1) // 2 : m * (m + 1) // 2]  # P_m1 ... P_mm
        query = keys.new_ones(n, max(k - m, 0), keys.shape[2])  # places m+1 ... K
        for j, table in enumerate(tables, start=1):
            query = query * table[ranking[:, m - j : max(k - j, m - j)]]
        term = query @ keys[m - 1].T  # (N, K-m, M)
        total = total + torch.nn.functional.pad(term, (0, 0, k - term.shape[1], 0))
    return total


def row_norms(x: Tensor, eps: float = 1e-12) -> Tensor:
    """(..., 1) norms of rows; infinite, so that the row divided by it is 0, up to eps."""
    square = x.square().sum(-1, keepdim=True)
    long = square > eps**2
    return torch.where(long, torch.where(long, square, 1.0).sqrt(), torch.inf)


def gram_distance(student: Tensor, teacher: Tensor, negatives: str) -> Tensor:
    """Sum over pairs of squared differences of cosines, as (B,).

    Same signature as every implementation; `rankloss.kernels.gram_distance` documents it.
    """
    s, t = (x / row_norms(x) for x in (student, teacher))
    s, t = s @ s.transpose(1, 2), t @ t.transpose(1, 2)  # (B, P, P)
    if negatives == "clamp":
        s, t = s.masked_fill(s < 0, 0.0), t.masked_fill(t < 0, 0.0)
    elif negatives == "clamp_teacher":
        s, t = s.masked_fill((s < 0) & (t < 0), 0.0), t.masked_fill(t < 0, 0.0)
    return (s - t).square().sum((1, 2))

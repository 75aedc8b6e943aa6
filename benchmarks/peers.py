"""Plain PyTorch versions of the losses: what one would write without this library."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, pad


def clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Order 0: InfoNCE both ways from one matrix of logits."""
    logits = logit_scale.to(image_features.dtype) * image_features @ text_features.T
    labels = torch.arange(logits.shape[0], device=logits.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosine Gram matrices of (B, P, width) features."""
    ours, theirs = (normalize(x, dim=2) for x in (student, teacher))
    return (ours @ ours.mT - theirs @ theirs.mT).square().mean()


def list_mle(scores: Tensor, ranking: Tensor, k: int) -> Tensor:
    """Order 1, whole ranking (N, M): one log-sum-exp scan from the last place up, K places."""
    ranked = scores.gather(1, ranking)
    remaining = ranked.flip(1).logcumsumexp(1).flip(1)
    return (remaining - ranked)[:, :k].mean()


def plackett_luce(scores: Tensor, ranking: Tensor, **tables: Tensor) -> Tensor:
    """Any order >= 1 from its definition: all N x K x M utilities, then their log-sum-exp."""
    k = ranking.shape[1]
    utilities = scores[:, None, :]  # (N, 1 or K, M)
    if tables:
        flat_keys = tables["keys"].transpose(0, 1).flatten(1)  # (M, (R-1) r)
        utilities = utilities + queries(ranking, tables["predecessors"]) @ flat_keys.T
    else:
        utilities = utilities.expand(-1, k, -1)
    place = torch.arange(k, device=scores.device)
    place_of = torch.full_like(scores, k, dtype=torch.int64)
    place_of = place_of.scatter(1, ranking, place.expand_as(ranking))  # not ranked: place K
    remaining = utilities.masked_fill(place_of[:, None, :] < place[:, None], -torch.inf)
    chosen = remaining.gather(2, ranking[:, :, None]).squeeze(2)
    return (remaining.logsumexp(2) - chosen).mean()


def queries(ranking: Tensor, predecessors: Tensor) -> Tensor:
    """For every place, the products of the predecessor rows of each term: (N, K, (R-1) r)."""
    k, row = ranking.shape[1], 0
    terms: list[Tensor] = []
    while row < len(predecessors):
        m = len(terms) + 1  # the m-th term multiplies m predecessors and starts at place m + 1
        product = torch.ones_like(predecessors[0, :1])
        for j in range(1, m + 1):
            product = product * predecessors[row][ranking[:, m - j : max(k - j, m - j)]]
            row += 1
        terms.append(pad(product, (0, 0, min(m, k), 0)))
    return torch.cat(terms, dim=2)

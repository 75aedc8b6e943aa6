"""CLIP's InfoNCE and SigLIP's sigmoid terms of given scores, and which candidates are matches."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(
    scores: Sequence[Tensor],
    labels: Tensor,
    positives: Tensor | None = None,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the mean of `info_nce` over images choosing texts and texts choosing images.

    Args:
        scores: two (N, M) tensors of logits, one of each direction.
        labels, positives, weights: see `info_nce`.
        bias: 0-D, added to all logits.
    """
    logits = scores if bias is None else [x + bias for x in scores]
    image_to_text, text_to_image = (info_nce(x, labels, positives, weights) for x in logits)
    return 0.5 * (image_to_text + text_to_image)


def info_nce(
    scores: Tensor,
    labels: Tensor,
    positives: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each anchor's match against all candidates, averaged over anchors.

    With `positives`, an anchor has several matches p, none of which is pushed down:

        mean over p of  log(exp(S_p) + sum over negatives of exp(S_n)) - S_p

    which is the cross-entropy above when the only positive is the label's. Sources: CLIP
    (Radford et al. 2021) as in open_clip; the several-positives form is this project's choice.

    Args:
        scores: (N, M) floating logits.
        labels: (N,) int64, the column of each anchor's match.
        positives: (N, M) bool, all matches, the label's among them.
        weights: (N,), factor of each anchor's term; the mean still divides by N.

    Returns:
        A scalar in the scores' dtype; 0 for an empty batch.
    """
    if positives is None and weights is None:
        return F.cross_entropy(scores, labels, reduction="sum") / max(len(labels), 1)
    if positives is None:
        each = F.cross_entropy(scores, labels, reduction="none")
    else:
        negatives = scores.masked_fill(positives, -torch.inf).logsumexp(1, keepdim=True)  # (N, 1)
        terms = F.softplus(negatives - scores).masked_fill(~positives, 0.0)
        each = terms.sum(1) / positives.sum(1)
    return (each if weights is None else weights * each).sum() / max(len(labels), 1)


def positive_mask(ids: Sequence[Tensor], labels: Tensor) -> Tensor | None:
    """Return (N, M) bool: is candidate j the anchor's match, or does it share an id with it?

    None when there are no ids: then only the match itself is a positive.

    Args:
        ids: (M,) integers each; a negative id means unknown and is shared by nobody.
        labels: (N,) int64, the column of each anchor's match.

    >>> positive_mask([torch.tensor([7, 8, 7, -1, -1])], torch.arange(5)).int()
    tensor([[1, 0, 1, 0, 0],
            [0, 1, 0, 0, 0],
            [1, 0, 1, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 0, 1]], dtype=torch.int32)
    """
    same: Tensor | None = None
    for x in map(Tensor.long, ids):
        mine = x[labels]
        equal = torch.where(mine < 0, -2, mine)[:, None] == torch.where(x < 0, -1, x)
        same = equal if same is None else same | equal
    return None if same is None else same.scatter(1, labels[:, None], True)


def info_nce_and_gradient(
    scores: Tensor, labels: Tensor, positives: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return N times `info_nce` and the gradient of that to the scores, (N, M)."""
    own = labels[:, None]
    if positives is None:
        log_p = scores.log_softmax(1)
        total = F.nll_loss(log_p, labels, reduction="sum")
        return total, log_p.exp_().scatter_add_(1, own, scores.new_full((), -1.0).expand_as(own))
    negatives = scores.masked_fill(positives, -torch.inf)
    lse = negatives.logsumexp(1, keepdim=True)
    each, gap = 1 / positives.sum(1, keepdim=True, dtype=scores.dtype), lse - scores
    total = (F.softplus(gap).masked_fill_(~positives, 0.0) * each).sum()
    pull = gap.sigmoid_().masked_fill_(~positives, 0.0).mul_(each)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # no negatives: subtract no infinities
    push = negatives.sub_(lse).exp_().mul_(pull.sum(1, keepdim=True))
    return total, push.sub_(pull)


def matches(labels: Tensor, positives: Tensor | None, columns: int) -> Tensor:
    """Return (N, M) bool: `positives`, or the label's candidate alone."""
    if positives is not None:
        return positives
    none = torch.zeros(len(labels), columns, dtype=torch.bool, device=labels.device)
    return none.scatter_(1, labels[:, None], True)


def sigmoid_and_gradient(
    logits: Tensor, labels: Tensor, positives: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum of -log sigmoid(y logit), y = 1 at matches, else -1; and its gradient."""
    match = matches(labels, positives, logits.shape[1])
    signed = torch.where(match, logits, -logits)
    away = signed.neg().sigmoid_()
    return -F.logsigmoid(signed).sum(), torch.where(match, -away, away)

"""CLIP's InfoNCE in both directions: with several positives where items repeat, and in chunks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankloss.distributed import GlobalBatch
from rankloss.kernels.launch import outside_autocast

STREAM_ABOVE = 1 << 26  # logits; more (256 MiB in float32) are not held in memory at once


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


def streamed_clip_loss(
    batch: GlobalBatch, scale: Tensor, ids: Sequence[Tensor] = (), bias: Tensor | None = None
) -> Tensor:
    """Return `clip_loss` of a batch whose logits are never in memory at once."""
    pairs = (batch.image_anchors, batch.texts), (batch.text_anchors, batch.images)
    scale = scale.to(batch.images.dtype)
    with outside_autocast(batch.images):
        terms = [streamed_info_nce(x, y, scale, batch.labels, ids, bias) for x, y in pairs]
    return 0.5 * (terms[0] + terms[1])


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


def streamed_info_nce(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    labels: Tensor,
    ids: Sequence[Tensor] = (),
    bias: Tensor | None = None,
) -> Tensor:
    """Return `info_nce(scale * anchors @ candidates.T + bias, labels, positive_mask(ids, labels))`.

    Logits exist a chunk of anchors at a time and again in the backward pass. Plain cross-entropy
    is left to `torch.nn.functional.linear_cross_entropy` where this torch has it. Products follow
    `torch.set_float32_matmul_precision`.

    Args:
        anchors, candidates: (N, D) and (M, D), float32 or float64.
        scale, bias: 0-D, of any floating dtype.
        labels: (N,) int64.
        ids: (M,) integers each.

    Returns:
        A scalar; 0 for an empty batch.
    """
    queries = scale.to(anchors.dtype) * anchors
    if bias is not None:  # one more feature, so that every path adds it
        column = bias.to(queries.dtype).expand(len(queries), 1)
        queries = torch.cat([queries, column], 1)
        candidates = torch.cat([candidates, candidates.new_ones(len(candidates), 1)], 1)
    if not ids and len(labels) and hasattr(F, "linear_cross_entropy"):  # it divides by len(labels)
        total: Tensor = F.linear_cross_entropy(
            queries,
            candidates,
            labels,
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True),
        )
    else:
        total = _checkpointed_cross_entropy(queries, candidates, labels, ids)
    return total / max(len(labels), 1)


def _checkpointed_cross_entropy(
    queries: Tensor, candidates: Tensor, labels: Tensor, ids: Sequence[Tensor]
) -> Tensor:
    def chunk_loss(q: Tensor, c: Tensor, mine: Tensor) -> Tensor:
        return info_nce(q @ c.T, mine, positive_mask(ids, mine)) * len(mine)

    rows = max(1, STREAM_ABOVE // (16 * max(len(candidates), 1)))
    total = queries.new_zeros(())
    for start in range(0, len(labels), rows):
        chunk = slice(start, start + rows)
        arguments = queries[chunk], candidates, labels[chunk]
        total = total + checkpoint(chunk_loss, *arguments, use_reentrant=False)
    return total

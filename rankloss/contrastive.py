"""Contrastive losses: the InfoNCE term of CLIP, with several positives where items repeat."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STREAM_ABOVE = 1 << 26  # logits; more (256 MiB in float32) are not held in memory at once


def info_nce(scores: Tensor, own: Tensor, positives: Tensor | None = None) -> Tensor:
    """Cross-entropy of each anchor's match against all candidates, averaged over anchors.

    With `positives`, an anchor has several matches p, none of which is pushed down:

        mean over p of  log(exp(S_p) + sum over negatives of exp(S_n)) - S_p

    which is the cross-entropy above when the only positive is the own one. Sources: CLIP
    (Radford et al. 2021) as in open_clip; the several-positives form is this project's choice.

    Args:
        scores: (N, M) floating logits.
        own: (N,) int64, the column of each anchor's match.
        positives: (N, M) bool, all matches, the own one among them.

    Returns:
        A scalar in the scores' dtype; 0 for an empty batch.
    """
    if positives is None:
        return F.cross_entropy(scores, own, reduction="sum") / max(len(own), 1)
    negatives = scores.masked_fill(positives, -torch.inf).logsumexp(1, keepdim=True)  # (N, 1)
    terms = F.softplus(negatives - scores).masked_fill(~positives, 0.0)
    return (terms.sum(1) / positives.sum(1)).sum() / max(len(own), 1)


def matches(ids: Sequence[Tensor], own: Tensor) -> Tensor | None:
    """(N, M) bool: do candidate j and the anchor's own candidate share any of their ids (M,)?

    None when there are no ids: then only the own candidate matches.
    """
    same: Tensor | None = None
    for x in ids:
        equal = x[own][:, None] == x[None, :]
        same = equal if same is None else same | equal
    return same


def streamed_info_nce(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    own: Tensor,
    ids: Sequence[Tensor] = (),
    bias: Tensor | None = None,
) -> Tensor:
    """`info_nce(scale * anchors @ candidates.T + bias, own, matches(ids, own))`, in chunks of rows.

    Logits exist a chunk of anchors at a time and again in the backward pass. Plain cross-entropy
    is left to `torch.nn.functional.linear_cross_entropy` where this torch has it.

    Args:
        anchors, candidates: (N, D) and (M, D), float32 or float64.
        scale, bias: 0-D.
        own: (N,) int64.
        ids: (M,) integers each.

    Returns:
        A scalar; 0 for an empty batch.
    """
    queries = scale * anchors
    if bias is not None:  # one more feature, so that every path adds it
        queries = torch.cat([queries, bias.expand(len(queries), 1)], 1)
        candidates = torch.cat([candidates, candidates.new_ones(len(candidates), 1)], 1)
    if not ids and len(own) and hasattr(F, "linear_cross_entropy"):  # it divides by len(own)
        total: Tensor = F.linear_cross_entropy(
            queries,
            candidates,
            own,
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True),
        )
    else:
        total = _checkpointed_cross_entropy(queries, candidates, own, ids)
    return total / max(len(own), 1)


def _checkpointed_cross_entropy(
    queries: Tensor, candidates: Tensor, own: Tensor, ids: Sequence[Tensor]
) -> Tensor:
    def chunk_loss(q: Tensor, c: Tensor, mine: Tensor) -> Tensor:
        return info_nce(q @ c.T, mine, matches(ids, mine)) * len(mine)

    rows = max(1, STREAM_ABOVE // (16 * max(len(candidates), 1)))
    total = queries.new_zeros(())
    for start in range(0, len(own), rows):
        chunk = slice(start, start + rows)
        arguments = queries[chunk], candidates, own[chunk]
        total = total + checkpoint(chunk_loss, *arguments, use_reentrant=False)
    return total

"""Statistics of a ranking loss, computed from its last features when asked."""

from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.distributed import GlobalBatch
from rankloss.plackett_luce import rankings
from rankloss.transitions import Transitions

SAMPLE = 128  # most anchors and candidates used for the quadratic statistics
CHUNK = 1 << 21  # most scores held at a time, 8 MiB in float32


class Snapshot(NamedTuple):
    """Detached inputs of one forward pass; holds features, never an N x M tensor."""

    batch: GlobalBatch
    scale: Tensor
    transitions: dict[str, Transitions]


def take_snapshot(
    batch: GlobalBatch, scale: Tensor, transitions: dict[str, Transitions]
) -> Snapshot | None:
    """Keep what `summarize` needs, without the graph.

    None inside vmap, for there is no one batch, and in exported programs, which keep nothing.
    Tensors of torch.func's gradients are replaced by what they stand for, which outlives them.
    """
    if torch.compiler.is_exporting():
        return None
    texts = transitions.get("text")
    tensors = [x.detach() for x in (*batch, scale, *(texts or ()))]
    if not torch.compiler.is_compiling():
        plain = [torch.func.debug_unwrap(x) for x in tensors]
        if any(x.shape != y.shape for x, y in zip(plain, tensors, strict=True)):
            return None
        tensors = [x.detach() for x in plain]
    tables = {"text": Transitions(*tensors[6:])} if texts else {}
    return Snapshot(GlobalBatch(*tensors[:5]), tensors[5], tables)


@torch.no_grad()
def summarize(last: Snapshot) -> dict[str, Tensor]:
    """Return 0-D float32 statistics of a forward pass, never holding more than `CHUNK` scores.

    Returns:
        scale: the logit scale.
        match_top1: share of anchors, of both modalities, whose best candidate is their match.
        rank_agreement: share of anchors whose best candidate is the same in both directions
            (what image i ranks first, text i ranks first too).
        kendall_tau: rank correlation in [-1, 1] of the two directions' orders, over at most 128
            anchors and 128 candidates.
        entropy: entropy of the softmax over candidates in nats, mean over anchors of both
            modalities.
        transition_m: root mean square of the m-th transition term after the target ranking's
            predecessors, in units of the logits, over at most 128 anchors, places and candidates;
            from order 2 on, unless the ramp is 0.
        transition_m_max: the largest absolute value of that term there.
    """
    batch, scale = last.batch, last.scale.float()
    n, m = len(batch.labels), len(batch.texts)
    if n == 0:
        return {"scale": scale}
    totals = torch.zeros(3, device=scale.device)
    rows = max(1, CHUNK // m)
    for start in range(0, n, rows):
        totals += _chunk_totals(batch, scale, slice(start, start + rows))
    top1, agreement, entropy = totals / n
    return {
        "scale": scale,
        "match_top1": top1,
        "rank_agreement": agreement,
        "kendall_tau": _kendall_tau(*_sampled_scores(batch)),
        "entropy": entropy,
        **_transition_sizes(batch, last.transitions),
    }


def _chunk_totals(batch: GlobalBatch, scale: Tensor, rows: slice) -> Tensor:
    """Sums over some anchors of the shares of matches found, of agreement, and of entropies."""
    labels = batch.labels[rows]
    best, hits, entropies = [], [], []
    for anchors, candidates in (
        (batch.image_anchors, batch.texts),
        (batch.text_anchors, batch.images),
    ):
        scores = scale * (anchors[rows].float() @ candidates.float().T)
        best.append(scores.argmax(1))
        hits.append((best[-1] == labels).float().sum())
        log_p = scores.log_softmax(1)
        entropies.append(-(log_p.exp() * log_p).sum())
    agreement = (best[0] == best[1]).float().sum()
    return torch.stack([(hits[0] + hits[1]) / 2, agreement, (entropies[0] + entropies[1]) / 2])


def _sampled_scores(batch: GlobalBatch) -> tuple[Tensor, Tensor]:
    """Cosines of at most 128 anchors and 128 candidates, in both directions."""
    rows, columns = (slice(None, None, -(-len(x) // SAMPLE)) for x in (batch.labels, batch.texts))
    return (
        batch.image_anchors[rows].float() @ batch.texts[columns].float().T,
        batch.text_anchors[rows].float() @ batch.images[columns].float().T,
    )


def _kendall_tau(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of sum_{i<j} sign(a_i - a_j) sign(b_i - b_j) / (number of pairs)."""
    m = a.shape[1]
    if m < 2:
        return a.new_ones(())
    signs = ((x[:, :, None] - x[:, None, :]).sign() for x in (a, b))
    product = next(signs) * next(signs)
    return product.sum((1, 2)).mean() / (m * (m - 1))


def _transition_sizes(batch: GlobalBatch, transitions: dict[str, Transitions]) -> dict[str, Tensor]:
    """RMS and maximum of every tau_m for image anchors' lists of texts, along their rankings."""
    if not transitions:
        return {}
    predecessors, keys = (x.float() for x in transitions["text"])
    target = batch.text_anchors[:SAMPLE].float() @ batch.images.float().T
    ranking = rankings(target, top_k=SAMPLE)
    sizes = {}
    for m in range(1, keys.shape[0] + 1):
        places = ranking.shape[1] - m
        if places < 1:
            continue
        query = torch.ones((), device=target.device)
        for j in range(1, m + 1):
            query = (
                query * predecessors[m * (m - 1) // 2 + j - 1][ranking[:, m - j : m - j + places]]
            )
        columns = keys[m - 1][:: max(1, -(-keys.shape[1] // SAMPLE))]
        term = query @ columns.T
        sizes[f"transition_{m}"] = term.square().mean().sqrt()
        sizes[f"transition_{m}_max"] = term.abs().amax()
    return sizes

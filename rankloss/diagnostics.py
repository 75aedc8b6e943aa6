"""What a ranking loss can tell about itself, computed from its last features when asked."""

from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.distributed import GlobalBatch
from rankloss.plackett_luce import rankings
from rankloss.transitions import Transitions

SAMPLE = 128  # most anchors and candidates used for the quadratic statistics


class Snapshot(NamedTuple):
    """Detached inputs of one forward pass; holds features, never an N x M tensor."""

    batch: GlobalBatch
    scale: Tensor
    transitions: dict[str, Transitions]


def take_snapshot(
    batch: GlobalBatch, scale: Tensor, transitions: dict[str, Transitions]
) -> Snapshot:
    """Keep what `summarize` needs, without the graph."""
    tables = {
        name: Transitions(*(table.detach() for table in value))
        for name, value in transitions.items()
    }
    return Snapshot(GlobalBatch(*(x.detach() for x in batch)), scale.detach(), tables)


@torch.no_grad()
def summarize(last: Snapshot) -> dict[str, Tensor]:
    """0-D statistics of a forward pass.

    Returns:
        scale: the logit scale.
        match_top1: share of anchors, of both modalities, whose best candidate is their match.
        rank_agreement: share of anchors whose best candidate is the same in both directions
            (what image i ranks first, text i ranks first too).
        kendall_tau: rank correlation in [-1, 1] of the two directions' orders, over at most 128
            anchors and 128 candidates.
        entropy: of the softmax over candidates in nats, mean over anchors of both modalities.
        transition_m: root mean square of the m-th transition term after the target ranking's
            predecessors, in units of the logits, over at most 128 anchors, places and candidates.
    """
    batch = last.batch
    forward = last.scale.float() * (batch.image_anchors.float() @ batch.texts.float().T)
    backward = last.scale.float() * (batch.text_anchors.float() @ batch.images.float().T)
    if forward.shape[0] == 0:
        return {"scale": last.scale.float()}
    best = forward.argmax(1), backward.argmax(1)
    hits = torch.stack([(x == batch.labels).float().mean() for x in best])
    log_p = torch.stack([forward.log_softmax(1), backward.log_softmax(1)])
    return {
        "scale": last.scale.float(),
        "match_top1": hits.mean(),
        "rank_agreement": (best[0] == best[1]).float().mean(),
        "kendall_tau": _kendall_tau(_sample(forward), _sample(backward)),
        "entropy": -(log_p.exp() * log_p).sum(2).mean(),
        **_transition_sizes(backward, last.transitions),
    }


def _sample(x: Tensor) -> Tensor:
    rows, columns = (max(1, -(-size // SAMPLE)) for size in x.shape)
    return x[::rows, ::columns]


def _kendall_tau(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of sum_{i<j} sign(a_i - a_j) sign(b_i - b_j) / (number of pairs)."""
    m = a.shape[1]
    if m < 2:
        return a.new_ones(())
    signs = ((x[:, :, None] - x[:, None, :]).sign() for x in (a, b))
    product = next(signs) * next(signs)
    return product.sum((1, 2)).mean() / (m * (m - 1))


def _transition_sizes(target: Tensor, transitions: dict[str, Transitions]) -> dict[str, Tensor]:
    """RMS of every tau_m for image anchors' lists of texts, along rankings of `target`."""
    if not transitions:
        return {}
    predecessors, keys = (x.float() for x in transitions["text"])
    ranking = rankings(target[:SAMPLE], top_k=SAMPLE)
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
        sizes[f"transition_{m}"] = (query @ columns.T).square().mean().sqrt()
    return sizes

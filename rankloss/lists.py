"""The four ranking lists of a batch: who scores whom, and whose order they should reproduce."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankloss.distributed import GlobalBatch
from rankloss.options import Discount
from rankloss.plackett_luce import ranked_nll, rankings
from rankloss.scores import scaled_cosines
from rankloss.transitions import Transitions


class RankingList(NamedTuple):
    """One ranking term: NLL(scores; ranking of target).

    Attributes:
        scores, target: (N, M).
        mask: (N, M) bool, False removes a candidate; None keeps all.
        transitions: tables of the candidates' modality, or None.
    """

    scores: Tensor
    target: Tensor
    mask: Tensor | None
    transitions: Transitions | None


def cross_modal_lists(
    batch: GlobalBatch,
    scores: tuple[Tensor, Tensor],
    positives: Tensor | None,
    transitions: dict[str, Transitions],
) -> list[RankingList]:
    """Images ranking texts as texts rank images, and the reverse."""
    image_to_text, text_to_image = scores
    mask = _list_mask(positives, batch, image_to_text, exclude_self=False)
    return [
        RankingList(image_to_text, text_to_image, mask, transitions.get("text")),
        RankingList(text_to_image, image_to_text, mask, transitions.get("image")),
    ]


def in_modal_lists(
    batch: GlobalBatch,
    scale: Tensor,
    same: Sequence[Tensor | None],
    transitions: dict[str, Transitions],
    *,
    exclude_self: bool,
) -> list[RankingList]:
    """Images ranking images as texts rank texts, and the reverse; `same` marks repeated items."""
    images = scaled_cosines(batch.image_anchors, batch.images, scale)
    texts = scaled_cosines(batch.text_anchors, batch.texts, scale)
    image_mask, text_mask = (_list_mask(x, batch, images, exclude_self=exclude_self) for x in same)
    return [
        RankingList(images, texts, image_mask, transitions.get("image")),
        RankingList(texts, images, text_mask, transitions.get("text")),
    ]


def list_nll(item: RankingList, top_k: int | None, *, discount: Discount, impl: str) -> Tensor:
    """Return (N,) likelihoods of a list, 0 for anchors with no candidate left."""
    scores, target, lengths = item.scores, item.target, None
    if item.mask is not None:
        scores = scores.masked_fill(~item.mask, -torch.inf)
        target = target.masked_fill(~item.mask, -torch.inf)  # ranked last, past `lengths`
        lengths = item.mask.sum(1)
    ranking = rankings(target, top_k)
    if lengths is not None:
        lengths = lengths.clamp(max=ranking.shape[1])
    options: dict[str, Any] = {"discount": discount, "impl": impl, "divisor": len(scores)}
    return ranked_nll(scores, ranking, lengths, item.transitions, **options)


def _list_mask(
    same: Tensor | None, batch: GlobalBatch, scores: Tensor, *, exclude_self: bool
) -> Tensor | None:
    """Candidates of a ranking list: not the anchor's match under another number, nor (when
    `exclude_self`) the match itself."""
    if same is None and not exclude_self:
        return None
    columns = torch.arange(scores.shape[1], device=scores.device)
    match = columns == batch.labels[:, None]
    others = ~match if same is None else ~same
    return others & ~match if exclude_self else others | match

"""Losses of pairs: their tensors, their terms, and which candidates stand in a ranking list.

All terms are made of two blocks of scores, of the same rows, some anchors at a time:

    row                    against texts       against images
    across modalities      image, text: S_it   text, image: S_ti
    within a modality      text, text: S_tt    image, image: S_ii

A block's rows score it; the ranking that they should reproduce is the other block's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.clip import positive_mask
from rankloss.distributed import GlobalBatch
from rankloss.fusion.precision import full_dtype
from rankloss.kernels import Lists
from rankloss.options import Discount
from rankloss.plackett_luce import Places, all_places, first_places, lists_of, rankings
from rankloss.transitions import Transitions


class Pairs(NamedTuple):
    """Tensors of a loss of pairs; those before `labels` receive gradient.

    Attributes:
        image_anchors, text_anchors: (n, D); None where every candidate is an anchor.
        images, texts: (M, D) candidates.
        scale: 0-D factor of all cosines.
        bias: 0-D, added to the sigmoid's logits; the softmax does not depend on it.
        image_predecessors, image_keys, text_predecessors, text_keys: transition tables of the
            candidates, see `rankloss.Transitions`; None at orders 0 and 1.
        labels: (n,) int64, the column of each anchor's match.
        image_ids, text_ids: (M,) integers; None where none repeats.
        ramp: 0-D factor of the ranking terms; None is 1.
    """

    image_anchors: Tensor | None
    text_anchors: Tensor | None
    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor | None
    image_predecessors: Tensor | None
    image_keys: Tensor | None
    text_predecessors: Tensor | None
    text_keys: Tensor | None
    labels: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    ramp: Tensor | None

    @classmethod
    def of(
        cls,
        batch: GlobalBatch,
        scale: Tensor,
        bias: Tensor | None = None,
        transitions: dict[str, Transitions] | None = None,
        ids: tuple[Tensor | None, Tensor | None] = (None, None),
        ramp: Tensor | None = None,
    ) -> "Pairs":
        """Take a batch apart; `transitions` are tables by candidate modality."""
        alone = batch.image_anchors is batch.images
        anchors = (None, None) if alone else (batch.image_anchors, batch.text_anchors)
        images, texts = ((transitions or {}).get(x) for x in ("image", "text"))
        tables = *(images or (None, None)), *(texts or (None, None))
        given = *anchors, batch.images, batch.texts, scale, bias, *tables, batch.labels, *ids, ramp
        return cls(*given)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all computation: float32, or float64 where a feature or table is."""
        features = self.image_anchors, self.text_anchors, self.images, self.texts
        return full_dtype(*(x for x in (*features, *tuple(self)[6:10]) if x is not None))

    def widened(self) -> "Pairs":
        """Convert features, scale and bias to the dtype of computation."""
        names = self._fields[:6]
        given = {name: x for name, x in zip(names, self[:6], strict=True) if x is not None}
        return self._replace(**{name: x.to(self.dtype) for name, x in given.items()})

    def anchors(self) -> tuple[Tensor, Tensor]:
        """Return image and text anchors (n, D)."""
        images = self.images if self.image_anchors is None else self.image_anchors
        return images, self.texts if self.text_anchors is None else self.text_anchors

    def without_transitions(self) -> "Pairs":
        """Leave out the tables, on which only rankings depend."""
        bare = self._replace(image_predecessors=None, image_keys=None)
        return bare._replace(text_predecessors=None, text_keys=None)

    @property
    def alone(self) -> bool:
        """Say if every candidate is an anchor; row i then matches row i."""
        return self.image_anchors is None and self.text_anchors is None

    @property
    def only_pairs(self) -> bool:
        """Say if there are features and a scale alone, of pairs that match no others."""
        others = *tuple(self)[5:10], self.image_ids, self.text_ids
        return self.alone and all(x is None for x in others)

    @property
    def ids(self) -> list[Tensor]:
        """Ids that are given."""
        return [x for x in (self.image_ids, self.text_ids) if x is not None]


class Terms(NamedTuple):
    """Weights of the terms of a loss of pairs, and their options.

    Attributes:
        contrastive: InfoNCE's weight; its directions are averaged.
        sigmoid: weight of SigLIP's softplus, images against texts.
        cyclic_across, cyclic_within: weights of CyCLIP's squared differences.
        cross_modal, in_modal: weights of the ranking terms; their directions are averaged.
        exclude_self, top_k, discount: options that rankings have in `rankloss.HighOrderPLLoss`.
        impl: implementation; "reference" is plain PyTorch, differentiable twice.
    """

    contrastive: float = 0.0
    sigmoid: float = 0.0
    cyclic_across: float = 0.0
    cyclic_within: float = 0.0
    cross_modal: float = 0.0
    in_modal: float = 0.0
    exclude_self: bool = False
    top_k: int | None = None
    discount: Discount = "none"
    impl: str = "auto"

    @property
    def only_contrastive(self) -> bool:
        """Say if InfoNCE is all there is."""
        return bool(self.contrastive) and not any(tuple(self)[1:6])

    @property
    def two_sided(self) -> bool:
        """Say if images are candidates too."""
        return any((self.contrastive, *self[2:6]))

    @property
    def across(self) -> bool:
        """Say if any term looks across modalities."""
        return any((self.contrastive, self.sigmoid, self.cyclic_across, self.cross_modal))

    @property
    def within(self) -> bool:
        """Say if any term looks within a modality."""
        return any((self.cyclic_within, self.in_modal))

    @property
    def ranks(self) -> bool:
        """Say if anything is ranked."""
        return any((self.cross_modal, self.in_modal))


class Rows(NamedTuple):
    """Rows of both blocks: `across` first, then `within`, each as many as there are anchors."""

    across: slice
    within: slice
    ranked: slice

    @classmethod
    def of(cls, terms: Terms, anchors: int) -> "Rows":
        middle = anchors if terms.across else 0
        end = middle + (anchors if terms.within else 0)
        ranked = slice(0 if terms.cross_modal else middle, end if terms.in_modal else middle)
        return cls(slice(0, middle), slice(middle, end), ranked)

    def stacked(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Anchors of the rows against texts, and against images; no half that no term needs."""
        if self.within.start == self.within.stop:
            return images, texts
        if not self.across.stop:
            return texts, images
        both = torch.cat([images, texts, images])
        return both[: self.within.stop], both[self.across.stop :]


def anchor_shares(
    x: Pairs, terms: Terms, anchors: int, dtype: torch.dtype, total: Tensor | int = 1
) -> Tensor:
    """Weight of each ranked row's likelihood in the loss, ramp included, over `total`: (rows,)."""
    divisor = 2 * max(len(x.labels), 1) * (total if isinstance(total, int) else 1)
    weights = [w / divisor for w in (terms.cross_modal, terms.in_modal) if w]
    share = torch.full((len(weights) * anchors,), weights[0], dtype=dtype, device=x.labels.device)
    if weights[-1] != weights[0]:
        share[anchors:] = weights[-1]
    share = share if isinstance(total, int) else share / total
    return share if x.ramp is None else share * x.ramp.to(dtype)


def list_masks(
    x: Pairs, terms: Terms, labels: Tensor, positives: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Candidates that stay in the ranked rows' lists of texts, and of images: (rows, M) bool.

    A list leaves out the anchor's match under another number and, within a modality and with
    `exclude_self`, the anchor itself. None keeps all.
    """
    columns = len(x.texts)
    across = _kept(positives, labels, columns, exclude_self=False) if terms.cross_modal else None
    masks = []
    for ids in (x.text_ids, x.image_ids):
        own = None
        if terms.in_modal:
            same = None if ids is None else positive_mask([ids], labels)
            own = _kept(same, labels, columns, exclude_self=terms.exclude_self)
        masks.append(_stacked_masks(terms, across, own, (len(labels), columns)))
    return masks[0], masks[1]


def _kept(
    same: Tensor | None, labels: Tensor, columns: int, *, exclude_self: bool
) -> Tensor | None:
    if same is None and not exclude_self:
        return None
    match = torch.arange(columns, device=labels.device) == labels[:, None]
    others = ~match if same is None else ~same
    return others & ~match if exclude_self else others | match


def _stacked_masks(
    terms: Terms, across: Tensor | None, within: Tensor | None, shape: tuple[int, int]
) -> Tensor | None:
    given = across if within is None else within
    if given is None or not (terms.cross_modal and terms.in_modal):
        return given
    return torch.cat([given.new_ones(shape) if x is None else x for x in (across, within)])


class RankedLists:
    """Makes the lists of some anchors' rows; what the sides share is made once."""

    def __init__(self, x: Pairs, terms: Terms, anchors: int, columns: int) -> None:
        self._x, self._terms, self._anchors = x, terms, anchors
        self._dtype, self._device = x.scale.dtype, x.labels.device
        self._places = columns if terms.top_k is None else min(terms.top_k, columns)
        self._whole: tuple[Places, Tensor] | None = None

    def make(
        self, scores: Tensor, target: Tensor, mask: Tensor | None, tables: Transitions | None
    ) -> tuple[Lists, Tensor]:
        """Lists that should rank as `target` does, and their weights in the loss, (rows,)."""
        k, discount = self._places, self._terms.discount
        if mask is None:
            if self._whole is None:
                rows = all_places(len(scores), k, discount, self._dtype, self._device)
                self._whole = rows, self._shares(rows)
            places, shares = self._whole
        else:
            scores, target = (x.masked_fill(~mask, -torch.inf) for x in (scores, target))
            # the others are ranked last
            places = first_places(mask.sum(1), k, discount, self._dtype)
            shares = self._shares(places)
        ranking = rankings(target, self._terms.top_k).int()
        return lists_of(scores, ranking, places, tables), shares

    def _shares(self, places: Places) -> Tensor:
        return anchor_shares(self._x, self._terms, self._anchors, self._dtype, places.total)

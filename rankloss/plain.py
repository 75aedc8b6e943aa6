"""The plain twin of `rankloss.streaming`: the same losses, differentiable any number of times.

It holds all scores, and the likelihood's N x K x M utilities: for checking and small problems.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import kernels
from rankloss.clip import info_nce, matches, positive_mask
from rankloss.pair_terms import Pairs, RankedLists, Rows, Terms, list_masks
from rankloss.scores import scaled_cosines
from rankloss.transitions import Transitions


def plain_loss(x: Pairs, terms: Terms) -> Tensor:
    """Sum of the terms, a scalar in `x.dtype`."""
    x = x.widened()
    rows = Rows.of(terms, len(x.labels))
    images, texts = x.anchors()
    anchors = rows.stacked(images, texts)
    by_text = scaled_cosines(anchors[0], x.texts, x.scale)
    by_image = by_text
    if terms.two_sided:
        by_image = scaled_cosines(anchors[1], x.images, x.scale)
    positives = positive_mask(x.ids, x.labels)
    n, total = max(len(x.labels), 1), x.scale.new_zeros(())
    for leaf in (images, texts, x.scale, x.bias):  # part of the graph whatever the weights are
        total = total if leaf is None else total + leaf.flatten()[:0].sum()
    if terms.contrastive:
        both = [info_nce(s[rows.across], x.labels, positives) for s in (by_text, by_image)]
        total = total + terms.contrastive / 2 * (both[0] + both[1])
    if terms.sigmoid:
        logits = by_text[rows.across] if x.bias is None else by_text[rows.across] + x.bias
        signed = torch.where(matches(x.labels, positives, logits.shape[1]), logits, -logits)
        total = total - terms.sigmoid / n * F.logsigmoid(signed).sum()
    for half, weight in ((rows.across, terms.cyclic_across), (rows.within, terms.cyclic_within)):
        if weight:
            total = total + weight / n * (by_text[half] - by_image[half]).square().sum()
    if terms.ranks:
        total = total + _ranking(x, terms, rows.ranked, by_text, by_image, positives)
    return total


def _ranking(
    x: Pairs,
    terms: Terms,
    rows: slice,
    by_text: Tensor,
    by_image: Tensor,
    positives: Tensor | None,
) -> Tensor:
    lists_of = RankedLists(x, terms, len(x.labels), by_text.shape[1])
    masks = list_masks(x, terms, x.labels, positives)
    scores, targets = (by_text[rows], by_image[rows]), (by_image[rows], by_text[rows])
    tables = (x.text_predecessors, x.text_keys), (x.image_predecessors, x.image_keys)
    total = x.scale.new_zeros(())
    for s, target, mask, table in zip(scores, targets, masks, tables, strict=True):
        given = None if table[0] is None or table[1] is None else Transitions(table[0], table[1])
        lists, weights = lists_of.make(s, target, mask, given)
        total = total + kernels.plackett_luce(*lists, terms.impl, weights)
    return total

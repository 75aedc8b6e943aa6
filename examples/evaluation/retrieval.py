"""Retrieval with any number of captions an image, and agreement with graded human judgements."""

from __future__ import annotations

import torch
from scipy.stats import kendalltau
from torch import Tensor

TIE = 1e-6
"""Candidates that come this close to the match are as similar: sums of products are rounded."""
CHUNK = 256
"""Rows of the similarity matrix held at a time."""


def retrieval(
    images: Tensor, texts: Tensor, image_of_text: Tensor | None = None
) -> dict[str, float]:
    """R@1, R@5 and R@10 in both directions, by open_clip's names.

    An image is found by a text when the text's own image is among the first k; a text by an image
    when any of the image's own texts is.

    Args:
        images: (N, D) unit-norm.
        texts: (M, D) unit-norm.
        image_of_text: (M,) int64, the image that each text belongs to; None: text i to image i.

    Raises:
        ValueError: some image has no text, or an index is outside the images.
    """
    numbers = torch.arange(len(images))
    own = numbers if image_of_text is None else image_of_text
    _check_owners(images, texts, own)
    ways = {
        "image_to_text": ranks_of_best_match(images, texts, numbers, own),
        "text_to_image": ranks_of_best_match(texts, images, own, numbers),
    }
    return {
        f"{way}_R@{k}": float(recall_at(ranks, k).double().mean())
        for way, ranks in ways.items()
        for k in (1, 5, 10)
    }


def ranks_of_best_match(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor
) -> Tensor:
    """Return the place of the best of each query's matches, 1 being the best.

    Args:
        queries, candidates: (N, D) and (M, D) unit-norm.
        query_ids, candidate_ids: (N,) and (M,) int64, equal for matches, of which each query has
            one at least.

    Returns:
        (N,) int64. Other candidates that are as similar count as better ones.
    """
    ranks = []
    for rows, ids in zip(torch.split(queries, CHUNK), torch.split(query_ids, CHUNK), strict=True):
        similarity = rows @ candidates.T
        match = ids[:, None] == candidate_ids
        best = similarity.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
        ranks.append(((similarity >= best - TIE) & ~match).sum(1) + 1)
    return torch.cat(ranks)


def recall_at(ranks: Tensor, k: int) -> Tensor:
    """Say if each match, at `ranks` (N,), is among the first k: (N,) bool."""
    return ranks <= k


def graded_agreement(similarity: Tensor, judgements: Tensor) -> dict[str, float]:
    """Kendall's tau between a model's similarities and people's grades of the same pairs.

    Args:
        similarity: (P,) of image and caption of each pair.
        judgements: (P,) grades, more is better; ties are many.

    Returns:
        "tau_b", which corrects for ties in both, and "tau_c", which suits grades on few levels
        (the one usually reported for Flickr8k-Expert).

    Raises:
        ValueError: there are fewer than two pairs, or all grades are the same.
    """
    if similarity.shape != judgements.shape or len(judgements) < 2:
        raise ValueError(
            "graded_agreement: similarity and judgements must be (P,) with P >= 2, got "
            f"{tuple(similarity.shape)} and {tuple(judgements.shape)}"
        )
    if bool((judgements == judgements[0]).all()):
        raise ValueError("graded_agreement: all judgements are the same, nothing can agree")
    pair = similarity.double().numpy(), judgements.double().numpy()
    return {f"tau_{v}": float(kendalltau(*pair, variant=v).statistic) for v in ("b", "c")}


def _check_owners(images: Tensor, texts: Tensor, image_of_text: Tensor) -> None:
    if image_of_text.shape != texts.shape[:1]:
        raise ValueError(
            f"retrieval: image_of_text must be ({len(texts)},), one image for each text, got "
            f"{tuple(image_of_text.shape)}"
        )
    counts = torch.bincount(image_of_text, minlength=len(images))
    if len(counts) != len(images) or not bool((counts > 0).all()):
        raise ValueError(
            f"retrieval: each of {len(images)} images needs a text, and each text one of these "
            f"images; image_of_text names {int((counts > 0).sum())} images, up to number "
            f"{len(counts) - 1}"
        )

"""From a trained model to numbers: outcomes of each held-out example, and their means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from examples.demo.captions import class_words, prompts
from examples.demo.scene_shards import read_pictures
from examples.demo.scenes import ALL_PAIRS, ATTRIBUTES, UNSEEN_PAIRS, Scene, overlap
from examples.evaluation.gap import modality_gap
from examples.evaluation.retrieval import recall_at

Outcomes = dict[str, Tensor]
"""Metric -> (N,) outcome of every held-out example; the gap, which has no examples, is (1,)."""


@dataclass(frozen=True)
class Metric:
    """A number's name and reading; `compared`: the sentences below the table speak of it."""

    key: str
    label: str
    chance: float | None = None
    percent: bool = True
    compared: bool = False

    def show(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"

    def show_difference(self, value: float, error: float) -> str:
        scale, digits = (100, 1) if self.percent else (1, 3)
        return f"{scale * value:+.{digits}f} ± {scale * 2 * error:.{digits}f}"


def metrics(heldout: int) -> list[Metric]:
    """The table's rows, for so many held-out scenes."""
    recalls = [
        Metric(f"{way}_r{k}", f"{label} R@{k} (%)", min(1.0, k / heldout), compared=k == 1)
        for way, label in (("i2t", "image to text"), ("t2i", "text to image"))
        for k in (1, 5, 10)
    ]
    zero_shot = [
        Metric(f"zs_{name}", f"zero-shot {name} (%)", 1 / len(values))
        for name, values in ATTRIBUTES.items()
    ]
    mean = sum(1 / len(values) for values in ATTRIBUTES.values()) / len(ATTRIBUTES)
    pair = 1 / len(ALL_PAIRS)
    return [
        *recalls,
        Metric("correlation", "graded rank correlation", 0.0, percent=False, compared=True),
        *zero_shot,
        Metric("zs_mean", "zero-shot mean of the four (%)", mean, compared=True),
        Metric("zs_seen", "zero-shot colour + shape, seen pairs (%)", pair),
        Metric("zs_unseen", "zero-shot colour + shape, unseen pairs (%)", pair),
        Metric("gap", "modality gap", percent=False),
    ]


@dataclass(frozen=True)
class Split:
    """An evaluation split in memory: images (N, 3, H, W), tokens of captions (N, L), scenes."""

    images: Tensor
    texts: Tensor
    scenes: list[Scene]


def read_split(
    shards: Sequence[str],
    transform: Callable[[Image.Image], Tensor],
    tokenize: Callable[[list[str]], Tensor],
) -> Split:
    pictures = list(read_pictures(shards))
    images = torch.stack([transform(picture.image) for picture in pictures])
    texts = tokenize([picture.caption for picture in pictures])
    return Split(images, texts, [picture.scene for picture in pictures])


def encode_splits(
    model: Any, heldout: Split, probe: Split, tokenize: Callable[[list[str]], Tensor]
) -> dict[str, Tensor]:
    """Features of both splits, and zero-shot classifiers, by the names `measure` wants.

    `model` has encode_image and encode_text, as open_clip's do.
    """
    images, texts = encode(model, heldout.images, heldout.texts)
    probe_images, _ = encode(model, probe.images, probe.texts)
    features = {"heldout_images": images, "heldout_texts": texts, "probe_images": probe_images}
    names = {
        attribute: [class_words(attribute, value) for value in values]
        for attribute, values in ATTRIBUTES.items()
    }
    names["pair"] = [f"{colour} {shape}" for colour, shape in ALL_PAIRS]
    for attribute, words in names.items():
        classes = [prompts(each) for each in words]
        features[f"classes_{attribute}"] = class_embeddings(model, tokenize, classes)
    return features


def measure(features: dict[str, Tensor], heldout: list[Scene], probe: list[Scene]) -> Outcomes:
    """Outcomes of one model.

    Args:
        features: heldout_images and heldout_texts (N, D), probe_images (M, D), and zero-shot
            classifiers classes_<attribute> and classes_pair (C, D); all unit-norm.
        heldout, probe: the N and M scenes.
    """
    images, texts = features["heldout_images"], features["heldout_texts"]
    similarity = images @ texts.T
    relevance = torch.from_numpy(overlap(heldout, heldout))
    outcomes: Outcomes = {"gap": torch.tensor([modality_gap(images, texts)])}
    for way, scores in (("i2t", similarity), ("t2i", similarity.T)):
        ranks = match_ranks(scores)
        outcomes |= {f"{way}_r{k}": recall_at(ranks, k).double() for k in (1, 5, 10)}
    correlations = spearman(similarity, relevance) + spearman(similarity.T, relevance)
    outcomes["correlation"] = correlations / 2
    return outcomes | _zero_shot(features, probe)


def _zero_shot(features: dict[str, Tensor], probe: list[Scene]) -> Outcomes:
    images, things = features["probe_images"], [scene.things[0] for scene in probe]
    hits: Outcomes = {}
    for name, values in ATTRIBUTES.items():
        labels = torch.tensor([values.index(getattr(thing, name)) for thing in things])
        hits[f"zs_{name}"] = zero_shot_hits(images, features[f"classes_{name}"], labels).double()
    hits["zs_mean"] = torch.stack(list(hits.values())).mean(0)
    labels = torch.tensor([ALL_PAIRS.index((thing.colour, thing.shape)) for thing in things])
    pairs = zero_shot_hits(images, features["classes_pair"], labels).double()
    unseen = torch.tensor([ALL_PAIRS[label] in UNSEEN_PAIRS for label in labels])
    return hits | {"zs_seen": pairs[~unseen], "zs_unseen": pairs[unseen]}


def mean_and_spread(seeds: Sequence[Tensor]) -> tuple[float, float | None]:
    """Mean over seeds of a metric's mean, and the standard deviation between seeds if several."""
    means = torch.stack([outcome.double().mean() for outcome in seeds])
    return float(means.mean()), float(means.std()) if len(seeds) > 1 else None


def difference(ours: Sequence[Tensor], base: Sequence[Tensor]) -> tuple[float, float]:
    """Mean paired difference and its standard error.

    The error is over held-out examples for one seed (it knows nothing of other seeds), and over
    seeds for several.
    """
    paired = [a.double() - b.double() for a, b in zip(ours, base, strict=True)]
    if len(paired) == 1:
        return mean_and_error(paired[0])
    return mean_and_error(torch.stack([x.mean() for x in paired]))


CHUNK = 256
"""Samples encoded at a time."""


def match_ranks(similarity: Tensor) -> Tensor:
    """Place of each row's match among its candidates, 1 being the best.

    Args:
        similarity: (N, N), the match of row i is column i.

    Returns:
        (N,) int64. Candidates as similar as the match count as better ones, so that a collapsed
        model ranks last, not first.
    """
    return (similarity >= similarity.diagonal()[:, None]).sum(1)


def spearman(scores: Tensor, relevance: Tensor) -> Tensor:
    """Rank correlation of scores with graded relevance, of each row.

    Args:
        scores, relevance: (N, M); ties share the mean of their places.

    Returns:
        (N,) in [-1, 1], and 0 for a row that is constant in either.
    """
    a, b = _centred_places(scores), _centred_places(relevance)
    lengths: Tensor = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / lengths.clamp(min=1e-12)


def _centred_places(x: Tensor) -> Tensor:
    x = x.contiguous()
    ordered = x.sort(dim=1).values.contiguous()
    below = torch.searchsorted(ordered, x)
    upto = torch.searchsorted(ordered, x, right=True)
    places = (below + upto).double() / 2
    return places - places.mean(1, keepdim=True)


def zero_shot_hits(images: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """Say if each image is nearest to its own class.

    Args:
        images: (N, D) unit-norm.
        classes: (C, D), from `class_embeddings`.
        labels: (N,) int64 class of each image.

    Returns:
        (N,) bool.
    """
    return (images @ classes.T).argmax(1) == labels


@torch.no_grad()
def encode(model: open_clip.CLIP, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-norm features, two of (N, D), of (N, 3, H, W) images and (N, L) tokens."""
    model.eval()
    image_features = [model.encode_image(x, normalize=True) for x in torch.split(images, CHUNK)]
    text_features = [model.encode_text(x, normalize=True) for x in torch.split(texts, CHUNK)]
    return torch.cat(image_features), torch.cat(text_features)


@torch.no_grad()
def class_embeddings(
    model: open_clip.CLIP, tokenize: Callable[[list[str]], Tensor], prompts: Sequence[list[str]]
) -> Tensor:
    """Zero-shot classifier, (C, D) unit-norm: the mean embedding of each class's prompts."""
    means = []
    for texts in prompts:
        means.append(model.encode_text(tokenize(texts), normalize=True).mean(0))
    return nn.functional.normalize(torch.stack(means), dim=1)


def mean_and_error(outcomes: Tensor) -> tuple[float, float]:
    """Mean of N outcomes and its standard error (NaN for a single one)."""
    values = outcomes.double()
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()), error

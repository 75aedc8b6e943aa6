"""The modality gap: how far images and texts lie apart, how each is spread, and what it costs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from torch import Tensor

CHUNK = 256
"""Rows of a similarity matrix held at a time."""
SHIFTS = tuple(round(-1 + 0.125 * i, 3) for i in range(17))
"""Signed distances by which both modalities together are moved towards each other."""


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """Distance between the centroids of (N, D) unit-norm features: from 0 to 2 (Liang et al.)."""
    return float((images.double().mean(0) - texts.double().mean(0)).norm())


def alignment(images: Tensor, texts: Tensor) -> float:
    """Mean squared distance of matches, (N, D) unit-norm each: 0 is best (Wang and Isola)."""
    return float((images.double() - texts.double()).square().sum(1).mean())


def uniformity(images: Tensor, texts: Tensor) -> float:
    """log of the mean over pairs i > j of exp(-2 |v_i - t_j|^2): -8 at best, 0 if all coincide.

    As in CyCLIP's code: images against texts, of which only one triangle counts.
    """
    total, n = 0.0, len(images)
    for start in range(0, n, CHUNK):
        rows = images[start : start + CHUNK].double()
        kernel = torch.exp(4 * (rows @ texts.double().T) - 4)  # |v - t|^2 = 2 - 2 <v, t>
        total += float(kernel.tril(start - 1).sum())
    return math.log(total / (n * (n - 1) / 2)) if n > 1 and total else -math.inf


def cone(features: Tensor) -> float:
    """Mean cosine of two different samples of (N, D) unit-norm: 1 is a point, 0 a whole sphere."""
    x, n = features.double(), len(features)
    if n < 2:
        return math.nan
    total = float(x.sum(0).square().sum() - x.square().sum())
    return total / (n * (n - 1))


def paired_margin(images: Tensor, texts: Tensor) -> float:
    """Mean cosine of matches minus mean cosine of all other pairs."""
    v, t, n = images.double(), texts.double(), len(images)
    matched = float((v * t).sum())
    if n < 2:
        return math.nan
    others = float(v.sum(0) @ t.sum(0)) - matched
    return matched / n - others / (n * (n - 1))


def separability(images: Tensor, texts: Tensor, folds: int = 5) -> float:
    """Accuracy of a linear classifier telling images from texts, on features it has not seen.

    0.5 is chance: no linear gap. Logistic regression, cross-validated with both members of a pair
    in the same fold.
    """
    n = len(images)
    if n < folds:
        return math.nan
    x = torch.cat([images, texts]).double().numpy()
    labels, pair = torch.arange(2 * n).numpy() // n, torch.arange(2 * n).numpy() % n
    model, cut = LogisticRegression(max_iter=1000), GroupKFold(folds)
    return float(cross_val_score(model, x, labels, groups=pair, cv=cut).mean())


def clip_loss(images: Tensor, texts: Tensor, logit_scale: float) -> float:
    """CLIP's loss of (N, D) unit-norm pairs against all N, in float64, rows in chunks."""
    v, t, total = images.double(), texts.double(), 0.0
    for a, b in ((v, t), (t, v)):
        for start in range(0, len(a), CHUNK):
            rows = logit_scale * a[start : start + CHUNK] @ b.T
            labels = torch.arange(start, start + len(rows), device=rows.device)
            total += float(F.cross_entropy(rows, labels, reduction="sum"))
    return total / (2 * len(v))


def gap_curve(
    images: Tensor, texts: Tensor, logit_scale: float, shifts: tuple[float, ...] = SHIFTS
) -> list[dict[str, float]]:
    """CLIP's loss with the gap widened or closed (Liang et al., section 4.2).

    Both modalities move by half of each shift along the unit vector between their centroids,
    towards each other for positive shifts, and are normalised again.

    Args:
        images, texts: (N, D) unit-norm.
        logit_scale: the model's, exp'd.
        shifts: distances in the space of the embeddings.

    Returns:
        For each shift its "shift", the "gap" then measured along the former direction (negative
        once the modalities have passed each other), and the "loss".
    """
    v, t = images.double(), texts.double()
    direction = F.normalize(v.mean(0) - t.mean(0), dim=0)
    points = []
    for shift in shifts:
        moved = F.normalize(v - shift / 2 * direction, dim=1)
        met = F.normalize(t + shift / 2 * direction, dim=1)
        between = moved.mean(0) - met.mean(0)
        signed = math.copysign(float(between.norm()), float(between @ direction))
        points.append({"shift": shift, "gap": signed, "loss": clip_loss(moved, met, logit_scale)})
    return points


def gap_measures(images: Tensor, texts: Tensor) -> dict[str, float]:
    """All numbers of this module for (N, D) unit-norm pairs."""
    return {
        "modality_gap": modality_gap(images, texts),
        "alignment": alignment(images, texts),
        "uniformity": uniformity(images, texts),
        "image_cone": cone(images),
        "text_cone": cone(texts),
        "paired_margin": paired_margin(images, texts),
        "separability": separability(images, texts),
    }

"""Probes of frozen features: nearest neighbours and a linear classifier."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

Features = NDArray[np.float32]
Labels = NDArray[np.int64]


class Labelled(NamedTuple):
    """Features (N, D) of images and the numbers of their classes (N,)."""

    features: Features
    labels: Labels


def knn(train: Labelled, test: Labelled, k: int = 20, temperature: float = 0.07) -> float:
    """Accuracy of a vote of the k most similar training images, each weighing exp(cosine / T).

    Source: Wu et al. 2018, with the k and temperature that DINO reports.
    """

    def weigh(distance: NDArray[np.float64]) -> NDArray[np.float64]:
        weights: NDArray[np.float64] = np.exp((1 - distance) / temperature)
        return weights

    model = KNeighborsClassifier(min(k, len(train.labels)), metric="cosine", weights=weigh)
    model.fit(train.features, train.labels)
    return float(model.score(test.features, test.labels))


def linear_probe(train: Labelled, test: Labelled, *, max_iter: int = 1000) -> dict[str, float]:
    """Logistic regression by L-BFGS, its strength chosen on a fifth of the training images.

    The inverse strength C is searched as in CLIP (Radford et al. 2021, appendix A.3): seven powers
    of a hundred from 1e-6 to 1e6, then around the best with half the step, down to an eighth of a
    decade. The final classifier sees all training images.

    Args:
        train, test: frozen features as they come; they are scaled by one number, so that their
            mean square is 1 (which C makes up for otherwise).
        max_iter: iterations of L-BFGS; a probe that stops there is reported, see "converged".

    Returns:
        "top1", "mean_class_recall", "c" and "converged" (1 or 0).
    """
    scale = float(np.sqrt(np.mean(np.square(train.features, dtype=np.float64)))) or 1.0
    train, test = (Labelled(x.features / scale, x.labels) for x in (train, test))
    parts = train_test_split(*train, test_size=0.2, random_state=0, stratify=_strata(train))
    fit_x, held_x, fit_y, held_y = parts

    def held_accuracy(log_c: float) -> float:
        return float(_fit(fit_x, fit_y, log_c, max_iter)[0].score(held_x, held_y))

    log_c = search(held_accuracy)
    model, converged = _fit(*train, log_c, max_iter)
    predicted = model.predict(test.features)
    return {
        "top1": float(accuracy_score(test.labels, predicted)),
        "mean_class_recall": float(
            recall_score(test.labels, predicted, average="macro", labels=np.unique(test.labels))
        ),
        "c": 10.0**log_c,
        "converged": float(converged),
    }


def search(score: Callable[[float], float]) -> float:
    """The best of -6, -4, ..., 6 and of ever finer steps around it, down to 1/8."""
    scores = {float(x): score(float(x)) for x in range(-6, 7, 2)}
    step = 1.0
    while step >= 0.125:
        best = max(scores, key=lambda x: scores[x])
        for x in (best - step, best + step):
            if -6 <= x <= 6 and x not in scores:
                scores[x] = score(x)
        step /= 2
    return max(scores, key=lambda x: scores[x])


def _fit(x: Features, y: Labels, log_c: float, max_iter: int) -> tuple[LogisticRegression, bool]:
    model = LogisticRegression(C=10.0**log_c, max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, y)
    return model, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def _strata(data: Labelled) -> Labels | None:
    """Split every class alike, if each has enough images for that."""
    classes, counts = np.unique(data.labels, return_counts=True)
    enough = counts.min() >= 2 and len(data.labels) // 5 >= len(classes)
    return data.labels if enough else None

"""Probes of frozen features: problems whose answer is known, and a vote by hand."""

import numpy as np
import pytest

from examples.evaluation.probes import Labelled, knn, linear_probe, search


def blobs(n: int, seed: int, spread: float = 1.0, scale: float = 1.0) -> Labelled:
    """Three classes in 12 dimensions, of which 3 tell them apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % 3
    centres = np.zeros((3, 12))
    centres[range(3), range(3)] = 2.5
    x = centres[labels] + spread * rng.standard_normal((n, 12))
    return Labelled((scale * x).astype(np.float32), labels)


def test_votes_by_hand() -> None:
    train, test = blobs(40, 0), blobs(30, 1)
    hits = 0
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.features, test.features)]
    for row, label in zip(unit[1] @ unit[0].T, test.labels, strict=True):
        votes = [0.0] * 3
        for j in sorted(range(40), key=lambda j: -row[j])[:7]:
            votes[train.labels[j]] += np.exp(row[j] / 0.1)
        hits += int(np.argmax(votes)) == label
    assert knn(train, test, k=7, temperature=0.1) == pytest.approx(hits / 30)
    assert knn(train, test, k=1000) > 0.5  # more than there are


def test_a_linear_problem_is_solved_whatever_the_features_scale() -> None:
    results = [
        linear_probe(blobs(150, 0, 0.3, scale), blobs(90, 1, 0.3, scale)) for scale in (1e-4, 1e3)
    ]
    for result in results:
        assert result["top1"] == 1
        assert result["mean_class_recall"] == 1
        assert result["converged"] == 1
    assert results[0]["c"] == results[1]["c"]


def test_noise_is_chance() -> None:
    rng = np.random.default_rng(0)
    train, test = (
        Labelled(rng.standard_normal((n, 8)).astype(np.float32), rng.integers(0, 3, n))
        for n in (90, 300)
    )
    assert linear_probe(train, test)["top1"] == pytest.approx(1 / 3, abs=0.1)


def test_recall_counts_every_class_alike() -> None:
    """Nine of ten test images are of the first class, and the others look like it too."""
    test = blobs(90, 1, 0.1)
    features = test.features[test.labels == 0]
    labels = np.array([0] * 27 + [1] * 3)
    result = linear_probe(blobs(90, 0, 0.1), Labelled(features, labels))
    assert (result["top1"], result["mean_class_recall"]) == pytest.approx((0.9, 0.5))


def test_an_unconverged_probe_says_so() -> None:
    assert linear_probe(blobs(60, 0), blobs(30, 1), max_iter=1)["converged"] == 0


@pytest.mark.parametrize("peak", [-6.0, -1.375, 0.0, 2.625, 6.0])
def test_the_search_finds_a_peak(peak: float) -> None:
    asked: list[float] = []

    def score(x: float) -> float:
        asked.append(x)
        return -abs(x - peak)

    assert search(score) == peak
    assert len(asked) == len(set(asked)) < 20  # of 97

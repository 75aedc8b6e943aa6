"""Retrieval with several captions an image, by sorting by hand; agreement with grades."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.evaluation import retrieval as module
from examples.evaluation.retrieval import (
    graded_agreement,
    ranks_of_best_match,
    retrieval,
)


def problem(seed: int, images: int = 30, texts: int = 75) -> tuple[Tensor, Tensor, Tensor]:
    """Features of images and of texts in random order, 1 to 5 for each image."""
    g = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=g)])
    owner = owner[torch.randperm(texts, generator=g)]
    v = torch.randn(images, 8, generator=g)
    t = v[owner] + 1.5 * torch.randn(texts, 8, generator=g)
    return F.normalize(v, dim=1), F.normalize(t, dim=1), owner


@pytest.mark.parametrize("seed", range(3))
def test_recall_by_sorting(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    v, t, owner = problem(seed)
    similarity, hits = (v @ t.T).tolist(), dict.fromkeys(retrieval(v, t, owner), 0.0)
    for k in (1, 5, 10):
        for i in range(30):
            best = sorted(range(75), key=lambda j: -similarity[i][j])[:k]
            hits[f"image_to_text_R@{k}"] += any(owner[j] == i for j in best) / 30
        for j in range(75):
            best = sorted(range(30), key=lambda i: -similarity[i][j])[:k]
            hits[f"text_to_image_R@{k}"] += (owner[j] in best) / 75
    assert retrieval(v, t, owner) == pytest.approx(hits)
    assert 0 < hits["image_to_text_R@1"] < 1


def test_one_caption_each_is_the_default() -> None:
    v, t, _ = problem(0, 20, 20)
    assert retrieval(v, t) == retrieval(v, t, torch.arange(20))


def test_a_collapsed_model_ranks_last() -> None:
    """Also when rounding makes equal similarities differ a little."""
    v = F.normalize(torch.ones(6, 8), dim=1)
    t = F.normalize(torch.ones(12, 8) + 1e-8 * torch.randn(12, 8), dim=1)
    owner = torch.arange(6).repeat(2)
    assert ranks_of_best_match(t, v, owner, torch.arange(6)).tolist() == [6] * 12
    ranks = ranks_of_best_match(v, t, torch.arange(6), owner)
    assert ranks.tolist() == [11] * 6  # its own two do not compete


def test_captions_and_images_must_fit() -> None:
    v, t, owner = problem(0)
    for bad in (owner[:-1], owner.clamp(max=28), owner + 1):
        with pytest.raises(ValueError, match="retrieval: "):
            retrieval(v, t, bad)


def test_tau_by_counting_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    grades = torch.randint(1, 5, (25,), generator=g)
    similarity = torch.round(grades + 2 * torch.randn(25, generator=g))  # ties in both
    agree = tied_x = tied_y = 0.0
    pairs = list(itertools.combinations(range(25), 2))
    for i, j in pairs:
        x, y = (float(torch.sign(z[i] - z[j])) for z in (similarity, grades.float()))
        agree += x * y
        tied_x, tied_y = tied_x + (x == 0), tied_y + (y == 0)
    levels = min(len(set(similarity.tolist())), len(set(grades.tolist())))
    expected = {
        "tau_b": agree / ((len(pairs) - tied_x) * (len(pairs) - tied_y)) ** 0.5,
        "tau_c": 2 * agree / (25**2 * (levels - 1) / levels),
    }
    assert graded_agreement(similarity, grades) == pytest.approx(expected)


def test_grades_that_say_nothing() -> None:
    with pytest.raises(ValueError, match="all judgements are the same"):
        graded_agreement(torch.rand(4), torch.ones(4))
    with pytest.raises(ValueError, match="P >= 2"):
        graded_agreement(torch.rand(1), torch.ones(1))

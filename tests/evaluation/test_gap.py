"""Measures of the modality gap: values known beforehand, and sums by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.evaluation import gap
from examples.evaluation.gap import (
    alignment,
    clip_loss,
    cone,
    gap_curve,
    gap_measures,
    modality_gap,
    paired_margin,
    separability,
    uniformity,
)


def pairs(n: int = 40, apart: float = 1.0) -> tuple[Tensor, Tensor]:
    """Matched features of two modalities, pushed apart along one axis."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(n, 8, generator=g, dtype=torch.float64)
    t = v + 0.5 * torch.randn(n, 8, generator=g, dtype=torch.float64)
    v[:, 0] += apart
    t[:, 0] -= apart
    return F.normalize(v, dim=1), F.normalize(t, dim=1)


def test_sums_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "CHUNK", 7)
    v, t = pairs(20)
    n, s = 20, (v @ t.T).tolist()
    others = [(i, j) for i in range(n) for j in range(n) if i != j]
    kernel = [math.exp(-2 * float((v[i] - t[j]).square().sum())) for i, j in others if i > j]
    expected = {
        "alignment": sum(float((v[i] - t[i]).square().sum()) for i in range(n)) / n,
        "uniformity": math.log(sum(kernel) / len(kernel)),
        "image_cone": sum(float(v[i] @ v[j]) for i, j in others) / len(others),
        "text_cone": sum(float(t[i] @ t[j]) for i, j in others) / len(others),
        "paired_margin": sum(s[i][i] for i in range(n)) / n
        - sum(s[i][j] for i, j in others) / len(others),
    }
    measured = gap_measures(v, t)
    assert {k: measured[k] for k in expected} == pytest.approx(expected)
    loss = 0.0
    for i in range(n):
        for row in (s[i], [s[j][i] for j in range(n)]):
            loss += math.log(sum(math.exp(9 * x) for x in row)) - 9 * row[i]
    assert clip_loss(v, t, 9.0) == pytest.approx(loss / 2 / n)


def test_values_known_beforehand() -> None:
    axis = F.normalize(torch.ones(10, 8), dim=1)
    assert modality_gap(axis, -axis) == pytest.approx(2)
    assert alignment(axis, -axis) == pytest.approx(4)
    assert uniformity(axis, -axis) == pytest.approx(-8)
    assert uniformity(axis, axis) == pytest.approx(0, abs=1e-6)
    assert cone(axis) == pytest.approx(1)
    assert paired_margin(axis, axis) == pytest.approx(0, abs=1e-6)
    assert cone(torch.eye(8)) == 0


def test_separability() -> None:
    """Modalities on two sides of a plane are told apart; those that coincide are not."""
    assert separability(*pairs(apart=6.0)) == 1
    v, _ = pairs()
    assert separability(v, v) == 0.5
    assert math.isnan(separability(v[:3], v[:3]))


def test_the_curve_closes_the_gap_and_passes_it() -> None:
    v, t = pairs(apart=0.7)
    width = modality_gap(v, t)
    curve = gap_curve(v, t, 9.0, (-0.5, 0.0, width, 3.0))
    widened, here, closed, beyond = curve
    assert here["gap"] == pytest.approx(width)
    assert here["loss"] == pytest.approx(clip_loss(v, t, 9.0))
    assert widened["gap"] > width
    assert abs(closed["gap"]) < 0.2 * width
    assert beyond["gap"] < 0
    v2, t2 = (F.normalize(x, dim=1) for x in (v - 1.5 * _axis(v, t), t + 1.5 * _axis(v, t)))
    assert beyond["loss"] == pytest.approx(clip_loss(v2, t2, 9.0))


def _axis(v: Tensor, t: Tensor) -> Tensor:
    return F.normalize(v.mean(0) - t.mean(0), dim=0)

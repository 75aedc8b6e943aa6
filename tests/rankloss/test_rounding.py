"""Streaming implementations are as accurate as float allows, judged against float64.

The error of a streaming implementation, in value and in every gradient, may be twice that of
the naive computation in the same precision, plus a few roundings of the utilities. Inputs of
fewer bits are judged by the same float32 gate, plus the rounding of a gradient to their dtype.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from rankloss.kernels import blocked
from tests.helpers.problems import Problem, each_streaming, make_problem
from tests.properties import value_and_gradients

EPS = torch.finfo(torch.float32).eps
SLACK = 2.0  # roundings of the largest utility, beyond twice the naive error


def random_problems(count: int, seed: int) -> Iterator[tuple[Problem, np.random.Generator]]:
    """Problems in float32, bfloat16 and float16: small, peaked, tied, masked, at any scale."""
    g = np.random.default_rng(seed)
    for _ in range(count):
        m = int(g.choice([1, 2, 3, 5, 8, 16, 17, 31, 40], p=[0.05] * 4 + [0.16] * 5))
        dtype = [torch.float32, torch.bfloat16, torch.float16][g.choice(3, p=[0.7, 0.15, 0.15])]
        problem = make_problem(
            int(g.integers(2**31)),
            int(g.integers(1, 9)),
            m,
            m if g.random() < 0.4 else int(g.integers(1, m + 1)),
            int(g.integers(1, 6)),
            r=int(g.integers(1, 9)),
            scale=float(g.choice([1.0, 14.3, 50.0, 100.0])),
            strength=float(g.choice([0.03, 0.3, 1.0])),
            ties=bool(g.random() < 0.2),
            keep=float(g.choice([1.0, 0.8, 0.2], p=[0.6, 0.3, 0.1])),
            consistent=bool(g.random() < 0.5),
            discount="log" if g.random() < 0.3 else "none",
            dtype=dtype,
        )
        yield problem, g


def excess(p: Problem, impl: str) -> tuple[float, str]:
    """Largest error beyond twice the naive one, in units of what the gate allows, and its place."""
    upstream = torch.linspace(0.5, 1.5, len(p.scores))
    exact = value_and_gradients(p.to(torch.float64), "reference", upstream)
    naive = value_and_gradients(p.to(torch.float32), "reference", upstream)
    fast = value_and_gradients(p, impl, upstream)
    half_ulp = torch.finfo(p.scores.dtype).eps / 2
    tiny = torch.finfo(p.scores.dtype).smallest_normal
    utility, *terms = sizes(p.to(torch.float64), float(exact[1].abs().max()))
    allowed = [SLACK * EPS * utility]
    for term, z in zip(terms, exact[1:], strict=True):
        allowed.append(SLACK * EPS * utility * term + half_ulp * float(z.abs().max()) + tiny)
    worst = (0.0, "")
    names = ("nll", "scores", "predecessors", "keys")
    for name, x, y, z, limit in zip(names, fast, naive, exact, allowed, strict=False):
        if not x.isfinite().all():
            return float("inf"), f"{name} is not finite"
        error = float((x.double() - z).abs().max() - 2 * (y.double() - z).abs().max())
        worst = max(worst, (error / limit, name))
    return worst


def sizes(p: Problem, d_scores: float) -> list[float]:
    """Size of the log-sum-exps, and of the terms summed into each gradient.

    A log-sum-exp is at most the largest utility plus log M, and a probability is as wrong as its
    log-sum-exp, however small the gradient it ends up in. An entry of the scores' gradient is a
    sum of probabilities minus the weight of its own place, so that sum is at most the entry
    (`d_scores`) plus the weight.
    """
    k = p.ranking.shape[1]
    place = torch.arange(1, k + 1, dtype=torch.float64)
    weights = 1 / torch.log1p(place) if p.discount == "log" else torch.ones_like(place)
    kept = torch.ones_like(p.ranking, dtype=torch.bool)
    kept = kept if p.mask is None else p.mask.gather(1, p.ranking)
    places = max(1, int(kept.sum(1).min()))
    g = 1.5 * float(weights[0] / weights[:places].sum())  # the most that one place weighs
    g += d_scores
    room = math.log(p.scores.shape[1]) + 1
    utilities = p.scores[:, None].expand(-1, k, -1)  # (N, K, M)
    if p.transitions is None:
        return [float(utilities.abs().max()) + room, g]
    predecessors, keys = p.transitions
    d_predecessors = d_keys = 0.0
    for m in range(1, min(p.order, k)):
        tables = predecessors[m * (m - 1) // 2 : m * (m + 1) // 2]
        factors = [
            t[p.ranking[:, m - j : k - j]] for j, t in enumerate(tables, start=1)
        ]  # (N, K-m, r)
        query = torch.stack(factors).prod(0)
        tau = query @ keys[m - 1].T
        utilities = utilities + torch.nn.functional.pad(tau, (0, 0, m, 0))
        d_keys = max(d_keys, float(query.abs().max()))
        for factor in factors:
            others = float((query / factor).abs().max()) * float(keys[m - 1].abs().max())
            d_predecessors = max(d_predecessors, others)
    return [float(utilities.abs().max()) + room, g, g * d_predecessors, g * d_keys]


def check(count: int, seed: int, impl: str, shrink_tiles: Callable[[int, int], None]) -> None:
    for number, (p, g) in enumerate(random_problems(count, seed)):
        if number % 2:  # tiles so small that these problems need many
            shrink_tiles(int(g.integers(40, 2000)), int(g.integers(2, 9)))
        else:
            shrink_tiles(1 << 17, 64)
        worst, name = excess(p, impl)
        n, m = p.scores.shape
        assert worst <= 1, (
            f"case {number}: {name} is {worst:.3g} times past the gate; N={n}, M={m}, "
            f"K={p.ranking.shape[1]}, order {p.order}, {p.scores.dtype}, utilities to {p.scale:.3g}"
        )


@pytest.fixture
def shrink_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def to(tile: int, rows: int) -> None:
        monkeypatch.setattr(blocked, "TILE", tile)
        monkeypatch.setattr(blocked, "ROWS", rows)

    return to


@each_streaming
def test_rounding_of_2000_cases(impl: str, shrink_tiles: Callable[[int, int], None]) -> None:
    check(2_000, 1, impl, shrink_tiles)


@pytest.mark.long
@pytest.mark.timeout(3600)
@each_streaming
def test_rounding_of_10000_cases(impl: str, shrink_tiles: Callable[[int, int], None]) -> None:
    check(10_000, 2, impl, shrink_tiles)


@each_streaming
@pytest.mark.parametrize("k", [3, 60, 300])
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("agreement", ["agreeing", "reversed", "random"])
def test_peaked_scores(agreement: str, order: int, k: int, impl: str) -> None:
    """Scores from 100 down to -100: most of the softmax underflows, and sums must not cancel."""
    p = make_problem(k, 4, 300, k, order, strength=0.1, scale=100.0, dtype=torch.float32)
    steps = torch.linspace(100, -100, 300).expand(4, 300)
    best_first = torch.stack([torch.randperm(300) for _ in range(4)])
    scores = torch.empty(4, 300).scatter_(1, best_first, steps)
    ranking = {"agreeing": best_first, "reversed": best_first.flip(1), "random": p.ranking}
    p = p._replace(scores=scores, ranking=ranking[agreement][:, :k])
    worst, name = excess(p, impl)
    assert worst <= 1, name


@each_streaming
@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("sign", [1, -1], ids=["+100", "-100"])
def test_equal_scores_at_the_extremes(sign: int, order: int, impl: str) -> None:
    p = make_problem(0, 3, 70, 70, order, strength=0.1, dtype=torch.float32)
    p = p._replace(scores=torch.full((3, 70), 100.0 * sign))
    worst, name = excess(p, impl)
    assert worst <= 1, name

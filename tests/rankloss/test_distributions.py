"""Plackett-Luce rankings as a distribution, against all rankings written out."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rankloss import Transitions
from rankloss.distributions import PlackettLuce


def tables(order: int, m: int, size: float = 1.0) -> Transitions | None:
    if order < 2:
        return None
    generator = torch.Generator().manual_seed(order)
    shapes = (order * (order - 1) // 2, m, 3), (order - 1, m, 3)
    return Transitions(
        *(size * torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes)
    )


def problem(order: int, top_k: int | None = None, m: int = 4, batch: int = 2) -> PlackettLuce:
    generator = torch.Generator().manual_seed(10 + order)
    scores = torch.randn(batch, m, generator=generator, dtype=torch.float64)
    return PlackettLuce(scores, tables(order, m), top_k=top_k, validate_args=True)


def probability(p: PlackettLuce, row: int, ranking: tuple[int, ...]) -> float:
    """The product of softmaxes, one candidate at a time, in Python floats."""
    scores: list[float] = p.scores[row].tolist()
    predecessors, keys = ([], []) if p.transitions is None else [x.tolist() for x in p.transitions]
    total = 1.0
    for k, winner in enumerate(ranking):
        u = {}
        for d in set(range(len(scores))) - set(ranking[:k]):
            u[d] = scores[d]
            for m in range(1, min(len(keys), k) + 1):
                rows = [
                    predecessors[m * (m - 1) // 2 + j - 1][ranking[k - j]] for j in range(1, m + 1)
                ]
                u[d] += sum(math.prod(x) * c for *x, c in zip(*rows, keys[m - 1][d], strict=True))
        total *= math.exp(u[winner]) / sum(map(math.exp, u.values()))
    return total


def every(p: PlackettLuce) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(p.scores.shape[-1]), p.event_shape[0]))


ORDERS = pytest.mark.parametrize("order", [1, 2, 3, 4])
PLACES = pytest.mark.parametrize("top_k", [None, 1, 2])


@ORDERS
@PLACES
def test_log_prob_of_every_ranking(order: int, top_k: int | None) -> None:
    p = problem(order, top_k)
    support = p.enumerate_support()
    assert [tuple(x) for x in support[:, 0].tolist()] == every(p)
    expected = [[probability(p, row, x) for row in range(2)] for x in every(p)]
    torch.testing.assert_close(
        p.log_prob(support).exp(), torch.tensor(expected, dtype=torch.float64)
    )


@ORDERS
@PLACES
def test_mode_is_the_best_of_all(order: int, top_k: int | None) -> None:
    p = problem(order, top_k)
    best = [max(every(p), key=lambda x: probability(p, row, x)) for row in range(2)]
    assert [tuple(x) for x in p.mode.tolist()] == best


@ORDERS
def test_entropy_by_sampling(order: int) -> None:
    torch.manual_seed(0)
    p = problem(order)
    exact = torch.stack([-(q := p.log_prob(p.enumerate_support())).exp() * q]).sum((0, 1))
    estimate = p.entropy(samples=4000)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.03)
    one = problem(order, top_k=1)
    plain = torch.distributions.Categorical(logits=one.scores).entropy()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(one.entropy(samples=1), plain)


@ORDERS
@PLACES
def test_samples_have_their_probabilities(order: int, top_k: int | None) -> None:
    torch.manual_seed(0)
    p = problem(order, top_k)
    n = 8000
    drawn = p.sample(n)
    assert drawn.shape == (n, 2, p.event_shape[0])
    for row in range(2):
        counts = dict.fromkeys(every(p), 0)
        for x in drawn[:, row].tolist():
            counts[tuple(x)] += 1
        for x, count in counts.items():
            q = probability(p, row, x)
            assert abs(count / n - q) < 5 * math.sqrt(q * (1 - q) / n) + 1e-9, x


def test_conventions_of_torch() -> None:
    p = PlackettLuce(torch.randn(3, 1, 5), top_k=2, validate_args=True)
    assert (p.batch_shape, p.event_shape) == ((3, 1), (2,))
    assert p.sample().shape == (3, 1, 2)
    assert p.sample((7, 2)).shape == (7, 2, 3, 1, 2)
    assert p.log_prob(torch.tensor([4, 0])).shape == (3, 1)
    wide = p.expand((3, 4))
    assert wide.sample((2,)).shape == (2, 3, 4, 2)
    assert p.enumerate_support(expand=False).shape == (20, 1, 1, 2)
    both = torch.distributions.Independent(p, 1)
    assert both.log_prob(both.sample((6,))).shape == (6, 3)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("bad", [[0, 0], [0, 5], [-1, 0]])
def test_what_is_no_ranking_is_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="support"):
        PlackettLuce(torch.randn(5), top_k=2, validate_args=True).log_prob(torch.tensor(bad))


@pytest.mark.parametrize(
    ("scores", "top_k", "message"),
    [
        (torch.tensor(1.0), None, "got a scalar"),
        (torch.zeros(3), 4, r"top_k must be in \[1, M=3\]"),
        (torch.tensor([0.0, torch.nan]), None, "scores"),
    ],
)
def test_bad_parameters(scores: Tensor, top_k: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlackettLuce(scores, top_k=top_k, validate_args=True)


def test_mode_of_too_many_rankings_names_the_remedy() -> None:
    p = PlackettLuce(torch.zeros(12), tables(2, 12))
    with pytest.raises(NotImplementedError, match=r"greedy\(\)"):
        _ = p.mode
    assert p.greedy().shape == (12,)


def test_gradients_reach_scores_and_tables() -> None:
    scores = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    tables_of_two = tables(2, 4)
    assert tables_of_two is not None
    leaves = [x.requires_grad_() for x in tables_of_two]
    p = PlackettLuce(scores, Transitions(*leaves))
    ranking = p.sample()
    assert torch.autograd.gradcheck(
        lambda s, a, b: PlackettLuce(s, Transitions(a, b)).log_prob(ranking), (scores, *leaves)
    )

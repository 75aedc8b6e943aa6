"""Plackett-Luce rankings, of any order, as a `torch.distributions.Distribution`."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from rankloss.plackett_luce import plackett_luce_nll, rankings
from rankloss.transitions import Transitions

ENUMERATED = 100_000  # most rankings that `mode` searches one by one


class _Rankings(constraints.Constraint):
    """Integers in [0, M), distinct along the last dimension."""

    is_discrete = True
    event_dim = 1

    def __init__(self, candidates: int) -> None:
        self.candidates = candidates
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        ordered = value.sort(-1).values
        distinct = (ordered.diff(dim=-1) > 0).all(-1)
        inside = ((value >= 0) & (value < self.candidates)).all(-1)
        return distinct & inside & (value == value.long()).all(-1)


class PlackettLuce(Distribution):
    """Rankings that take one candidate after another, each by a softmax over those left.

        p(pi) = prod over k = 1..K of exp u_k(pi_k) / sum over d not in pi_1..pi_{k-1} of exp u_k(d)
        u_k(d) = scores[d] + sum over m < R of tau_m(pi_{k-1}, ..., pi_{k-m}; d)

    Sources: Plackett (1975), Luce (1959); the transition terms of orders R >= 2 are this project's,
    see `rankloss.plackett_luce_nll`, whose likelihood this is (a sum over places there averaged).

    Args:
        scores: (..., M) floating log-weights of the candidates; leading dimensions are the batch.
        transitions: tables of the order >= 2 terms, for all of the batch; None is order 1.
        top_k: K, places of a ranking, 1 <= K <= M; None is M.
        validate_args: as in every torch distribution.

    Raises:
        ValueError: scores have no dimension, top_k is outside [1, M], or (with validation) scores
            are not finite.

    >>> rankings_of_three = PlackettLuce(torch.tensor([2.0, 0.0, 1.0]))
    >>> rankings_of_three.mode
    tensor([0, 2, 1])
    >>> rankings_of_three.sample((5,)).shape
    torch.Size([5, 3])
    >>> everything = rankings_of_three.enumerate_support()
    >>> round(rankings_of_three.log_prob(everything).exp().sum().item(), 4)
    1.0
    """

    arg_constraints = {"scores": constraints.real_vector}  # noqa: RUF012 (as torch declares it)
    has_enumerate_support = True

    def __init__(
        self,
        scores: Tensor,
        transitions: Transitions | None = None,
        *,
        top_k: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if scores.dim() < 1:
            raise ValueError("PlackettLuce: scores must be (..., M), got a scalar")
        m = scores.shape[-1]
        if top_k is not None and not 1 <= top_k <= m:
            raise ValueError(f"PlackettLuce: top_k must be in [1, M={m}], got {top_k}")
        self.scores, self.transitions, self.top_k = scores, transitions, top_k
        super().__init__(scores.shape[:-1], torch.Size([top_k or m]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Rankings: K distinct candidates."""
        return _Rankings(self.scores.shape[-1])

    def expand(
        self, batch_shape: Sequence[int], _instance: Distribution | None = None
    ) -> "PlackettLuce":
        """Return the distribution with its batch expanded to `batch_shape`."""
        scores = self.scores.expand(*batch_shape, -1)
        return PlackettLuce(scores, self.transitions, top_k=self.top_k, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of rankings, differentiable in scores and transitions.

        Args:
            value: (..., K) integers, best first, broadcast against the batch.

        Raises:
            ValueError: (with validation) a row is not a ranking.
        """
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # type: ignore[no-untyped-call]
        value = value.expand(*shape, -1).reshape(-1, value.shape[-1])
        scores = self.scores.expand(*shape, -1).reshape(len(value), -1)
        nll = plackett_luce_nll(scores, value, self.transitions, reduction="none", validate=False)
        return (-value.shape[-1] * nll).reshape(shape)

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Draw rankings, (*sample_shape, *batch_shape, K) int64; an int asks for that many."""
        shape = self._shape(sample_shape)
        scores = self._rows(shape)
        if self.transitions is None:
            return rankings(scores + _gumbel(scores), self.event_shape[0]).reshape(shape)
        taken = torch.stack([place for place, _ in self._walk(scores, _gumbel)], -1)
        return taken.reshape(shape)

    @property
    def mode(self) -> Tensor:
        """The most probable ranking, (*batch_shape, K) int64.

        Candidates by score at order 1. At higher orders a search through all rankings.

        Raises:
            NotImplementedError: order >= 2 with more than 100,000 rankings; see `greedy`.
        """
        if self.transitions is None:
            return self.greedy()
        count = math.perm(self.scores.shape[-1], self.event_shape[0])
        if count > ENUMERATED:
            raise NotImplementedError(
                f"PlackettLuce.mode: order >= 2 needs a search through {count} rankings, more than "
                f"{ENUMERATED}; greedy() takes the best candidate place by place, top_k= shortens"
            )
        every = self.enumerate_support()
        best = self.log_prob(every).argmax(0)
        return every.gather(0, best[None, ..., None].expand(1, *every.shape[1:]))[0]

    @torch.no_grad()
    def greedy(self) -> Tensor:
        """Return the ranking that takes the best candidate at each place, (*batch_shape, K)."""
        shape = self._shape(())
        taken = [place for place, _ in self._walk(self._rows(shape), torch.zeros_like)]
        return torch.stack(taken, -1).reshape(shape)

    @torch.no_grad()
    def entropy(self, samples: int = 256) -> Tensor:
        """Estimate the entropy in nats, (*batch_shape,), without gradient.

        The sum over places of the exact entropy of that place, averaged over sampled beginnings:
        the chain rule, exact for K = 1.

        Args:
            samples: rankings drawn for each member of the batch.
        """
        shape = self._shape(samples)
        scores = self._rows(shape)
        total = scores.new_zeros(len(scores))
        for _, utilities in self._walk(scores, _gumbel):
            log_p = utilities.log_softmax(-1)
            total -= torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)
        return total.reshape(shape[:-1]).mean(0)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all M! / (M - K)! rankings, (count, *batch_shape, K), in lexicographic order.

        Args:
            expand: False leaves the batch dimensions at 1.
        """
        m, k = self.scores.shape[-1], self.event_shape[0]
        one = torch.arange(m, device=self.scores.device)[:, None]
        every = one
        for _ in range(k - 1):
            every = torch.cat([every.repeat_interleave(m, 0), one.repeat(len(every), 1)], 1)
            every = every[(every[:, :-1] != every[:, -1:]).all(1)]
        every = every.reshape(-1, *[1] * len(self.batch_shape), k)
        return every.expand(-1, *self.batch_shape, -1) if expand else every

    def _shape(self, sample_shape: int | Sequence[int]) -> torch.Size:
        asked = (sample_shape,) if isinstance(sample_shape, int) else sample_shape
        return self._extended_shape(torch.Size(asked))

    def _rows(self, shape: torch.Size) -> Tensor:
        """Scores of every ranking to be made, (rows, M), float32 or float64."""
        wide = torch.promote_types(self.scores.dtype, torch.float32)
        return (
            self.scores.detach().to(wide).expand(*shape[:-1], -1).reshape(-1, self.scores.shape[-1])
        )

    def _walk(
        self, scores: Tensor, noise: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Take candidates place by place: the taken ones (rows,), and utilities (rows, M) of all.

        Candidates taken before are at -inf. `noise` is added to choose.
        """
        gone = torch.zeros_like(scores, dtype=torch.bool)
        taken: list[Tensor] = []
        for _ in range(self.event_shape[0]):
            utilities = scores + _transition_terms(self.transitions, taken, scores)
            utilities = utilities.masked_fill(gone, -torch.inf)
            place = (utilities + noise(utilities)).argmax(1)
            yield place, utilities
            gone = gone.scatter(1, place[:, None], True)
            taken.append(place)


def _gumbel(x: Tensor) -> Tensor:
    return -torch.empty_like(x).exponential_().log()


def _transition_terms(
    transitions: Transitions | None, taken: list[Tensor], scores: Tensor
) -> Tensor:
    """Sum over m of tau_m(taken[-1], ..., taken[-m]; d), (rows, M)."""
    total = torch.zeros_like(scores)
    if transitions is None:
        return total
    predecessors, keys = (x.detach().to(scores.dtype) for x in transitions)
    for m in range(1, min(len(keys), len(taken)) + 1):
        first = m * (m - 1) // 2
        query = predecessors[first][taken[-1]]
        for j in range(2, m + 1):
            query = query * predecessors[first + j - 1][taken[-j]]
        total = total + query @ keys[m - 1].T
    return total

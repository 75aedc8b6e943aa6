"""Problems to draw, and the implementations to try them on."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from rankloss import Transitions
from rankloss.options import Discount

STREAMING = ("blocked",)  # implementations fast enough to train with; a new one is added here
IMPLEMENTATIONS = (*STREAMING, "reference")

FLOAT32_ONLY = ("triton",)  # also needs a GPU, or Triton's interpreter

each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_streaming = pytest.mark.parametrize("impl", STREAMING)


class Problem(NamedTuple):
    """Arguments of `plackett_luce_nll`; `scale` bounds the absolute utilities."""

    scores: Tensor  # (N, M)
    ranking: Tensor  # (N, K)
    transitions: Transitions | None
    mask: Tensor | None  # (N, M)
    discount: Discount
    scale: float

    @property
    def order(self) -> int:
        return 1 if self.transitions is None else 1 + len(self.transitions.keys)

    def to(self, dtype: torch.dtype) -> "Problem":
        tables = self.transitions and Transitions(*(x.to(dtype) for x in self.transitions))
        return self._replace(scores=self.scores.to(dtype), transitions=tables)

    def for_impl(self, impl: str) -> "Problem":
        """The problem in a precision and on a device that `impl` can run."""
        if impl not in FLOAT32_ONLY:
            return self
        p = self.to(torch.float32) if self.scores.dtype == torch.float64 else self
        if not torch.cuda.is_available() or self.scores.is_meta:
            return p
        return p._replace(
            scores=p.scores.cuda(),
            ranking=p.ranking.cuda(),
            transitions=p.transitions and Transitions(*(x.cuda() for x in p.transitions)),
            mask=p.mask if p.mask is None else p.mask.cuda(),
        )

    def tensors(self) -> list[Tensor]:
        """Return what has a gradient: scores and, from order 2 on, the two tables."""
        return [self.scores, *(self.transitions or ())]


def make_problem(
    seed: int,
    n: int,
    m: int,
    k: int,
    order: int,
    *,
    r: int = 4,
    scale: float = 5.0,
    strength: float = 1.0,
    ties: bool = False,
    keep: float = 1.0,
    consistent: bool = False,
    discount: Discount = "none",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """A random problem.

    Args:
        scale: scores are uniform in [-scale, scale].
        strength: size of a transition term.
        ties: scores take one of five values.
        keep: share of candidates left by the mask; 1 means no mask.
        consistent: rank by the scores themselves, so that the softmax mass sits on the taken
            candidate; otherwise the ranking is independent of the scores.
    """
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, m, generator=g, dtype=torch.float64) * 2 - 1
    if ties:
        scores = (scores * 2).round() / 2
    noise = torch.rand(n, m, generator=g, dtype=torch.float64)
    target = scores + 0.01 * noise if consistent else noise
    ranking = target.argsort(1, descending=True)[:, :k]
    transitions, bound = None, 0.0
    if order >= 2:
        pairs = order * (order - 1) // 2
        predecessors = torch.randn(pairs, m, r, generator=g, dtype=torch.float64)
        keys = torch.randn(order - 1, m, r, generator=g, dtype=torch.float64)
        transitions = Transitions(predecessors, keys * strength * r**-0.5)
        sizes = term_bounds(transitions)
        bound = float(sizes.sum())
    mask = torch.rand(n, m, generator=g) < keep if keep < 1 else None
    problem = Problem(scores * scale, ranking, transitions, mask, discount, scale + bound)
    return problem.to(dtype)


def term_bounds(transitions: Transitions) -> Tensor:
    """An upper bound of |tau_m| for each m, by Cauchy-Schwarz."""
    bounds = []
    for m, keys in enumerate(transitions.keys, start=1):
        tables = transitions.predecessors[m * (m - 1) // 2 : m * (m + 1) // 2]
        query = tables.abs().amax(1).prod(0).norm()
        bounds.append(query * keys.norm(dim=1).max())
    return torch.stack(bounds)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    sizes: tuple[int, int] = (1, 40),
    orders: tuple[int, int] = (1, 5),
    full: bool = False,
    masks: bool = True,
) -> Problem:
    """Problems over shapes, orders, scales to +-100, ties, masks and both precisions.

    full: rank every candidate, K = M.
    """
    m = draw(st.integers(*sizes))
    return make_problem(
        draw(st.integers(0, 2**31)),
        draw(st.integers(*sizes)),
        m,
        m if full else draw(st.integers(1, m)),
        draw(st.integers(*orders)),
        r=draw(st.integers(1, 6)),
        scale=draw(st.sampled_from([0.0, 1.0, 14.3, 100.0])),
        strength=draw(st.sampled_from([0.1, 1.0])),
        ties=draw(st.booleans()),
        keep=draw(st.sampled_from([1.0, 0.7, 0.2])) if masks else 1.0,
        consistent=draw(st.booleans()),
        discount=draw(st.sampled_from(["none", "log"])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
    )


CASES = {
    "order 1, K = M": make_problem(0, 4, 6, 6, 1, dtype=torch.float32),
    "order 1, K < M": make_problem(1, 4, 6, 2, 1, dtype=torch.float32),
    "order 3, K = M": make_problem(2, 4, 6, 6, 3, dtype=torch.float32),
    "order 3, K < M": make_problem(3, 4, 9, 3, 3, dtype=torch.float32),
    "order 3, float64": make_problem(4, 4, 6, 5, 3),
    "order 2, one anchor": make_problem(5, 1, 6, 5, 2, dtype=torch.float32),
    "order 2, no anchors": make_problem(6, 0, 6, 5, 2, dtype=torch.float32),
}
each_case = pytest.mark.parametrize("p", CASES.values(), ids=CASES.keys())


def arguments(p: Problem) -> tuple[Tensor, ...]:
    """Return arguments of the forward op; one row counts no place, and one only its first."""
    n, m = p.scores.shape
    k = p.ranking.shape[1]
    lengths = torch.tensor([k, 1, 0, k])[:n]
    weights = torch.linspace(1, 2, k, dtype=p.scores.dtype)
    tables = p.transitions or (p.scores.new_empty(0, m, 0), p.scores.new_empty(0, m, 0))
    return p.scores, p.ranking, lengths, weights, *tables

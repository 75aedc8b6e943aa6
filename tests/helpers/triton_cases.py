"""Problems for the Triton kernels, what float64 says of them, how close kernels must come."""

import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rankloss.kernels import plackett_luce, reference
from rankloss.kernels.configurations import Plan, Tile
from tests.helpers.problems import make_problem
from tests.helpers.sanitizer import Report, sanitize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

can_run = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or TRITON_INTERPRET=1"
)
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

SMALL_TILES = Plan(Tile(16, 16), Tile(16, 16), columns=32)
"""Many tiles, and several blocks of columns, at sizes the interpreter runs in no time."""


class Inputs(NamedTuple):
    """Arguments of `rankloss.kernels.plackett_luce`."""

    scores: Tensor
    ranking: Tensor
    lengths: Tensor
    weights: Tensor
    predecessors: Tensor
    keys: Tensor

    def with_leaves(self) -> "Inputs":
        """Copies whose floating tensors but the weights collect gradients."""
        scores, predecessors, keys = (
            x.detach().clone().requires_grad_() for x in (self.scores, self.predecessors, self.keys)
        )
        return self._replace(scores=scores, predecessors=predecessors, keys=keys)

    def leaves(self) -> list[Tensor]:
        return [self.scores, self.predecessors, self.keys]

    def double(self) -> "Inputs":
        return Inputs(*(x.double() if x.is_floating_point() else x for x in self))

    def counts(self) -> Tensor:
        """(N, K), whether a place counts."""
        k = self.ranking.shape[1]
        return torch.arange(k, device=self.lengths.device) < self.lengths[:, None]


class Results(NamedTuple):
    """A value with the gradients of sum_i upstream_i nll_i."""

    nll: Tensor  # (N,)
    d_scores: Tensor
    d_predecessors: Tensor
    d_keys: Tensor

    def gradients(self) -> list[Tensor]:
        return [self.d_scores, self.d_predecessors, self.d_keys]


def make_inputs(
    n: int,
    m: int,
    k: int,
    order: int,
    r: int = 8,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    strength: float = 1.0,
    ties: bool = False,
    consistent: bool = False,
    ragged: bool = False,
    masked: bool = False,
    discount: bool = False,
    seed: int = 0,
) -> Inputs:
    """A random problem; tables in `dtype`, scores in float32.

    Args:
        ragged: lengths from 0 to K, both included as soon as there are two anchors.
        masked: a third of the candidates have score -inf and are not ranked within the lengths.
        discount: w_k = 1/log(k+1), else 1.

    The other arguments are those of `properties.make_problem`.
    """
    p = make_problem(
        seed,
        n,
        m,
        m,
        order,
        r=r,
        scale=scale,
        strength=strength,
        ties=ties,
        consistent=consistent,
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    scores, ranking, lengths = p.scores, p.ranking, torch.full((n,), k)
    if ragged:
        lengths = torch.randint(0, k + 1, (n,), generator=generator)
        if n > 1:
            lengths[0], lengths[-1] = k, 0
    if masked:
        out = torch.rand(n, m, generator=generator) < 1 / 3
        scores = scores.masked_fill(out, -torch.inf)
        last = out.gather(1, ranking).int().argsort(dim=1, stable=True)
        ranking = ranking.gather(1, last)
        lengths = torch.minimum(lengths, m - out.sum(1))
    places = torch.arange(1, k + 1)
    weights = 1 / (places + 1).log() if discount else torch.ones(k)
    tables = p.transitions or (scores.new_empty(0, m, r), scores.new_empty(0, m, r))
    ranking = ranking[:, :k].contiguous()
    inputs = Inputs(scores, ranking, lengths, weights, *(x.to(dtype) for x in tables))
    return Inputs(*(x.to(DEVICE) for x in inputs))


@contextmanager
def guarded(*, reverse: bool = False) -> Iterator[Report]:
    """Sanitised launches whose fresh buffers hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty and the like return
    assert torch.empty(1).isnan()
    try:
        with sanitize(reverse=reverse) as report:
            yield report
    finally:
        torch.use_deterministic_algorithms(before)


def reserve(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros; pages that nothing touches take no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def upstream(n: int) -> Tensor:
    """Factors of the anchors' values: positive, negative and zero."""
    return torch.linspace(-0.7, 1.4, 2 * n + 1, device=DEVICE)[:n] * 3 if n > 1 else torch.ones(n)


def run(inputs: Inputs, impl: str = "triton", grad: Tensor | None = None) -> Results:
    """Value and gradients by the op."""
    x = inputs.with_leaves()
    nll = plackett_luce(*x, impl=impl)
    grad = upstream(len(nll)) if grad is None else grad
    return Results(nll.detach(), *torch.autograd.grad(nll, x.leaves(), grad))


def run_total(inputs: Inputs, grad: Tensor, impl: str = "triton") -> tuple[Tensor, ...]:
    """The sum weighted by `grad`, its gradients made ahead: scalar value and gradients."""
    x = inputs.with_leaves()
    total = plackett_luce(*x, impl=impl, anchor_weights=grad)
    return total.detach(), *torch.autograd.grad(total, x.leaves())


def expected(inputs: Inputs, grad: Tensor | None = None) -> Results:
    """Value and gradients of the plain implementation, in float64 on the same inputs."""
    x = inputs.double().with_leaves()
    nll = plackett_luce(*x, impl="reference")
    grad = upstream(len(nll)) if grad is None else grad
    d = torch.autograd.grad(nll, x.leaves(), grad.double(), materialize_grads=True)
    return Results(nll.detach(), *d)


def utilities(inputs: Inputs) -> Tensor:
    """u, (N, K, M) in float64, of taken candidates too."""
    x = inputs.double()
    return x.scores[:, None] + reference._transition_scores(x.ranking, x.predecessors, x.keys)


# ---------------------------------------------------------------- how close is close enough

GRADIENT_GATES = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Root mean square error over root mean square; the interpreter truncates to bfloat16."""


def largest_utility(inputs: Inputs) -> float:
    """max(1, |u|)."""
    u = utilities(inputs)[inputs.counts()]
    return max(1.0, float(u[u.isfinite()].abs().max())) if u.numel() else 1.0


def rounding_of_queries(inputs: Inputs) -> float:
    """Most that a utility may move because kernels round products of predecessors to the tables'
    dtype: eps * sum_c |q_c C_c|. A single predecessor row is exact."""
    if inputs.keys.dtype == torch.float32 or len(inputs.keys) < 2:
        return 0.0
    sizes = inputs._replace(
        scores=torch.zeros_like(inputs.scores),
        predecessors=inputs.predecessors.abs(),
        keys=inputs.keys.abs(),
    )
    return float(torch.finfo(inputs.keys.dtype).eps * utilities(sizes).max())


def assert_close(actual: Results, wanted: Results, inputs: Inputs) -> None:
    """A place's value to 2e-6 of the largest utility, on average over an anchor's places;
    gradients by the ratio of mean squares.

    Utilities of size |u| are rounded three times before they become a probability, each time by
    half an eps of theirs; so much of a gradient is always uncertain.
    """
    size = largest_utility(inputs)
    limit = 1e-6 * size + rounding_of_queries(inputs)
    weight = (inputs.weights * inputs.counts()).sum(1).clamp(min=1)
    worst = ((actual.nll - wanted.nll).abs() / weight).max() if len(weight) else 0
    assert worst <= 2 * limit, f"nll is off by {worst:.2e} a place, limit {2 * limit:.2e}"
    gate = max(GRADIENT_GATES[inputs.keys.dtype], 1.5 * torch.finfo(torch.float32).eps * size)
    for name, a, b in zip(Results._fields[1:], actual.gradients(), wanted.gradients(), strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all(), f"{name} is not finite"
        error = (a - b).double().norm()
        # a gradient that cancels, even to 0, is only known as well as the terms it sums
        assert error <= gate * (b.norm() + 5e-2), (
            f"{name}: ratio {error / b.norm():.1e} > {gate:.1e}"
        )


def assert_identical(a: Results, b: Results) -> None:
    """Bit for bit."""
    for name, x, y in zip(Results._fields, a, b, strict=True):
        assert torch.equal(x, y), f"{name} differs"

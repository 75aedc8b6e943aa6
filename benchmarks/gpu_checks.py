"""Are the kernels right on this device? Values and all gradients against float64."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.gpu_measure import Bench
from benchmarks.gpu_problems import Problem, Sizes, as_float64, make_problem
from benchmarks.gpu_providers import build_clip, build_ours

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest ||found - exact|| / ||exact|| of the value or of a gradient. Half-precision tables
round their queries and errors to half before a product, as attention does."""
CHUNK = 1 << 28  # utilities of the float64 truth alive at a time


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool | None  # None: could not be made
    detail: str


def checks(bench: Bench, sizes: Sizes) -> Iterator[Callable[[], Check]]:
    """In the order in which they matter."""
    halves = [torch.bfloat16, torch.float16] if bench.real else [torch.float16]
    shapes = sorted(sizes.checks, key=lambda shape: math.prod(shape))
    for dtype in (*halves, torch.float32):
        yield partial(spot_check, bench, sizes, dtype)
        yield partial(peaked_check, bench, sizes, dtype)
    yield partial(repeatability, bench, sizes)
    yield partial(graph_replay, bench, sizes)
    for n, k, m in shapes:
        for order in (3, 1, 2, 4):
            for dtype in (*halves, torch.float32) if order > 1 else (torch.float32,):
                yield partial(full_check, bench, Case(order, n, k, m), dtype)
    for pairs in sizes.pairs[:3]:
        yield partial(full_check, bench, Case(0, pairs, 1, pairs), torch.float32)
    if not bench.real:
        reason = "the interpreter has no bfloat16 arithmetic"
        yield partial(Check, "all of these in bfloat16", None, reason)


def full_check(bench: Bench, case: Case, dtype: torch.dtype) -> Check:
    problem = make_problem(case, bench.device, dtype)
    build = build_ours if case.order else build_clip
    found = _outcome(build(problem)(), problem)
    return _compared(f"{case.name}, {_short(dtype)}", found, truth(problem), dtype)


def spot_check(bench: Bench, sizes: Sizes, dtype: torch.dtype) -> Check:
    """The whole problem is computed; a few anchors' losses, alone with a gradient, are compared."""
    size, anchors = sizes.spot
    case = Case(3, size, size, size)
    problem = make_problem(case, bench.device, dtype)
    rows = torch.arange(anchors, device=bench.device) * (size // anchors) + size // (2 * anchors)
    start = time.perf_counter()
    found = _outcome(_per_anchor(problem)[rows].mean(), problem)
    bench.wait()
    first = time.perf_counter() - start  # the first of its kernels: they are compiled in it
    leaves = {**problem.leaves, "scores": problem.leaves["scores"][rows].detach()}
    leaves["scores"].requires_grad_()
    part = Problem(Case(3, anchors, size, size), leaves, problem.given_ranking[rows])
    exact = truth(part)
    whole = torch.zeros_like(problem.leaves["scores"], dtype=torch.float64)
    whole[rows] = exact["scores"]
    name = f"{case.name}, {anchors} anchors, {_short(dtype)}"
    result = _compared(name, found, {**exact, "scores": whole}, dtype)
    return replace(result, detail=f"{result.detail}; first call {first:.1f} s")


def peaked_check(bench: Bench, sizes: Sizes, dtype: torch.dtype) -> Check:
    """A trained model's scores: skipping tiles must change nothing beyond rounding."""
    size = sizes.targets[0]
    case = Case(3, min(size, 256), size, size)
    problem = make_problem(case, bench.device, dtype, peaked=True)
    found = _outcome(build_ours(problem)(), problem)
    dense = _outcome(build_ours(problem, "triton-dense")(), problem)
    name = f"{case.name}, peaked scores, {_short(dtype)}"
    result = _compared(name, found, truth(problem), dtype)
    change = max(_relative(found[x], dense[x]) for x in found)
    detail = f"{result.detail}; against triton-dense {change:.1e}; {skipped_tiles(problem)}"
    return Check(name, bool(result.passed) and change <= 1e-5, detail)


def skipped_tiles(problem: Problem) -> str:
    """Share of the tiles with remaining candidates that the backward pass leaves out."""
    from rankloss.kernels.configurations import configuration

    arguments = _op_arguments(problem)
    with torch.no_grad():
        live = torch.ops.rankloss.plackett_luce(*arguments, "triton")[2]
    case = problem.case
    config = configuration(live.device, problem.leaves["keys"].dtype, case.k)
    place, candidate = (torch.arange(x, device=live.device) for x in live.shape[1:])
    visited = (candidate + 1) * config.candidates > place[:, None] * config.places
    if 2 * case.k < case.m:  # the natural walk visits all
        visited = torch.ones_like(visited)
    alive, total = (live * visited).sum(dtype=torch.int64), case.n * visited.sum()
    return f"{1 - int(alive) / int(total):.0%} of tiles skipped"


def repeatability(bench: Bench, sizes: Sizes) -> Check:
    """The same bits every time: no result depends on the order of programs."""
    size = sizes.targets[0]
    dtype = torch.bfloat16 if bench.real else torch.float32
    problem = make_problem(Case(3, size, size, size), bench.device, dtype)
    runs = 5 if bench.real else 2
    first, *others = (_outcome(build_ours(problem)(), problem) for _ in range(runs))
    same = all(torch.equal(first[x], other[x]) for other in others for x in first)
    return Check(f"{runs} runs repeat bit for bit", same, "equal" if same else "different")


def graph_replay(bench: Bench, sizes: Sizes) -> Check:
    """A captured step, replayed on new inputs, gives an ordinary step's bits."""
    name = "CUDA graph capture and replay"
    if not bench.real:
        return Check(name, None, "needs a GPU")
    case = Case(3, *(3 * sizes.checks[0][:1]))
    problem = make_problem(case, bench.device, torch.bfloat16)
    loss = build_ours(problem)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _outcome(loss(), problem)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _outcome(loss(), problem)
    fresh = make_problem(case, bench.device, torch.bfloat16, seed=1)
    with torch.no_grad():
        for key, leaf in problem.leaves.items():
            leaf.copy_(fresh.leaves[key])
        problem.given_ranking.copy_(fresh.given_ranking)
    graph.replay()
    expected = _outcome(build_ours(fresh)(), fresh)
    same = all(torch.equal(captured[key], expected[key]) for key in expected)
    return Check(name, same, "equal" if same else "different")


# ---------------------------------------------------------------- against float64


def truth(problem: Problem) -> dict[str, Tensor]:
    """Value and gradients of the plain implementation in float64, a few anchors at a time."""
    exact = as_float64(problem)
    if exact.case.order == 0:
        return _outcome(build_clip(exact)(), exact)
    sums = {name: torch.zeros_like(leaf) for name, leaf in exact.leaves.items()}
    sums["value"] = torch.zeros((), dtype=torch.float64, device=exact.given_ranking.device)
    case = exact.case
    step = max(1, CHUNK // (case.k * case.m))
    for start in range(0, case.n, step):
        part = _per_anchor(exact, slice(start, start + step), "reference").sum() / case.n
        for name, value in _outcome(part, exact).items():
            sums[name] += value
    return sums


def _per_anchor(
    problem: Problem,
    rows: slice = slice(None),
    impl: str = "triton",
) -> Tensor:
    from rankloss import Transitions, plackett_luce_nll

    leaves, tables = problem.leaves, None
    if problem.case.order > 1:
        tables = Transitions(leaves["predecessors"], leaves["keys"])
    scores, ranking = leaves["scores"][rows], problem.given_ranking[rows]
    return plackett_luce_nll(scores, ranking, tables, reduction="none", impl=impl, validate=False)


def _op_arguments(problem: Problem) -> tuple[Tensor, ...]:
    """What `plackett_luce_nll` hands to the op for whole lists."""
    case, leaves = problem.case, problem.leaves
    device = problem.given_ranking.device
    lengths = torch.full((case.n,), case.k, device=device)
    weights = torch.full((case.k,), 1 / case.k, device=device)
    return (
        leaves["scores"],
        problem.given_ranking,
        lengths,
        weights,
        leaves["predecessors"],
        leaves["keys"],
    )


def _outcome(value: Tensor, problem: Problem) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(value, list(problem.leaves.values()))
    return {"value": value.detach(), **dict(zip(problem.leaves, gradients, strict=True))}


def _compared(
    name: str, found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> Check:
    errors = {x: _relative(found[x], exact[x]) for x in found}
    worst = max(errors.values(), key=lambda e: math.inf if math.isnan(e) else e)
    detail = ", ".join(f"{x} {error:.1e}" for x, error in errors.items())
    return Check(name, worst <= TOLERANCE[dtype], detail)


def _relative(found: Tensor, exact: Tensor) -> float:
    error = (found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)
    return float(error)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

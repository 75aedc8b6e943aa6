"""Are the kernels right on this device? Values and all gradients against float64."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, square_case
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
    # the interpreter has no bfloat16 arithmetic
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if bench.real else [torch.float32]
    for case in sizes.checks:
        for dtype in dtypes if case.order > 1 else [torch.float32]:
            yield partial(against_float64, bench, case, dtype)
    yield partial(against_float64, bench, square_case(0, 256), torch.float32)
    yield partial(repeatability, bench, sizes.checks[0], dtypes[0])
    yield partial(graph_replay, bench, sizes.checks[0])


def against_float64(bench: Bench, case: Case, dtype: torch.dtype) -> Check:
    problem = make_problem(case, bench.device, dtype)
    build = build_ours if case.order else build_clip
    found, exact = outcome(build(problem)(), problem), truth(problem)
    errors = {x: _relative(found[x], exact[x]) for x in found}
    worst = max(errors.values(), key=lambda e: math.inf if math.isnan(e) else e)
    detail = ", ".join(f"{x} {error:.1e}" for x, error in errors.items())
    name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
    return Check(name, worst <= TOLERANCE[dtype], detail)


def repeatability(bench: Bench, case: Case, dtype: torch.dtype) -> Check:
    """The same bits every time: no result depends on the order of programs."""
    problem = make_problem(case, bench.device, dtype)
    runs = 5 if bench.real else 2
    first, *others = (outcome(build_ours(problem)(), problem) for _ in range(runs))
    same = all(torch.equal(first[x], other[x]) for other in others for x in first)
    return Check(f"{runs} runs repeat bit for bit", same, "equal" if same else "different")


def graph_replay(bench: Bench, case: Case) -> Check:
    """A captured step, replayed on new inputs, gives an ordinary step's bits."""
    name = "CUDA graph capture and replay"
    if not bench.real:
        return Check(name, None, "needs a GPU")
    problem = make_problem(case, bench.device, torch.bfloat16)
    loss = build_ours(problem)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        outcome(loss(), problem)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(loss(), problem)
    fresh = make_problem(case, bench.device, torch.bfloat16, seed=1)
    with torch.no_grad():
        for key, leaf in problem.leaves.items():
            leaf.copy_(fresh.leaves[key])
        problem.given_ranking.copy_(fresh.given_ranking)
    graph.replay()
    expected = outcome(build_ours(fresh)(), fresh)
    same = all(torch.equal(captured[key], expected[key]) for key in expected)
    return Check(name, same, "equal" if same else "different")


# ---------------------------------------------------------------- against float64


def truth(problem: Problem) -> dict[str, Tensor]:
    """Value and gradients of the plain implementation in float64, a few anchors at a time."""
    from rankloss import Transitions, plackett_luce_nll

    exact, case = as_float64(problem), problem.case
    if case.order == 0:
        return outcome(build_clip(exact)(), exact)
    sums = {name: torch.zeros_like(leaf) for name, leaf in exact.leaves.items()}
    sums["value"] = torch.zeros((), dtype=torch.float64, device=exact.given_ranking.device)
    tables = None
    if case.order > 1:
        tables = Transitions(exact.leaves["predecessors"], exact.leaves["keys"])
    step = max(1, CHUNK // (case.k * case.m))
    for start in range(0, case.n, step):
        scores = exact.leaves["scores"][start : start + step]
        ranking = exact.given_ranking[start : start + step]
        part = plackett_luce_nll(
            scores, ranking, tables, reduction="sum", impl="reference", validate=False
        )
        for name, value in outcome(part / case.n, exact).items():
            sums[name] += value
    return sums


def outcome(value: Tensor, problem: Problem) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(value, list(problem.leaves.values()))
    return {"value": value.detach(), **dict(zip(problem.leaves, gradients, strict=True))}


def _relative(found: Tensor, exact: Tensor) -> float:
    error = (found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)
    return float(error)

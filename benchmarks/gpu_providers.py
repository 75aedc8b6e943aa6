"""Sides that are measured on the GPU: each a loss of a problem's leaves, with its ranking given.

A build function raises `Unavailable` with the reason when its provider cannot run here.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.gpu_problems import Problem
from benchmarks.providers import OURS, Loss, Unavailable, first_line

Build = Callable[[Problem], Loss]
NAIVE, COMPILED, FLEX = "naive", "naive compiled", "FlexAttention"
LIST_MLE, OPEN_CLIP = "list_mle", "open_clip"
LINEAR, CUT, INF_CL = "linear_cross_entropy", "cut-cross-entropy", "Inf-CL"
BYTES = {NAIVE: 22.0, COMPILED: 12.0, OPEN_CLIP: 20.0}
"""Memory for each of N x K x M scores (order 0: N x M logits), to foresee what cannot fit."""


def providers(case: Case, *, compiles: bool) -> dict[str, Build]:
    """By name, in the order they are measured. `compiles`: torch.compile makes kernels here."""
    if case.order == 0:
        return {
            OURS: build_clip,
            OPEN_CLIP: build_open_clip,
            COMPILED: partial(build_compiled, build=build_naive_clip, real=compiles),
            LINEAR: build_linear_cross_entropy,
            CUT: build_cut_cross_entropy,
            INF_CL: build_inf_cl,
        }
    if case.order == 1:
        return {OURS: build_ours, LIST_MLE: build_list_mle}
    return {
        OURS: build_ours,
        FLEX: partial(build_flex, compiles=compiles),
        NAIVE: build_naive,
        COMPILED: partial(build_compiled, build=build_naive, real=compiles),
    }


def bytes_needed(name: str, case: Case) -> float:
    return BYTES.get(name, 0.0) * (case.n * case.m if case.order == 0 else case.scores)


# ---------------------------------------------------------------- this library


def build_ours(problem: Problem, impl: str = "triton") -> Loss:
    from rankloss import Transitions, plackett_luce_nll

    leaves, ranking = problem.leaves, problem.given_ranking
    transitions = None
    if problem.case.order > 1:
        transitions = Transitions(leaves["predecessors"], leaves["keys"])

    def loss() -> Tensor:
        return plackett_luce_nll(leaves["scores"], ranking, transitions, impl=impl, validate=False)

    return loss


def build_clip(problem: Problem) -> Loss:
    from rankloss import ClipLoss

    clip_loss, leaves = ClipLoss(), problem.leaves
    return lambda: clip_loss(*leaves.values())


# ---------------------------------------------------------------- peers


def build_naive(problem: Problem) -> Loss:
    return lambda: peers.plackett_luce_of_ranking(ranking=problem.given_ranking, **problem.leaves)


def build_naive_clip(problem: Problem) -> Loss:
    return lambda: peers.clip(**_with_scale_as_features(problem))


def build_list_mle(problem: Problem) -> Loss:
    scores, ranking = problem.leaves["scores"], problem.given_ranking
    return lambda: peers.list_mle_of_ranking(scores, ranking, problem.case.k)


def build_compiled(problem: Problem, build: Build, *, real: bool) -> Loss:
    """torch.compile of another provider; traced only, where no kernels can be compiled."""
    torch._dynamo.reset()  # earlier shapes count towards its limit of recompilations
    options: dict[str, Any] = {"dynamic": False} if real else {"backend": "eager"}
    compiled: Loss = torch.compile(build(problem), **options)
    return compiled


def build_open_clip(problem: Problem) -> Loss:
    loss = _imported("open_clip.loss", "ClipLoss")()
    return lambda: loss(*_with_scale_as_features(problem).values())


def build_linear_cross_entropy(problem: Problem) -> Loss:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return _both_ways(problem, partial(function, options=options))


def build_cut_cross_entropy(problem: Problem) -> Loss:
    function = _imported("cut_cross_entropy", "linear_cross_entropy")
    return _both_ways(problem, function)


def build_inf_cl(problem: Problem) -> Loss:
    function = _imported("inf_cl", "cal_inf_loss")
    leaves = problem.leaves
    return lambda: function(
        leaves["image_features"], leaves["text_features"], scale=leaves["logit_scale"]
    )


def _with_scale_as_features(problem: Problem) -> dict[str, Tensor]:
    """Peers multiply features by the scale: in the features' dtype, as models in bf16 do."""
    leaves = dict(problem.leaves)
    leaves["logit_scale"] = leaves["logit_scale"].to(leaves["image_features"].dtype)
    return leaves


def _both_ways(problem: Problem, cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """InfoNCE from a cross-entropy of (features, classes, labels)."""
    leaves = problem.leaves
    own = torch.arange(problem.case.n, device=leaves["image_features"].device)

    def loss() -> Tensor:
        images, texts, scale = _with_scale_as_features(problem).values()
        one, other = (
            cross_entropy(scale * a, b, own) for a, b in ((images, texts), (texts, images))
        )
        return (one + other) / 2

    return loss


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a broken optional package is a missing one
        raise Unavailable(f"{module} cannot be imported: {first_line(error)}") from error


# ---------------------------------------------------------------- FlexAttention


def build_flex(problem: Problem, *, compiles: bool) -> Loss:
    """Utilities as attention scores: an anchor is a batch entry, a place a query.

    Queries are composed, and candidates' keys and scores gathered in ranked order, before the
    call; the mask leaves candidates at places j >= k. Its log-sum-exp is the likelihood's.
    """
    try:
        from torch.nn.attention import flex_attention as flex
    except ImportError as error:
        raise Unavailable(f"FlexAttention cannot be imported: {first_line(error)}") from error

    case, leaves = problem.case, problem.leaves
    torch._dynamo.reset()
    attend: Any = (
        torch.compile(flex.flex_attention, dynamic=False) if compiles else flex.flex_attention
    )
    log_sums: dict[str, Any] = {"return_lse": True}
    if hasattr(flex, "AuxRequest"):  # from torch 2.9 on
        log_sums = {"return_aux": flex.AuxRequest(lse=True)}
    ranking = _completed(problem.given_ranking, case.m)
    places = torch.arange(case.k, device=ranking.device)
    mask = flex.create_block_mask(
        lambda b, h, place, j: j >= place, None, None, case.k, case.m, device=ranking.device
    )

    def loss() -> Tensor:
        ranked = leaves["scores"].gather(1, ranking)  # (N, M)
        keys = leaves["keys"].transpose(0, 1).flatten(1)[ranking]  # (N, M, W)
        queries = peers.queries(problem.given_ranking, leaves["predecessors"])  # (N, K, W)

        def with_score(score: Tensor, b: Tensor, h: Tensor, place: Tensor, j: Tensor) -> Tensor:
            return score + ranked[b, j]

        _, found = attend(
            queries[:, None],
            keys[:, None],
            keys[:, None, :, :16].detach(),  # values are not needed; the fewest there can be
            score_mod=with_score,
            block_mask=mask,
            scale=1.0,
            **log_sums,
        )
        lse = getattr(found, "lse", found)  # (N, 1, K)
        chosen = ranked[:, places] + (queries.float() * keys[:, places].float()).sum(2)
        mean: Tensor = (lse[:, 0] - chosen).mean()
        return mean

    return loss


def _completed(ranking: Tensor, m: int) -> Tensor:
    """(N, K) to (N, M): the unranked candidates follow in any order."""
    n, k = ranking.shape
    if k == m:
        return ranking
    places = torch.arange(k, device=ranking.device).expand(n, k)
    place_of = ranking.new_full((n, m), k).scatter_(1, ranking, places)
    return place_of.argsort(dim=1, stable=True)

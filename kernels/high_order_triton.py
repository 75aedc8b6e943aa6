"""Fused Triton kernels for orders >= 2: flash-style streaming over the remaining candidates.

A program owns one anchor and one tile of places (or, in the second backward kernel, of
candidates) and streams the other axis, so utilities exist one tile at a time, in registers.
Queries are never stored: predecessor rows are gathered and multiplied on the fly.

Two walks over the candidates, one kernel. *Ranked*: in the order of the (completed) ranking;
tiles of taken candidates are never visited, which halves the work when K = M, at the price of
gathered keys. *Natural*: in the order of their ids, contiguous keys, taken candidates masked by
their place. `_walks_ranked` has the rule.

Skipping tiles. The forward pass marks a tile as live when some utility in it comes within
T = 24 + log2(M) binary orders of its row's running maximum. The running maximum never exceeds
the final log-sum-exp, so every probability in an unmarked tile is below 2^-T and all that a row
skips adds up to less than M 2^-T = 2^-24: half a unit in the last place of the 1 that the row's
probabilities sum to. The forward pass leaves a tile out by the same test on an upper bound,
max S + |q| max |C| (Cauchy-Schwarz), before any matrix product. Tiles holding a taken candidate
of their places are always live.

Gradients of the tables. Each anchor's dQ and dC go to a buffer for a chunk of anchors; a third
kernel gathers from it, for every candidate, the rows that concern it. No atomics: results do not
depend on the order of programs, and repeat bit for bit.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rankloss.kernels.configurations import Configuration, configuration
from rankloss.kernels.high_order_kernels import (
    backward_keys_kernel,
    backward_queries_kernel,
    collect_kernel,
    forward_kernel,
)
from rankloss.kernels.launch import on_device_of, places_of


class _Walk(NamedTuple):
    """How the candidates are visited."""

    ranked: bool
    ranking: Tensor  # (N, M) completed if ranked, else (N, K)
    places: Tensor  # (N, M) int32, or empty where no kernel reads it


def _walks_ranked(k: int, m: int) -> bool:
    """The ranked walk visits M - K/2 candidates a place on average, the natural walk M.

    Gathering keys costs more than reading them in order, and completing a ranking is a sort;
    from K = M/2 on the ranked walk saves a quarter of the work or more. From counted work.
    """
    return 2 * k >= m


def _walk(ranking: Tensor, m: int, *, with_places: bool) -> _Walk:
    k = ranking.shape[1]
    ranked = _walks_ranked(k, m)
    if ranked and k == m and not with_places:
        return _Walk(True, ranking, ranking.new_empty(0, dtype=torch.int32))
    places = places_of(ranking, m)
    if ranked and k < m:
        ranking = places.argsort(dim=1, stable=True)
        places = places_of(ranking, m)
    return _Walk(ranked, ranking, places)


def _constants(
    config: Configuration, keys: Tensor, ranked: bool, skip: bool
) -> dict[str, int | bool | str]:
    terms, _, r = keys.shape
    width = terms * r
    return {
        "R": terms + 1,
        "r": r,
        "BW": config.width_block(width),
        "SPLITS": triton.cdiv(width, config.width_block(width)),
        "BK": config.places,
        "BJ": config.candidates,
        "RANKED": ranked,
        "SKIP": skip,
        "PRECISION": config.precision,
    }


def forward(
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
    *,
    skip: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_k w_k l_ik (N,), log-sum-exps (N, K) in binary orders, live tiles."""
    n, m = scores.shape
    k = ranking.shape[1]
    lengths, weights = lengths.contiguous(), weights.contiguous()
    config = configuration(scores.device, keys.dtype, k)
    walk = _walk(ranking, m, with_places=not _walks_ranked(k, m))
    tiles = triton.cdiv(k, config.places)
    live = config.live_tiles(scores, ranking, skip).zero_()  # an output: the same in every run
    norms = keys.float().square().sum((0, 2)).sqrt() if skip else scores
    lse = scores.new_empty(n, k)
    nll = scores.new_empty(n, tiles)
    if n:
        with on_device_of(scores):
            forward_kernel[(n * tiles,)](
                scores,
                walk.ranking,
                walk.places,
                lengths,
                weights,
                predecessors,
                keys,
                norms,
                lse,
                nll,
                live,
                k,
                m,
                24.0 + math.log2(m),
                **_constants(config, keys, walk.ranked, skip),
                **config.options(config.forward_warps),
            )
    return nll.sum(1), lse, live


def backward(
    grad: Tensor,
    lse: Tensor,
    live: Tensor,
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to scores, predecessors and keys, chunk of anchors by chunk."""
    n, m = scores.shape
    k, (terms, _, r) = ranking.shape[1], keys.shape
    if n == 0:  # then there may be no place and no candidate either
        return torch.empty_like(scores), torch.zeros_like(predecessors), torch.zeros_like(keys)
    lengths, weights, lse = lengths.contiguous(), weights.contiguous(), lse.contiguous()
    config = configuration(scores.device, keys.dtype, k)
    walk = _walk(ranking, m, with_places=True)
    constants = _constants(config, keys, walk.ranked, live.numel() > 0)
    splits, width = constants["SPLITS"], int(constants["SPLITS"]) * int(constants["BW"])
    heaviest = weights.max().clamp(min=torch.finfo(torch.float32).tiny)
    weights, grad = weights / heaviest, grad * heaviest  # keeps half-precision products in range
    chunk = _chunk_of_anchors(n, m, k, width, keys.element_size())
    buffers = keys.new_empty(min(chunk, n), k, width), keys.new_empty(min(chunk, n), m, width)
    d_scores = torch.empty_like(scores)
    d_predecessors = torch.zeros_like(predecessors, dtype=torch.float32)
    d_keys = torch.zeros_like(keys, dtype=torch.float32)
    options, blocks = config.options(config.backward_warps), collect_blocks(r)
    inputs = scores, walk.ranking, walk.places, lengths, weights
    tables = predecessors, keys, lse, live
    with on_device_of(scores):
        for first in range(0, n, chunk):
            size = min(chunk, n - first)
            backward_queries_kernel[(size * triton.cdiv(k, config.places), splits)](
                *inputs, *tables, buffers[0], first, k, m, **constants, **options
            )
            backward_keys_kernel[(size * triton.cdiv(m, config.candidates), splits)](
                *inputs, grad, *tables, d_scores, buffers[1], first, k, m, **constants, **options
            )
            collect_kernel[(triton.cdiv(m, blocks["BA"]), terms * (terms + 3) // 2)](
                walk.ranking,
                walk.places,
                grad,
                predecessors,
                *buffers,
                d_predecessors,
                d_keys,
                first,
                size,
                k,
                m,
                R=terms + 1,
                r=r,
                W=width,
                **blocks,
                RANKED=walk.ranked,
            )
    return d_scores, d_predecessors.to(predecessors.dtype), d_keys.to(keys.dtype)


def collect_blocks(r: int) -> dict[str, int]:
    """Tile of the collecting kernel: BN anchors, BA candidates, BR components; 4096 numbers.

    With the same BN and BA at every r, it spilled registers at r = 128.
    """
    components = triton.next_power_of_2(r)
    candidates = 16 if components <= 64 else 8
    anchors = max(1, min(32, 4096 // (candidates * components)))
    return {"BR": components, "BN": anchors, "BA": candidates}


SMALLEST_BUFFER = 12 << 20  # bytes; below it launches cost more than memory is worth


def _chunk_of_anchors(n: int, m: int, k: int, width: int, element_size: int) -> int:
    """Anchors whose table gradients are buffered at a time, in 2 N M floats or 12 MiB."""
    budget = max(8 * n * m, SMALLEST_BUFFER)
    return max(1, min(n, budget // ((m + k) * width * element_size)))

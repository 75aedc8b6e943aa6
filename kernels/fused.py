"""The Triton implementation: high-order kernels from order 2 on, scans for order 1."""

import torch
from torch import Tensor

from rankloss.kernels import first_order_triton, high_order_triton


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
    if keys.shape[0] == 0:
        nll, lse = first_order_triton.forward(scores, ranking, lengths, weights)
        return nll, lse, torch.empty(0, dtype=torch.int8, device=scores.device)
    tables = predecessors.contiguous(), keys.contiguous()
    return high_order_triton.forward(scores, ranking, lengths, weights, *tables, skip=skip)


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
    """Gradients to scores, predecessors and keys."""
    if keys.shape[0] == 0:
        d_scores = first_order_triton.backward(grad, lse, scores, ranking, weights)
        return d_scores, torch.empty_like(predecessors), torch.empty_like(keys)
    tables = predecessors.contiguous(), keys.contiguous()
    return high_order_triton.backward(grad, lse, live, scores, ranking, lengths, weights, *tables)

"""Fused Triton kernels for order 1: scans over ranked scores, one pass each way.

Without transitions the remaining mass of place k is a suffix sum, sum over j >= k of exp(s_j),
and the gradient a prefix sum, exp(s_j) * sum over k <= j of w_k exp(-lse_k). Both run as scans of
(maximum, scaled sum) pairs: no difference of sums anywhere, so nothing cancels at any scale.
Candidates outside the ranking (K < M) enter both as one total. One program owns one anchor.
"""

import torch
from torch import Tensor

from rankloss.kernels.first_order_kernels import backward_kernel, forward_kernel
from rankloss.kernels.launch import on_device_of, places_of


def _block(k: int) -> int:
    """Elements of a row scanned at a time."""
    return max(16, min(1024, 1 << (k - 1).bit_length()))


def forward(
    scores: Tensor, ranking: Tensor, lengths: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_k w_k l_ik (N,) and log-sum-exps (N, K) in binary orders."""
    (n, m), k = scores.shape, ranking.shape[1]
    lengths, weights = lengths.contiguous(), weights.contiguous()
    lse, nll = scores.new_empty(n, k), scores.new_empty(n)
    if n:
        with on_device_of(scores):
            forward_kernel[(n,)](
                scores,
                ranking,
                _places_if_incomplete(ranking, m),
                lengths,
                weights,
                lse,
                nll,
                k,
                m,
                B=_block(k),
                COMPLETE=k == m,
            )
    return nll, lse


def backward(grad: Tensor, lse: Tensor, scores: Tensor, ranking: Tensor, weights: Tensor) -> Tensor:
    """Gradient to scores, (N, M)."""
    (n, m), k = scores.shape, ranking.shape[1]
    grad, lse, weights = grad.contiguous(), lse.contiguous(), weights.contiguous()
    d_scores = torch.empty_like(scores)
    if n:
        with on_device_of(scores):
            backward_kernel[(n,)](
                grad,
                scores,
                ranking,
                _places_if_incomplete(ranking, m),
                weights,
                lse,
                d_scores,
                k,
                m,
                B=_block(k),
                COMPLETE=k == m,
            )
    return d_scores


def _places_if_incomplete(ranking: Tensor, m: int) -> Tensor:
    if ranking.shape[1] == m:
        return ranking.new_empty(0, dtype=torch.int32)
    return places_of(ranking, m)

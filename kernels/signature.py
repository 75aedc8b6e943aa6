"""The tensors that every implementation of the likelihood takes, named once."""

from typing import NamedTuple

from torch import Tensor


class Lists(NamedTuple):
    """Arguments of `rankloss.kernels.plackett_luce`, which documents them."""

    scores: Tensor  # (N, M)
    ranking: Tensor  # (N, K) int32 or int64
    lengths: Tensor  # (N,) int64
    weights: Tensor  # (K,)
    predecessors: Tensor  # (R(R-1)/2, M, r)
    keys: Tensor  # (R-1, M, r)


SCHEMA = ", ".join(f"Tensor {name}" for name in Lists._fields)

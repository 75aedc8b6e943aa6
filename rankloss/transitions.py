"""Transition terms of order R >= 2: the tables, and the heads that make them from embeddings."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Transitions(NamedTuple):
    """Tables that make the utility of candidate d depend on the m candidates taken before it.

        tau_m(a_1, ..., a_m; d) = sum_c C_m[d, c] * prod_j P_mj[a_j, c]      (a_1 taken last)

    Attributes:
        predecessors: (R(R-1)/2, M, r); row m(m-1)/2 + (j-1) is P_mj.
        keys: (R-1, M, r); row m-1 is C_m, any 1/sqrt(r) already inside.
    """

    predecessors: Tensor
    keys: Tensor


class TransitionHeads(nn.Module):
    """Linear maps from candidate embeddings to the tables of an order-R model.

    Keys start at zero, so an order-R loss starts equal to the order-1 loss; predecessor maps
    start at N(0, 1/embed_dim), drawn from a generator of their own with a fixed seed: every
    process of a distributed run starts from the same weights whatever its own seed, and building
    the heads leaves the global random state alone. Source: this project's choice, after
    DINORANKCLIP's attention-parameterised transitions (arXiv 2605.06592), which fixes no form.

    Args:
        embed_dim: D, width of the candidate embeddings.
        order: R >= 2.
        transition_dim: r, width of one transition term.

    Raises:
        ValueError: order < 2, or a width < 1.
    """

    SEED = 2605

    def __init__(self, embed_dim: int, order: int, transition_dim: int = 32) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"TransitionHeads: order {order} has no transitions; use order >= 2")
        if embed_dim < 1 or transition_dim < 1:
            raise ValueError(
                "TransitionHeads: embed_dim and transition_dim must be positive, "
                f"got {embed_dim} and {transition_dim}"
            )
        self.embed_dim, self.order, self.transition_dim = embed_dim, order, transition_dim
        pairs = order * (order - 1) // 2
        self.predecessor_weight = nn.Parameter(torch.empty(pairs, embed_dim, transition_dim))
        self.key_weight = nn.Parameter(torch.empty(order - 1, embed_dim, transition_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights again; a CPU `generator` replaces the fixed seed."""
        generator = generator or torch.Generator().manual_seed(self.SEED)
        shape = self.predecessor_weight.shape
        draw = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        self.predecessor_weight.copy_(draw * self.embed_dim**-0.5)
        self.key_weight.zero_()

    def forward(self, candidates: Tensor) -> Transitions:
        """Tables for `candidates` (M, D), any floating dtype; under autocast in its dtype.

        Raises:
            ValueError: candidates are not (M, embed_dim).
        """
        if candidates.dim() != 2 or candidates.shape[1] != self.embed_dim:
            raise ValueError(
                f"TransitionHeads: candidates have shape {tuple(candidates.shape)}, "
                f"expected (M, embed_dim={self.embed_dim})"
            )
        candidates = candidates.to(torch.promote_types(candidates.dtype, self.key_weight.dtype))
        weights = self.key_weight.to(candidates.dtype), self.predecessor_weight.to(candidates.dtype)
        keys, predecessors = (torch.einsum("md,tdr->tmr", candidates, w) for w in weights)
        return Transitions(predecessors, keys * self.transition_dim**-0.5)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters a weight decay should leave alone: all of them."""
        return {name for name, _ in self.named_parameters()}

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, order={self.order}, transition_dim={self.transition_dim}"

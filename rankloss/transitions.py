"""Transition terms of order R >= 2: the tables, and the heads that make them from embeddings."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.kernels.launch import outside_autocast


class Transitions(NamedTuple):
    """Tables that make the utility of candidate d depend on the m candidates taken before it.

        tau_m(a_1, ..., a_m; d) = sum_c C_m[d, c] * prod_j P_mj[a_j, c]      (a_1 taken last)

    Attributes:
        predecessors: (R(R-1)/2, M, r); row m(m-1)/2 + (j-1) is P_mj.
        keys: (R-1, M, r); row m-1 is C_m, any 1/sqrt(r) already inside.

    >>> import torch
    >>> tables = Transitions(predecessors=torch.ones(1, 5, 4), keys=torch.zeros(1, 5, 4))
    >>> scores, ranking = torch.zeros(2, 5), torch.tensor([[0, 1], [4, 3]])
    >>> from rankloss import plackett_luce_nll
    >>> plackett_luce_nll(scores, ranking, tables) == plackett_luce_nll(scores, ranking)
    tensor(True)
    """

    predecessors: Tensor
    keys: Tensor


class TransitionHeads(nn.Module):
    """Linear maps from candidate embeddings to the tables of an order-R model.

        P_mj = rms_norm(H @ A_mj)        C_m = H @ B_m / sqrt(r)

    Predecessor rows have unit root mean square whatever the width, the norm of H or the decay of
    A, so a product of any number of them neither vanishes nor explodes. The maps A start at
    N(0, 1/embed_dim); the keys' maps B start at zero, so an order-R loss starts equal to the
    order-1 loss. A comes from a generator of its own with a fixed seed: every process of a
    distributed run starts from the same weights whatever its own seed, and building the heads
    leaves the global random state alone. Memory that a loader or `to_empty` leaves uninitialised
    is put at the start. Source: this project's choice, after DINORANKCLIP's
    attention-parameterised transitions (arXiv 2605.06592), which fixes no form.

    A state dict of a lower order loads: its terms are taken over, the new ones are at their start.

    Args:
        embed_dim: D, width of the candidate embeddings.
        order: R >= 2.
        transition_dim: r >= 2, width of one transition term (a row of width 1 has nothing to
            learn once it is normalised).
        generator: draws the initial weights instead of the fixed seed; a distributed run must
            give every process one in the same state.
        seed: seed of the initial weights when no generator is given.

    Raises:
        ValueError: order < 2, embed_dim < 1 or transition_dim < 2.

    >>> heads = TransitionHeads(embed_dim=8, order=3, transition_dim=4)
    >>> predecessors, keys = heads(torch.randn(5, 8))
    >>> predecessors.shape, keys.shape
    (torch.Size([3, 5, 4]), torch.Size([2, 5, 4]))
    """

    def __init__(
        self,
        embed_dim: int,
        order: int,
        transition_dim: int = 32,
        *,
        generator: torch.Generator | None = None,
        seed: int = 2605,
    ) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"TransitionHeads: order {order} has no transitions; use order >= 2")
        if embed_dim < 1 or transition_dim < 1:
            raise ValueError(
                "TransitionHeads: embed_dim and transition_dim must be positive, "
                f"got {embed_dim} and {transition_dim}"
            )
        if transition_dim == 1:
            raise ValueError(
                "TransitionHeads: transition_dim 1 leaves nothing to learn, a normalised row of "
                "width 1 is a sign; use 2 or more"
            )
        self.embed_dim, self.order, self.transition_dim = embed_dim, order, transition_dim
        self.seed = seed
        pairs = order * (order - 1) // 2
        self.predecessor_weight = nn.Parameter(torch.empty(pairs, embed_dim, transition_dim))
        self.key_weight = nn.Parameter(torch.empty(order - 1, embed_dim, transition_dim))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Put the weights at their start, drawn by `generator`, or by the fixed seed without."""
        self._uninitialized = self.key_weight.is_meta
        for name, value in self.initial_values(generator).items():
            _fill(self.get_parameter(name), value)

    def initial_values(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return what the parameters start from by name, float32 on the generator's device."""
        generator = generator or torch.Generator().manual_seed(self.seed)
        shape, device = self.predecessor_weight.shape, generator.device
        draw = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        keys = torch.zeros(self.key_weight.shape, dtype=torch.float32, device=device)
        return {"predecessor_weight": draw * self.embed_dim**-0.5, "key_weight": keys}

    def forward(self, candidates: Tensor) -> Transitions:
        """Return the tables of `candidates` (M, D), any floating dtype; autocast chooses theirs.

        Those of (2, M, D), candidates of two modalities, are (2, ...) too: one product makes all.
        Predecessor rows are normalised in float32 at least.

        Raises:
            ValueError: candidates are not (M, embed_dim), or on another device than the weights.
        """
        modalities = candidates.shape[:-2]
        if (
            candidates.dim() < 2
            or modalities not in ((), (2,))
            or (candidates.shape[-1] != self.embed_dim)
        ):
            raise ValueError(
                f"TransitionHeads: candidates have shape {tuple(candidates.shape)}, "
                f"expected (M, embed_dim={self.embed_dim})"
            )
        if candidates.device != self.key_weight.device:
            raise ValueError(
                f"features are on {candidates.device} but the transition heads of the loss on "
                f"{self.key_weight.device}; move it with loss.to({str(candidates.device)!r}), best "
                "as a submodule of the model, which moves with it"
            )
        candidates = candidates.to(torch.promote_types(candidates.dtype, self.key_weight.dtype))
        weights = self.predecessor_weight, self.key_weight
        maps = torch.cat([w.transpose(0, 1) for w in weights], 1).to(candidates.dtype)  # (D, t, r)
        rows = candidates @ maps.flatten(1)
        rows = rows.view(*rows.shape[:-1], *maps.shape[1:]).transpose(-3, -2)
        predecessors, keys = torch.split(rows, [len(w) for w in weights], -3)
        scale = self.transition_dim**-0.5
        return Transitions(_normalized(predecessors.contiguous()), keys.contiguous() * scale)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters a weight decay should leave alone: all of them."""
        return {name for name, _ in self.named_parameters()}

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, order={self.order}, transition_dim={self.transition_dim}"

    # ------------------------------------------------------------ loading

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load, with the terms that a state of lower order lacks at their start."""
        for name, start in self.initial_values().items():
            given = state_dict.get(prefix + name)
            if given is not None and _is_lower_order(given, start):
                rest = start[len(given) :].to(given.device, given.dtype)
                state_dict[prefix + name] = torch.cat([given, rest])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(prefix + name in state_dict for name, _ in self.named_parameters()):
            self._uninitialized = self.key_weight.is_meta

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TransitionHeads":
        was_meta = self.key_weight.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.key_weight.is_meta:  # to_empty: the memory holds anything
            self.reset_parameters()
        return self

    @property
    def _is_hf_initialized(self) -> bool:
        """Answer transformers, which asks it of every module once a checkpoint is loaded.

        Its models are built on the meta device; weights the checkpoint lacked are then
        uninitialised memory, and those it had are marked by an attribute of this name.
        """
        if self._uninitialized and not self.key_weight.is_meta:
            for name, value in self.initial_values().items():
                if not getattr(self.get_parameter(name), "_is_hf_initialized", False):
                    _fill(self.get_parameter(name), value)
            self._uninitialized = False
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        """Ignore what transformers notes down."""


def _normalized(rows: Tensor) -> Tensor:
    """Return (..., r) rows of unit root mean square, computed in float32 at least."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    with outside_autocast(rows):
        return F.rms_norm(rows, rows.shape[-1:], eps=torch.finfo(wide).eps)


def _is_lower_order(given: Tensor, start: Tensor) -> bool:
    return given.dim() == 3 and given.shape[1:] == start.shape[1:] and len(given) < len(start)


@torch.no_grad()
def _fill(parameter: Tensor, value: Tensor) -> None:
    """Copy `value`, the same on every process, into a parameter that may be sharded (DTensor)."""
    value = value.to(parameter.dtype)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and not parameter.is_meta:
        from torch.distributed.tensor import DTensor, distribute_tensor

        placements = cast(DTensor, parameter).placements
        value = distribute_tensor(value.to(parameter.device), mesh, placements)
    parameter.copy_(value)

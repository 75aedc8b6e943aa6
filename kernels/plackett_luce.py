"""The Plackett-Luce op: registration, gradient, public function.

The kernels are opaque custom ops inside an `autograd.Function`, so `torch.compile(fullgraph=True)`,
fake tensors, autocast and functorch all see one node, whichever implementation runs beneath.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rankloss.kernels import blocked, reference
from rankloss.kernels.configurations import live_tiles
from rankloss.kernels.dispatch import choose
from rankloss.kernels.launch import outside_autocast
from rankloss.kernels.registration import loop_over_batch


def plackett_luce(
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
    impl: str = "auto",
) -> Tensor:
    """Weighted negative log-likelihood of rankings under a high-order Plackett-Luce model.

        nll_i   = sum over k < length_i of  w_k l_ik
        l_ik    = logsumexp over d not in pi_i(1..k-1) of u_ik(d)  -  u_ik(pi_i(k))
        u_ik(d) = S[i, d] + sum over m = 1 .. min(R-1, k-1) of  sum over c of
                  C_m[d, c] * prod over j = 1..m of P_mj[pi_i(k-j), c]

    Only devices and shapes are checked here; `rankloss.plackett_luce_nll` is the friendly form.

    Args:
        scores: S, (N, M) floating; -inf removes a candidate.
        ranking: pi, (N, K) int64, distinct ids within a row, best first. Places beyond
            `lengths` may hold any ids as long as the row stays distinct.
        lengths: (N,) int64, how many places of each row count, 0 to K.
        weights: w, (K,) floating, not negative.
        predecessors: (R(R-1)/2, M, r); row m(m-1)/2 + (j-1) is P_mj. R = 1: (0, M, r).
        keys: (R-1, M, r); row m-1 is C_m, 1/sqrt(r) already inside.
        impl: "auto", or the name of an implementation.

    Returns:
        (N,) float32, or float64 when any of the inputs is.

    Raises:
        ValueError: shapes do not fit together, devices differ, or `impl` cannot run here.
    """
    _check(scores, ranking, lengths, weights, predecessors, keys)
    table_dtype = torch.promote_types(predecessors.dtype, keys.dtype)
    double = torch.float64 in (scores.dtype, table_dtype)
    dtype = torch.float64 if double else torch.float32
    chosen = choose(impl, scores.device, dtype)
    scores, weights = scores.to(dtype), weights.to(dtype)
    if not chosen.startswith("triton"):  # the Triton kernels multiply halves as they are
        table_dtype = dtype
    predecessors, keys = predecessors.to(table_dtype), keys.to(table_dtype)
    tensors = scores, ranking, lengths, weights, predecessors, keys
    if chosen == "reference":
        with outside_autocast(scores):
            return reference.plackett_luce(*tensors)
    nll: Tensor = _PlackettLuce.apply(*tensors, chosen)[0]
    return nll


def _check(
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
) -> None:
    n, m = scores.shape
    k, terms, r = ranking.shape[1], keys.shape[0], keys.shape[2]
    wanted = {
        "ranking": (ranking, (n, k)),
        "lengths": (lengths, (n,)),
        "weights": (weights, (k,)),
        "predecessors": (predecessors, (terms * (terms + 1) // 2, m, r)),
        "keys": (keys, (terms, m, r)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(
                f"plackett_luce: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} "
                f"for scores {tuple(scores.shape)} and ranking {tuple(ranking.shape)}"
            )
        if tensor.device != scores.device:
            raise ValueError(
                f"plackett_luce: scores are on {scores.device} but {name} on {tensor.device}; "
                "move them to one device"
            )


# ---------------------------------------------------------------- registration


def _implementation(impl: str) -> ModuleType:
    """The module with `forward` and `backward`; Triton is imported when first used."""
    if impl == "blocked":
        return blocked
    from rankloss.kernels import fused

    return fused


@torch.library.custom_op("rankloss::plackett_luce", mutates_args=())
def _forward(
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """nll (N,), and what the backward pass needs: log-sum-exps (N, K), live tiles."""
    skip = impl != "triton-dense"
    tensors = scores.contiguous(), ranking.contiguous(), lengths, weights, predecessors, keys
    with outside_autocast(scores):
        result: tuple[Tensor, Tensor, Tensor] = _implementation(impl).forward(*tensors, skip=skip)
    return result


@torch.library.custom_op("rankloss::plackett_luce_backward", mutates_args=())
def _backward(
    grad: Tensor,
    lse: Tensor,
    live: Tensor,
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to scores, predecessors and keys."""
    scores, ranking = scores.contiguous(), ranking.contiguous()
    with outside_autocast(scores):
        result: tuple[Tensor, Tensor, Tensor] = _implementation(impl).backward(
            grad, lse, live, scores, ranking, lengths, weights, predecessors, keys
        )
    return result


@_forward.register_fake
def _(
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    live = live_tiles(impl, scores, ranking, keys)
    return scores.new_empty(scores.shape[0]), scores.new_empty(ranking.shape), live


@_backward.register_fake
def _(
    grad: Tensor,
    lse: Tensor,
    live: Tensor,
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        scores.new_empty(scores.shape),
        predecessors.new_empty(predecessors.shape),
        keys.new_empty(keys.shape),
    )


loop_over_batch(_forward)
loop_over_batch(_backward)


class _PlackettLuceBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        lse: Tensor,
        live: Tensor,
        scores: Tensor,
        ranking: Tensor,
        lengths: Tensor,
        weights: Tensor,
        predecessors: Tensor,
        keys: Tensor,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = _backward(
            grad, lse, live, scores, ranking, lengths, weights, predecessors, keys, impl
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "plackett_luce: the streaming implementations have no second derivative; "
            "use impl='reference' to differentiate twice"
        )


class _PlackettLuce(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        scores: Tensor,
        ranking: Tensor,
        lengths: Tensor,
        weights: Tensor,
        predecessors: Tensor,
        keys: Tensor,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = _forward(
            scores, ranking, lengths, weights, predecessors, keys, impl
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.impl = inputs
        _, lse, live = output
        ctx.mark_non_differentiable(lse, live)
        ctx.set_materialize_grads(False)  # no zeros of their size for these two in the backward
        ctx.save_for_backward(lse, live, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * 7
        d_scores, d_predecessors, d_keys = _PlackettLuceBackward.apply(
            grad.contiguous(), *ctx.saved_tensors, ctx.impl
        )
        return d_scores, None, None, None, d_predecessors, d_keys, None

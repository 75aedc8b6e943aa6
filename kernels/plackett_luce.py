"""The Plackett-Luce op: public function, gradient, registration.

The implementations are opaque custom ops inside an `autograd.Function`, so that
`torch.compile(fullgraph=True)`, fake tensors, autocast and functorch see one node, whichever runs
beneath. A value and its gradients come out of one pass over the lists; nothing that depends on
tile sizes or precision is kept between a forward and a backward pass.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rankloss.kernels import blocked, reference
from rankloss.kernels.derivatives import MadeAhead, Refusing, applied, link_to, scaled
from rankloss.kernels.dispatch import choose
from rankloss.kernels.launch import loop_over_batch, outside_autocast
from rankloss.kernels.signature import SCHEMA, Lists


def plackett_luce(
    scores: Tensor,
    ranking: Tensor,
    lengths: Tensor,
    weights: Tensor,
    predecessors: Tensor,
    keys: Tensor,
    impl: str = "auto",
    anchor_weights: Tensor | None = None,
) -> Tensor:
    """Weighted negative log-likelihood of rankings under a high-order Plackett-Luce model.

        nll_i   = sum over k < length_i of  w_k l_ik
        l_ik    = logsumexp over d not in pi_i(1..k-1) of u_ik(d)  -  u_ik(pi_i(k))
        u_ik(d) = S[i, d] + sum over m = 1 .. min(R-1, k-1) of  sum over c of
                  C_m[d, c] * prod over j = 1..m of P_mj[pi_i(k-j), c]

    Only devices and shapes are checked here; `rankloss.plackett_luce_nll` is the friendly form.

    Args:
        scores: S, (N, M) floating; -inf removes a candidate.
        ranking: pi, (N, K) int32 or int64, distinct ids within a row, best first. Places beyond
            `lengths` may hold any ids as long as the row stays distinct.
        lengths: (N,) int64, how many places of each row count, 0 to K.
        weights: w, (K,) floating, not negative. They get no gradient.
        predecessors: (R(R-1)/2, M, r); row m(m-1)/2 + (j-1) is P_mj. R = 1: (0, M, r).
        keys: (R-1, M, r); row m-1 is C_m, 1/sqrt(r) already inside.
        impl: "auto", or the name of an implementation.
        anchor_weights: a, (N,) floating, or None. They get no gradient. With them the result
            is sum_i a_i nll_i, whose gradients the streaming implementations make together with
            the value, in one pass instead of two.

    Returns:
        (N,) float32, or float64 when any of the tables or scores is; a scalar with
        `anchor_weights`.

    Raises:
        ValueError: shapes do not fit together, devices differ, or `impl` cannot run here.

    >>> nothing = torch.empty(0, 3, 8)
    >>> scores, ranking = torch.zeros(1, 3), torch.tensor([[2, 0, 1]])
    >>> plackett_luce(scores, ranking, torch.tensor([3]), torch.ones(3), nothing, nothing)
    tensor([1.7918])
    """
    given = Lists(scores, ranking, lengths, weights.detach(), predecessors, keys)
    _check(given, anchor_weights)
    x, chosen = _prepared(given, impl)
    heaviest = x.weights.new_ones(())
    if chosen == "triton" and x.weights.numel():  # whose kernels multiply halves by weights
        heaviest = x.weights.max().clamp(min=torch.finfo(x.weights.dtype).tiny)
        x = x._replace(weights=x.weights / heaviest)
    if anchor_weights is None:
        return _each(x, chosen) * heaviest
    anchor_weights = anchor_weights.detach().to(x.scores.dtype) * heaviest
    differentiable = (x.scores, x.predecessors, x.keys)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    if chosen == "reference" or not wanted:
        return (_each(x, chosen) * anchor_weights).sum()
    links = [link_to(t) for t in differentiable]
    total: Tensor = applied(_Total, anchor_weights, *x, chosen, *links)[0]
    return total


def values_and_gradients(
    x: Lists, anchor_weights: Tensor, impl: str, *, wanted: bool
) -> tuple[Tensor, ...]:
    """Values of `plackett_luce` and, if wanted, gradients of their sum with `anchor_weights`.

    For implementations of other ops: neither autograd nor the dispatcher take part. The heaviest
    of the places' weights is to be near 1: kernels multiply halves by them.

    Returns:
        (N,) values, then the gradients of scores, predecessors and keys, in their dtype.
    """
    x, chosen = _prepared(x, impl)
    if not wanted:
        return (_run_nll(*x, chosen),)
    return _run_gradients(anchor_weights.to(x.scores.dtype), *x, chosen)


def _prepared(x: Lists, impl: str) -> tuple[Lists, str]:
    """Tensors in the dtypes of the implementation that runs, and its name."""
    table_dtype = torch.promote_types(x.predecessors.dtype, x.keys.dtype)
    double = torch.float64 in (x.scores.dtype, table_dtype)
    dtype = torch.float64 if double else torch.float32
    chosen = choose(impl, x.scores.device, dtype)
    if chosen != "triton":  # whose kernels multiply halves as they are
        table_dtype = dtype
    tables = x.predecessors.to(table_dtype), x.keys.to(table_dtype)
    scores, weights = x.scores.to(dtype), x.weights.to(dtype)
    return Lists(scores, x.ranking, x.lengths, weights, *tables), chosen


def _each(x: Lists, impl: str) -> Tensor:
    if impl == "reference":
        with outside_autocast(x.scores):
            return reference.plackett_luce(x)
    nll: Tensor = applied(_Each, *x, impl)
    return nll


def _check(x: Lists, anchor_weights: Tensor | None) -> None:
    n, m = x.scores.shape
    k, terms, r = x.ranking.shape[1], x.keys.shape[0], x.keys.shape[2]
    wanted = {
        "ranking": (x.ranking, (n, k)),
        "lengths": (x.lengths, (n,)),
        "weights": (x.weights, (k,)),
        "predecessors": (x.predecessors, (terms * (terms + 1) // 2, m, r)),
        "keys": (x.keys, (terms, m, r)),
    }
    if anchor_weights is not None:
        wanted["anchor_weights"] = anchor_weights, (n,)
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(
                f"plackett_luce: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} "
                f"for scores {(n, m)} and ranking {tuple(x.ranking.shape)}"
            )
        if tensor.device != x.scores.device:
            raise ValueError(
                f"plackett_luce: scores are on {x.scores.device} but {name} on {tensor.device}; "
                "move them to one device"
            )


# ---------------------------------------------------------------- registration


def _run_nll(*args: Any) -> Tensor:
    x, impl = Lists(*(t.contiguous() for t in args[:-1])), args[-1]
    with outside_autocast(x.scores):
        if impl == "blocked":
            return blocked.nll(x)
        first_order, tiles = _triton(x)
        value: Tensor = tiles.nll(x)
        if tiles is not first_order:
            first_order.replace_at_zero_keys(x, value)
    return value


def _run_gradients(upstream: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, impl = Lists(*(t.contiguous() for t in args[:-1])), args[-1]
    upstream = upstream.contiguous()
    with outside_autocast(x.scores):
        if impl == "blocked":
            return blocked.nll_and_gradients(upstream, x)
        first_order, tiles = _triton(x)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = tiles.nll_and_gradients(upstream, x)
        if tiles is not first_order:
            first_order.replace_at_zero_keys(x, found[0], upstream, found[1])
    return found


def _triton(x: Lists) -> tuple[ModuleType, ModuleType]:
    """The module of order 1, and that of the lists' order; Triton is imported when first used."""
    from rankloss.kernels import first_order

    if len(x.keys) == 0:
        return first_order, first_order
    from rankloss.kernels import high_order

    return first_order, high_order


_nll = torch.library.custom_op(
    "rankloss::plackett_luce",
    _run_nll,
    mutates_args=(),
    schema=f"({SCHEMA}, str impl) -> Tensor",
)
_gradients = torch.library.custom_op(
    "rankloss::plackett_luce_gradients",
    _run_gradients,
    mutates_args=(),
    schema=f"(Tensor upstream, {SCHEMA}, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_nll.register_fake
def _(*args: Any) -> Tensor:
    scores: Tensor = args[0]
    return scores.new_empty(scores.shape[0])


@_gradients.register_fake
def _(upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Tables' gradients have the accumulators' dtype, which is that of the scores."""
    x = Lists(*args[:-1])
    shapes = x.scores.shape[:1], x.scores.shape, x.predecessors.shape, x.keys.shape
    return tuple(x.scores.new_empty(shape) for shape in shapes)


loop_over_batch(_nll)
loop_over_batch(_gradients)


class _Each(torch.autograd.Function):
    """Likelihoods of the anchors; their gradients are made in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        nll: Tensor = _nll(*args)
        return nll

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.impl = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        d_scores, d_predecessors, d_keys = applied(
            _EachBackward, grad, *ctx.saved_tensors, ctx.impl
        )
        return d_scores, None, None, None, d_predecessors, d_keys, None


class _EachBackward(Refusing):
    @staticmethod
    def forward(
        grad: Tensor,
        scores: Tensor,
        ranking: Tensor,
        lengths: Tensor,
        weights: Tensor,
        predecessors: Tensor,
        keys: Tensor,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # torch.compile miscounts arguments without names here
        x = scores, ranking, lengths, weights, predecessors, keys
        _, d_scores, d_predecessors, d_keys = _gradients(grad, *x, impl)
        return d_scores, d_predecessors.to(predecessors.dtype), d_keys.to(keys.dtype)


class _Total(MadeAhead):
    """Their weighted sum, and its gradients."""

    @staticmethod
    def forward(anchor_weights: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nll, *gradients = _gradients(anchor_weights, *args[: len(Lists._fields) + 1])
        return ((nll * anchor_weights).sum(), *gradients)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * 11
        saved = ctx.saved_tensors
        d_scores, d_predecessors, d_keys = (
            scaled(grad, gradient, link)
            for gradient, link in zip(saved[:3], saved[3:], strict=True)
        )
        return None, d_scores, None, None, None, d_predecessors, d_keys, None, None, None, None

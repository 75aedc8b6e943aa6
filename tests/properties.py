"""The mathematics under test: the definition spelled out, and the identities.

The likelihood, with u_ik(d) the utility of candidate d for anchor i at place k:

    u_ik(d) = S[i, d] + sum over m = 1 .. min(R-1, k-1) of
              sum over c of  C_m[d, c] * prod over j = 1..m of P_mj[pi_i(k-j), c]
    l_ik    = logsumexp over d not in pi_i(1..k-1) of u_ik(d)  -  u_ik(pi_i(k))
    nll_i   = sum_k w_k l_ik / sum_k w_k
"""

import math

import torch
from torch import Tensor

from rankloss import Transitions, plackett_luce_nll
from tests.helpers.problems import Problem, term_bounds


def nll(p: Problem, impl: str) -> Tensor:
    """nll_i, (N,), on the problem's own device."""
    device = p.scores.device
    p = p.for_impl(impl)
    value = plackett_luce_nll(
        p.scores,
        p.ranking,
        p.transitions,
        discount=p.discount,
        mask=p.mask,
        reduction="none",
        impl=impl,
    )
    return value.to(device)


def value_and_gradients(p: Problem, impl: str, upstream: Tensor | None = None) -> list[Tensor]:
    """nll_i, then the gradients of sum_i upstream_i nll_i to `p.tensors()`."""
    leaves = [x.detach().requires_grad_() for x in p.tensors()]
    tables = Transitions(*leaves[1:]) if p.transitions else None
    value = nll(p._replace(scores=leaves[0], transitions=tables), impl)
    if upstream is None:
        upstream = torch.linspace(0.5, 1.5, len(value), dtype=value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def spelled_out(p: Problem) -> Tensor:
    """The definition at the top of this page, one candidate at a time, in Python floats."""
    scores: list[list[float]] = p.scores.tolist()
    n, m = p.scores.shape
    tables = ([], []) if p.transitions is None else tuple(x.tolist() for x in p.transitions)
    predecessors, keys = tables

    def utility(i: int, d: int, taken: list[int]) -> float:
        total = scores[i][d]
        for order in range(1, min(len(keys), len(taken)) + 1):
            for c, key in enumerate(keys[order - 1][d]):
                first = order * (order - 1) // 2
                total += key * math.prod(
                    predecessors[first + j - 1][taken[-j]][c] for j in range(1, order + 1)
                )
        return total

    values = []
    for i in range(n):
        allowed = [d for d in range(m) if p.mask is None or p.mask[i, d]]
        taken: list[int] = []
        total = weights = 0.0
        for winner in p.ranking[i].tolist():
            if winner not in allowed:
                continue
            u = {d: utility(i, d, taken) for d in allowed if d not in taken}
            top = max(u.values())
            lse = top + math.log(sum(math.exp(x - top) for x in u.values()))
            taken.append(winner)
            w = 1.0 if p.discount == "none" else 1 / math.log(len(taken) + 1)
            total, weights = total + w * (lse - u[winner]), weights + w
        values.append(total / weights if taken else 0.0)
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- the identities


def assert_same(actual: list[Tensor], expected: list[Tensor], p: Problem) -> None:
    """Equal up to the rounding of sums taken in another order.

    Each utility, of size up to `p.scale`, is known to eps * p.scale; so are its log-sum-exp and,
    relatively, its probability. Gradients to tables are sums of probabilities times products of
    table entries, so their tolerance grows with their own size too.
    """
    eps = max(torch.finfo(x.dtype).eps for x in (p.scores, *actual, *expected))
    for a, b in zip(actual, expected, strict=True):
        size = max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        atol = 16 * eps * (1 + p.scale) * size
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=False)


def assert_first_place_is_info_nce(p: Problem, impl: str) -> None:
    """1. K = 1 is the cross-entropy of the match: the zero-order member is CLIP."""
    p = p._replace(ranking=p.ranking[:, :1], mask=None)
    actual = value_and_gradients(p, impl)
    leaf = p.scores.detach().requires_grad_()
    value = torch.nn.functional.cross_entropy(leaf, p.ranking[:, 0], reduction="none")
    upstream = torch.linspace(0.5, 1.5, len(value), dtype=value.dtype)
    assert_same(actual[:2], [value.detach(), *torch.autograd.grad(value, leaf, upstream)], p)
    assert all(g.abs().max() == 0 for g in actual[2:])  # the first place has no predecessor


def assert_first_order_is_list_mle(p: Problem, impl: str) -> None:
    """2. R = 1, K = M is ListMLE, the mean over places of log-sum-exp of the rest minus own."""
    p = p._replace(transitions=None)
    actual = value_and_gradients(p, impl)
    leaf = p.scores.double().detach().requires_grad_()
    kept = leaf if p.mask is None else leaf.masked_fill(~p.mask, -torch.inf)
    rows = []
    for row, order in zip(kept, p.ranking, strict=True):
        z = row[order]
        z = z[z > -torch.inf]
        w = torch.ones(len(z), dtype=torch.float64)
        if p.discount == "log":
            w = 1 / torch.arange(2, len(z) + 2).double().log()
        terms = [z[k:].logsumexp(0) - z[k] for k in range(len(z))]
        rows.append(torch.stack(terms) @ w / w.sum() if terms else row.new_zeros(()))
    value = torch.stack(rows)
    upstream = torch.linspace(0.5, 1.5, len(value), dtype=p.scores.dtype).double()
    gradient = torch.zeros_like(leaf)
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
    assert_same(actual, [value.detach(), gradient], p)


def assert_zero_keys_leave_order_one(p: Problem, impl: str) -> None:
    """3. All keys zero: any order has the value of order 1 and its gradient to the scores."""
    assert p.transitions is not None
    plain = p._replace(transitions=None)
    zero = p._replace(transitions=p.transitions._replace(keys=0 * p.transitions.keys))
    for a, b in zip(
        value_and_gradients(zero, impl), value_and_gradients(plain, impl), strict=False
    ):
        assert torch.equal(a, b)  # to the last bit: an order starts as the one below


def assert_zero_terms_lower_the_order(p: Problem, terms: int, impl: str) -> None:
    """4. Only terms up to m nonzero: order R equals order m + 1."""
    assert p.transitions is not None
    predecessors, keys = p.transitions
    zeroed = Transitions(predecessors, torch.cat([keys[:terms], 0 * keys[terms:]]))
    lower = Transitions(predecessors[: terms * (terms + 1) // 2], keys[:terms])
    a = value_and_gradients(p._replace(transitions=zeroed), impl)
    b = value_and_gradients(p._replace(transitions=lower), impl)
    assert_same([*a[:2], a[2][: len(b[2])], a[3][:terms]], b, p)
    assert a[2][len(b[2]) :].abs().sum() == 0  # predecessors of a zero term have no effect


def assert_probabilities_sum_to_one(p: Problem, impl: str) -> None:
    """5. exp(-sum_k l_ik) is a probability over all rankings."""
    m = p.scores.shape[1]
    every = torch.cartesian_prod(*[torch.arange(m)] * m).reshape(-1, m)
    every = every[(every.sort(1).values == torch.arange(m)).all(1)]
    assert len(every) == math.factorial(m)
    scores = p.scores[:1].expand(len(every), m)
    p = p._replace(scores=scores, ranking=every, mask=None, discount="none")
    total = (-m * nll(p, impl)).exp().sum()
    eps = torch.finfo(total.dtype).eps
    torch.testing.assert_close(
        total, torch.ones_like(total), rtol=0, atol=16 * m * eps * (1 + p.scale)
    )


def assert_relabelling_changes_nothing(p: Problem, labels: Tensor, impl: str) -> None:
    """6. Candidates have no names: `labels` (M,) is a permutation, candidate d's new number."""
    old = labels.argsort()  # new number -> old
    tables = p.transitions and Transitions(*(x[:, old] for x in p.transitions))
    mask = p.mask if p.mask is None else p.mask[:, old]
    renamed = p._replace(
        scores=p.scores[:, old], ranking=labels[p.ranking], transitions=tables, mask=mask
    )
    value, *gradients = value_and_gradients(renamed, impl)
    back = [g[:, labels] for g in gradients]
    assert_same([value, *back], value_and_gradients(p, impl), p)


def assert_constants_change_nothing(p: Problem, shift: Tensor, impl: str) -> None:
    """7. A constant added to a row of S, or to a term whatever the candidate, cancels.

    Adding the same vector to every key adds f(a_1 .. a_m), which does not depend on d.
    """
    moved = p._replace(scores=p.scores + shift[:, None])
    if p.transitions is not None:
        vector = torch.linspace(-1, 1, p.transitions.keys.shape[2], dtype=p.scores.dtype)
        tables = p.transitions._replace(keys=p.transitions.keys + vector)
        moved = moved._replace(transitions=tables)
        moved = moved._replace(scale=moved.scale + float(term_bounds(tables).sum()))
    moved = moved._replace(scale=moved.scale + float(shift.abs().max()))
    a, b = value_and_gradients(moved, impl), value_and_gradients(p, impl)
    assert_same(a, b, moved)

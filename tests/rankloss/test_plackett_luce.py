"""The likelihood: its definition, its identities, its derivatives."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankloss import Transitions, kernels, plackett_luce_nll
from tests.helpers.problems import (
    IMPLEMENTATIONS,
    Problem,
    each_implementation,
    each_streaming,
    make_problem,
    problems,
)
from tests.properties import (
    assert_constants_change_nothing,
    assert_first_order_is_list_mle,
    assert_first_place_is_info_nce,
    assert_probabilities_sum_to_one,
    assert_relabelling_changes_nothing,
    assert_same,
    assert_zero_keys_leave_order_one,
    assert_zero_terms_lower_the_order,
    nll,
    spelled_out,
    value_and_gradients,
)

# ---------------------------------------------------------------- the definition


@each_implementation
@given(p=problems(sizes=(1, 7)))
def test_equals_the_definition_spelled_out(p: Problem, impl: str) -> None:
    assert_same([nll(p, impl)], [spelled_out(p)], p)


@each_implementation
@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [1, 2, 9, 64, 65, 130])
def test_equals_the_definition_at_sizes_around_a_tile(k: int, order: int, impl: str) -> None:
    p = make_problem(k, 2, 130, k, order, scale=14.3, discount="log")
    assert_same([nll(p, impl)], [spelled_out(p)], p)


# ---------------------------------------------------------------- the eight identities


@each_implementation
@given(p=problems())
def test_first_place_is_info_nce(p: Problem, impl: str) -> None:
    assert_first_place_is_info_nce(p, impl)


@each_implementation
@given(p=problems(orders=(1, 1), full=True))
def test_first_order_is_list_mle(p: Problem, impl: str) -> None:
    assert_first_order_is_list_mle(p, impl)


@each_implementation
@given(p=problems(orders=(2, 5)))
def test_zero_keys_leave_order_one(p: Problem, impl: str) -> None:
    assert_zero_keys_leave_order_one(p, impl)


@each_implementation
@given(p=problems(orders=(3, 5)), data=st.data())
def test_zero_terms_lower_the_order(p: Problem, data: st.DataObject, impl: str) -> None:
    assert_zero_terms_lower_the_order(p, data.draw(st.integers(1, p.order - 2)), impl)


@each_implementation
@settings(max_examples=30)
@given(p=problems(sizes=(1, 6), masks=False))
def test_probabilities_of_all_rankings_sum_to_one(p: Problem, impl: str) -> None:
    assert_probabilities_sum_to_one(p, impl)


@each_implementation
@given(p=problems(), data=st.data())
def test_relabelling_candidates_changes_nothing(p: Problem, data: st.DataObject, impl: str) -> None:
    labels = data.draw(st.permutations(range(p.scores.shape[1])))
    assert_relabelling_changes_nothing(p, torch.tensor(labels), impl)


@each_implementation
@given(p=problems(), shift=st.floats(-100, 100))
def test_constants_change_nothing(p: Problem, shift: float, impl: str) -> None:
    shifts = torch.linspace(-1, 1, len(p.scores), dtype=p.scores.dtype) * shift
    assert_constants_change_nothing(p, shifts, impl)


@each_implementation
@given(p=problems(full=True, masks=False))
def test_last_place_contributes_nothing(p: Problem, impl: str) -> None:
    """Exactly 0, in value and in gradient: nothing else remains to be chosen."""
    n, m = p.scores.shape
    only_last = torch.nn.functional.one_hot(torch.tensor(m - 1), m).to(p.scores.dtype)
    leaves = [x.detach().requires_grad_() for x in p.tensors()]
    tables = leaves[1:] or [p.scores.new_empty(0, m, 0) for _ in range(2)]
    lengths = torch.full((n,), m)
    value = kernels.plackett_luce(
        leaves[0], p.ranking, lengths, only_last, tables[0], tables[1], impl
    )
    gradients = torch.autograd.grad(value.sum(), leaves)
    assert value.tolist() == [0.0] * n
    if p.order == 1:
        assert gradients[0].abs().max() == 0
    assert_same(list(gradients), [torch.zeros_like(g) for g in gradients], p)


# ---------------------------------------------------------------- masks


def without_masked(p: Problem, row: int) -> Problem:
    """The one-row problem with the masked candidates' columns and places really deleted."""
    assert p.mask is not None
    kept = p.mask[row].nonzero().flatten()
    number = torch.full((p.scores.shape[1],), -1)
    number[kept] = torch.arange(len(kept))
    ranking = number[p.ranking[row]]
    tables = p.transitions and Transitions(*(x[:, kept] for x in p.transitions))
    return p._replace(
        scores=p.scores[row : row + 1, kept],
        ranking=ranking[ranking >= 0][None],
        transitions=tables,
        mask=None,
    )


@each_implementation
@given(p=problems(sizes=(1, 12)), seed=st.integers(0, 99))
def test_masking_equals_deleting(p: Problem, seed: int, impl: str) -> None:
    n, m = p.scores.shape
    g = torch.Generator().manual_seed(seed)
    p = p._replace(mask=torch.rand(n, m, generator=g) < 0.6)
    value, *gradients = value_and_gradients(p, impl, torch.ones(n))
    expected = [torch.zeros_like(value), *(torch.zeros_like(x) for x in gradients)]
    assert p.mask is not None
    for row in range(n):
        smaller = without_masked(p, row)
        if smaller.ranking.numel() == 0:
            continue  # no place left: contributes 0
        v, d_scores, *d_tables = value_and_gradients(smaller, impl, torch.ones(1))
        kept = p.mask[row]
        expected[0][row] = v[0]
        expected[1][row, kept] = d_scores[0]
        for total, part in zip(expected[2:], d_tables, strict=True):
            total[:, kept] += part
    assert_same([value, *gradients], expected, p)
    assert gradients[0][~p.mask].abs().sum() == 0


@each_implementation
def test_masked_scores_are_never_read(impl: str) -> None:
    p = make_problem(0, 5, 9, 9, 3, keep=0.6)
    assert p.mask is not None
    poisoned = p._replace(scores=p.scores.masked_fill(~p.mask, torch.nan))
    assert torch.equal(nll(poisoned, impl), nll(p, impl))
    poisoned = p._replace(scores=p.scores.masked_fill(~p.mask, torch.inf))
    for a, b in zip(value_and_gradients(poisoned, impl), value_and_gradients(p, impl), strict=True):
        assert torch.equal(a, b)


@each_implementation
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("k", [2, 6])
def test_all_masked_rows_contribute_nothing(k: int, order: int, impl: str) -> None:
    p = make_problem(1, 4, 6, k, order)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = mask[3] = False
    value, *gradients = value_and_gradients(p._replace(mask=mask), impl)
    assert value[1] == value[3] == 0
    assert gradients[0][[1, 3]].abs().max() == 0
    assert all(g.isfinite().all() for g in gradients)
    mean = plackett_luce_nll(p.scores, p.ranking, p.transitions, mask=mask, impl=impl)
    torch.testing.assert_close(mean, (value[0] + value[2]) / 2)  # of the anchors with a place
    nothing = value_and_gradients(p._replace(mask=torch.zeros_like(mask)), impl)
    assert all(x.abs().max() == 0 for x in nothing)
    mean = plackett_luce_nll(
        p.scores, p.ranking, p.transitions, mask=torch.zeros_like(mask), impl=impl
    )
    assert mean == 0


@each_implementation
def test_mask_of_one_row_is_that_of_every_row(impl: str) -> None:
    p = make_problem(2, 4, 6, 5, 2)
    row = torch.tensor([True, False, True, True, False, True])
    a, b = (nll(p._replace(mask=mask), impl) for mask in (row, row.expand(4, 6)))
    assert torch.equal(a, b)


# ---------------------------------------------------------------- options and small shapes


@each_implementation
def test_reductions(impl: str) -> None:
    p = make_problem(3, 5, 7, 4, 3)
    rows = nll(p, impl)
    assert rows.shape == (5,)
    for reduction, expected in (("sum", rows.sum()), ("mean", rows.mean())):
        options: Any = {"reduction": reduction, "impl": impl}
        found = plackett_luce_nll(p.scores, p.ranking, p.transitions, **options)
        torch.testing.assert_close(found, expected)


def test_auto_is_an_implementation_and_the_default() -> None:
    p = make_problem(3, 5, 7, 4, 3, dtype=torch.float32)
    named = [nll(p, impl) for impl in IMPLEMENTATIONS]
    assert any(torch.equal(nll(p, "auto"), value) for value in named)
    assert torch.equal(nll(p, "auto").mean(), plackett_luce_nll(*p[:3]))


@each_implementation
@pytest.mark.parametrize("order", [1, 3])
def test_empty_batch(order: int, impl: str) -> None:
    p = make_problem(4, 0, 5, 3, order)
    value, *gradients = value_and_gradients(p, impl)
    assert value.shape == (0,)
    assert gradients[0].shape == (0, 5)
    assert all(g.abs().sum() == 0 for g in gradients)
    for mask in (None, torch.ones(5, dtype=torch.bool)):
        assert plackett_luce_nll(p.scores, p.ranking, p.transitions, mask=mask, impl=impl) == 0


@each_implementation
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_any_integer_ranking(dtype: torch.dtype, impl: str) -> None:
    p = make_problem(5, 4, 9, 6, 3, keep=0.8)
    assert torch.equal(nll(p._replace(ranking=p.ranking.to(dtype)), impl), nll(p, impl))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_narrow_integers_may_rank_more_candidates_than_they_can_name(dtype: torch.dtype) -> None:
    scores = torch.randn(1, 300)
    ranking = torch.tensor([[100, 50, 3]])
    assert torch.equal(
        plackett_luce_nll(scores, ranking.to(dtype)), plackett_luce_nll(scores, ranking)
    )


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_reference_has_the_derivatives_of_its_value(order: int, masked: bool) -> None:
    p = make_problem(order, 3, 5, 4, order, r=2, keep=0.7 if masked else 1.0, scale=2.0)
    leaves = [x.requires_grad_() for x in p.tensors()]

    def value(*leaves: Tensor) -> Tensor:
        tables = Transitions(*leaves[1:]) if len(leaves) > 1 else None
        return nll(p._replace(scores=leaves[0], transitions=tables), "reference")

    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


@each_streaming
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_streaming_has_the_derivatives_of_its_value(order: int, k: int, impl: str) -> None:
    p = make_problem(order, 3, 5, k, order, r=2, keep=0.8, scale=2.0, discount="log")
    leaves = [x.requires_grad_() for x in p.tensors()]

    def value(*leaves: Tensor) -> Tensor:
        tables = Transitions(*leaves[1:]) if len(leaves) > 1 else None
        return nll(p._replace(scores=leaves[0], transitions=tables), impl)

    assert torch.autograd.gradcheck(value, leaves)


@each_streaming
@given(p=problems())
def test_streaming_equals_reference(p: Problem, impl: str) -> None:
    assert_same(value_and_gradients(p, impl), value_and_gradients(p, "reference"), p)

"""The transition heads: their initial weights, their tables, their life as a module."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

from rankloss import TransitionHeads


def test_tables_are_the_definition() -> None:
    """P_mj = H A_mj and C_m = H B_m / sqrt(r)."""
    heads = TransitionHeads(6, 4, 5).double()
    torch.nn.init.normal_(heads.key_weight)
    h = torch.randn(7, 6, dtype=torch.float64)
    predecessors, keys = heads(h)
    assert predecessors.shape == (6, 7, 5)  # P_11; P_21, P_22; P_31, P_32, P_33
    assert keys.shape == (3, 7, 5)
    for table, a in zip(predecessors, heads.predecessor_weight, strict=True):
        torch.testing.assert_close(table, h @ a)
    for table, b in zip(keys, heads.key_weight, strict=True):
        torch.testing.assert_close(table, h @ b / 5**0.5)


def test_keys_start_at_zero_and_predecessors_at_unit_variance() -> None:
    """With unit-norm candidates of width D, weights N(0, 1/D) give tables of variance 1/D."""
    heads = TransitionHeads(64, 5, 32)
    assert heads.key_weight.abs().max() == 0
    weight = heads.predecessor_weight
    assert weight.shape == (10, 64, 32)
    assert abs(weight.var() * 64 - 1) < 0.05
    assert abs(weight.mean()) * 8 < 0.05
    assert len(set(weight.flatten().tolist())) > 0.99 * weight.numel()


def test_initial_weights_depend_on_nobody_s_seed() -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        weights.append(TransitionHeads(8, 3).predecessor_weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*weights)


def test_reset_with_a_generator() -> None:
    heads = TransitionHeads(8, 3)
    start = heads.predecessor_weight.detach().clone()
    torch.nn.init.normal_(heads.key_weight)
    heads.reset_parameters(torch.Generator().manual_seed(1))
    assert not torch.equal(heads.predecessor_weight, start)
    assert heads.key_weight.abs().max() == 0
    heads.reset_parameters()
    assert torch.equal(heads.predecessor_weight, start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_draw_in_any_dtype(dtype: torch.dtype) -> None:
    start = TransitionHeads(8, 3)
    torch.set_default_dtype(dtype)
    try:
        other = TransitionHeads(8, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.predecessor_weight.dtype == dtype
    assert torch.equal(other.predecessor_weight, start.predecessor_weight.to(dtype))


def test_built_on_meta_then_materialised() -> None:
    with torch.device("meta"):
        heads = TransitionHeads(8, 3)
    assert heads.key_weight.is_meta
    heads.to_empty(device="cpu").reset_parameters()
    start = TransitionHeads(8, 3)
    for a, b in zip(heads.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)


def saved_and_loaded(heads: TransitionHeads) -> TransitionHeads:
    file = io.BytesIO()
    torch.save(heads.state_dict(), file)
    file.seek(0)
    fresh = TransitionHeads(8, 3, 4)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "copied",
    [saved_and_loaded, copy.deepcopy, lambda heads: pickle.loads(pickle.dumps(heads))],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_copies(copied: Callable[[TransitionHeads], TransitionHeads]) -> None:
    heads = TransitionHeads(8, 3, 4)
    with torch.no_grad():
        for p in heads.parameters():
            p.normal_()
    h = torch.randn(5, 8)
    for a, b in zip(copied(heads)(h), heads(h), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_explicit_casting(dtype: torch.dtype) -> None:
    heads, h = TransitionHeads(8, 3, 4), torch.randn(5, 8)
    torch.nn.init.normal_(heads.key_weight)
    with torch.autocast("cpu", dtype):
        tables = heads(h)
    explicit = copy.deepcopy(heads).to(dtype)(h.to(dtype))
    for a, b in zip(tables, explicit, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)


def test_nothing_should_decay() -> None:
    heads = TransitionHeads(8, 3)
    assert heads.no_weight_decay() == {"predecessor_weight", "key_weight"}


def test_repr_says_what_it_is() -> None:
    assert repr(TransitionHeads(8, 3, 4)) == "TransitionHeads(8, order=3, transition_dim=4)"

"""The transition heads: their tables, what they learn, their initial weights, their life."""

import pytest
import torch
from torch import Tensor

from rankloss import HighOrderPLLoss, TransitionHeads, Transitions, plackett_luce_nll
from tests.helpers.features import features


def test_tables_are_the_definition() -> None:
    """P_mj = rms_norm(H A_mj) and C_m = H B_m / sqrt(r)."""
    heads = TransitionHeads(6, 4, 5).double()
    torch.nn.init.normal_(heads.key_weight)
    h = torch.randn(7, 6, dtype=torch.float64)
    predecessors, keys = heads(h)
    assert predecessors.shape == (6, 7, 5)  # P_11; P_21, P_22; P_31, P_32, P_33
    assert keys.shape == (3, 7, 5)
    for table, a in zip(predecessors, heads.predecessor_weight, strict=True):
        torch.testing.assert_close(table, torch.nn.functional.rms_norm(h @ a, (5,)))
    for table, b in zip(keys, heads.key_weight, strict=True):
        torch.testing.assert_close(table, h @ b / 5**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_predecessor_rows_have_unit_root_mean_square(dtype: torch.dtype) -> None:
    """Embeddings of any norm give them; an embedding of zero has a row of zeros."""
    heads = TransitionHeads(64, 3, 8)
    h = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scaled = torch.cat([x * h for x in (1.0, 10.0, 100.0)] + [torch.zeros(1, 64)])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        rows = heads(scaled).predecessors
    assert rows.dtype == dtype
    size = rows[:, :-1].float().square().mean(2).sqrt()
    torch.testing.assert_close(size, torch.ones_like(size), rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert rows[:, -1].abs().max() == 0


# ---------------------------------------------------------------- what they learn


@pytest.mark.parametrize("decay", [1.0, 0.01], ids=["at the start", "after a weight decay"])
@pytest.mark.parametrize("width", [128, 512, 1024])
def test_keys_of_all_terms_learn_alike(width: int, decay: float) -> None:
    """Products of predecessor rows neither vanish nor explode with their number."""
    loss = HighOrderPLLoss(width, order=5)
    (heads,) = loss.transition_heads
    with torch.no_grad():
        heads.get_parameter("predecessor_weight").mul_(decay)
    loss(*features(32, width, dtype=torch.float32), 14.3).backward()
    gradient = heads.get_parameter("key_weight").grad
    assert gradient is not None
    norms = gradient.flatten(1).norm(dim=1)
    assert norms.min() > norms.max() / 20
    assert norms.min() > 1e-5


def drawn_rankings(tables: Transitions, n: int, k: int, generator: torch.Generator) -> Tensor:
    """(n, k) rankings drawn place by place from the model whose scores are all zero."""
    predecessors, keys = tables
    taken = torch.zeros(n, keys.shape[1], dtype=torch.bool)
    ranking = torch.empty(n, 0, dtype=torch.long)
    for place in range(k):
        utility = torch.zeros(n, keys.shape[1])
        for m in range(1, min(len(keys), place) + 1):
            rows = range(m * (m - 1) // 2, m * (m + 1) // 2)
            query = torch.stack(
                [predecessors[row][ranking[:, -j]] for j, row in enumerate(rows, start=1)]
            ).prod(0)
            utility = utility + query @ keys[m - 1].T
        chances = utility.masked_fill(taken, -torch.inf).softmax(1)
        winner = torch.multinomial(chances, 1, generator=generator)
        taken.scatter_(1, winner, True)
        ranking = torch.cat([ranking, winner], 1)
    return ranking


@pytest.mark.parametrize("order", [2, 3])
def test_heads_find_a_planted_order_and_the_order_below_does_not(order: int) -> None:
    """Rankings come from the order's last term alone; shares of what held-out ones have to give."""
    d, m, r, generator = 512, 12, 8, torch.Generator().manual_seed(0)
    candidates = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    planted = TransitionHeads(d, order, r, generator=generator)
    with torch.no_grad():
        planted.key_weight[-1] = 2 * torch.randn(d, r, generator=generator)
        tables = planted(candidates)
    trained, held_out = (drawn_rankings(tables, 512, 6, generator) for _ in range(2))
    scores = torch.zeros(512, m)
    nothing, everything = (plackett_luce_nll(scores, held_out, x) for x in (None, tables))
    found = {1: 0.0}
    for candidate_order in range(2, order + 1):
        heads = TransitionHeads(d, candidate_order, r)
        optimizer = torch.optim.AdamW(heads.parameters(), lr=0.03)
        for _ in range(80):
            optimizer.zero_grad()
            torch.autograd.backward(plackett_luce_nll(scores, trained, heads(candidates)))
            optimizer.step()
        with torch.no_grad():
            nll = plackett_luce_nll(scores, held_out, heads(candidates))
        found[candidate_order] = float((nothing - nll) / (nothing - everything))
    assert found[order] > 0.5, found
    assert found[order - 1] < 0.25, found


# ---------------------------------------------------------------- where they start


def test_keys_start_at_zero_and_predecessor_maps_at_variance_1_over_d() -> None:
    heads = TransitionHeads(64, 5, 32)
    assert heads.key_weight.abs().max() == 0
    weight = heads.predecessor_weight
    assert weight.shape == (10, 64, 32)
    assert abs(weight.var() * 64 - 1) < 0.05
    assert abs(weight.mean()) * 8 < 0.05
    assert len(set(weight.flatten().tolist())) > 0.99 * weight.numel()


def test_a_generator_draws_the_weights() -> None:
    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    given = TransitionHeads(8, 3, generator=seeded()).predecessor_weight
    assert not torch.equal(given, TransitionHeads(8, 3).predecessor_weight)
    assert not torch.equal(given, TransitionHeads(8, 3, generator=seeded(), seed=5).key_weight)
    loss = HighOrderPLLoss(8, 3, share_transitions=False, generator=seeded())
    weights = [x.get_parameter("predecessor_weight") for x in loss.transition_heads]
    assert torch.equal(weights[0], given)
    assert not torch.equal(*weights)
    before = torch.cat([x.flatten() for x in weights])
    loss.reset_parameters(seeded())
    assert torch.equal(torch.cat([x.flatten() for x in weights]), before)


def test_heads_of_images_and_of_texts_differ() -> None:
    """Each keeps its own seed, so that resetting module by module leaves them different."""
    loss = HighOrderPLLoss(8, 3, share_transitions=False)
    start = [x.detach().clone() for x in loss.parameters()]
    assert not torch.equal(start[0], start[2])
    with torch.no_grad():
        for x in loss.parameters():
            x.normal_()
    for module in loss.modules():
        getattr(module, "reset_parameters", lambda: None)()
    assert all(torch.equal(a, b) for a, b in zip(loss.parameters(), start, strict=True))


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
    heads.to_empty(device="cpu")  # whose memory holds anything
    start = TransitionHeads(8, 3)
    for a, b in zip(heads.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lower", [2, 3])
def test_weights_of_a_lower_order_load(lower: int) -> None:
    """Its terms are taken over, the others are at their start, not where they were before."""
    small, large, start = TransitionHeads(8, lower), TransitionHeads(8, 4), TransitionHeads(8, 4)
    with torch.no_grad():
        for p in (*small.parameters(), *large.parameters()):
            p.normal_()
    large.load_state_dict(small.state_dict(), strict=True)
    for name, given in small.named_parameters():
        loaded = large.get_parameter(name)
        assert torch.equal(loaded[: len(given)], given)
        assert torch.equal(loaded[len(given) :], start.get_parameter(name)[len(given) :])
    with pytest.raises(RuntimeError, match="size mismatch"):
        small.load_state_dict(large.state_dict())

"""Callers may give the op any upstream, any strides, twice, in any order of programs."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from rankloss.kernels import high_order, plackett_luce
from rankloss.kernels.configurations import Plan, Tile, plan, using
from rankloss.kernels.signature import Lists
from tests.helpers import triton_cases
from tests.helpers.sanitizer import KernelFault, sanitize
from tests.helpers.triton_cases import (
    DEVICE,
    SMALL_TILES,
    Inputs,
    Results,
    can_run,
    expected,
    run,
    run_total,
    upstream,
)

pytestmark = can_run

PROBLEMS = {
    "order 1": triton_cases.make_inputs(2, 20, 20, 1, ragged=True, discount=True),
    "order 1, K < M": triton_cases.make_inputs(2, 20, 7, 1, ragged=True, discount=True),
    "order 3": triton_cases.make_inputs(3, 20, 20, 3, ragged=True, discount=True),
    "order 3, completed": triton_cases.make_inputs(2, 20, 17, 3, ragged=True, masked=True),
    "order 3, natural": triton_cases.make_inputs(2, 20, 7, 3, r=20, ragged=True),
    "order 4, half": triton_cases.make_inputs(1, 20, 18, 4, dtype=torch.float16),
}
each_problem = pytest.mark.parametrize("inputs", PROBLEMS.values(), ids=PROBLEMS.keys())


def gradients(nll: Tensor, inputs: Inputs, grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(nll, inputs.leaves(), grad, retain_graph=True))


@lru_cache
def run_name(name: str) -> Results:
    """The results that every variation is compared with."""
    with triton_cases.guarded(), using(SMALL_TILES):
        return run(PROBLEMS[name])


def run_small(inputs: Inputs) -> Results:
    return run_name(next(name for name, p in PROBLEMS.items() if p is inputs))


# ---------------------------------------------------------------- upstream gradients


@each_problem
def test_upstream_of_any_strides(inputs: Inputs) -> None:
    """Expanded (what `.sum()` sends), strided among NaN; the second after another."""
    with triton_cases.guarded(), using(SMALL_TILES):
        x = inputs.with_leaves()
        nll = plackett_luce(*x, impl="triton")
        n = len(nll)
        ones = gradients(nll, x, torch.ones(n, device=DEVICE))
        expanded = gradients(nll, x, torch.ones((), device=DEVICE).expand(n))
        assert all(map(torch.equal, expanded, ones))
        wide = torch.stack([upstream(n), torch.full((n,), torch.nan, device=DEVICE)], 1)
        strided = gradients(nll, x, wide[:, 0])
    assert all(map(torch.equal, strided, run_small(inputs).gradients()))


@pytest.mark.parametrize("name", ["order 1", "order 3", "order 3, natural"])
def test_a_sum_whose_gradients_are_made_ahead_has_the_same(name: str) -> None:
    inputs = PROBLEMS[name]
    grad = upstream(len(inputs.scores))
    wanted = run_small(inputs)
    with triton_cases.guarded(), using(SMALL_TILES):
        total, *found = run_total(inputs, grad)
    torch.testing.assert_close(total, (wanted.nll * grad).sum())
    assert all(map(torch.equal, found, wanted.gradients()))


@pytest.mark.parametrize("name", ["order 3", "order 3, natural"])
def test_configuration_changed_before_the_backward_pass(name: str) -> None:
    """Tiles, blocks of columns and precision of the two passes need not agree."""
    inputs = PROBLEMS[name]
    other = Plan(Tile(32, 16), Tile(16, 32), columns=16, precision="ieee")
    x = inputs.with_leaves()
    with triton_cases.guarded(), using(SMALL_TILES):
        nll = plackett_luce(*x, impl="triton")
    with triton_cases.guarded(), using(other):
        found = gradients(nll, x, upstream(len(nll)))
    triton_cases.assert_close(Results(nll.detach(), *found), expected(inputs), inputs)


@each_problem
def test_inputs_and_upstream_are_left_alone(inputs: Inputs) -> None:
    grad = upstream(len(inputs.scores))
    before = [x.clone() for x in (*inputs, grad)]
    with triton_cases.guarded(), using(SMALL_TILES):
        x = inputs.with_leaves()
        versions = [t._version for t in (*x, grad)]
        nll = plackett_luce(*x, impl="triton")
        value = nll.detach().clone()
        gradients(nll, x, grad)
    assert all(map(torch.equal, (*inputs, grad), before))
    assert all(map(torch.equal, x, inputs))
    assert [t._version for t in (*x, grad)] == versions
    assert torch.equal(nll, value)


# ---------------------------------------------------------------- memory layouts of the inputs


def scattered(x: Tensor) -> Tensor:
    """Equal, in memory of other strides, among NaN (or the largest integers)."""
    fill = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    wide = torch.full(
        (*(2 * s + 1 for s in reversed(x.shape)),), fill, dtype=x.dtype, device=x.device
    )
    view = wide[(slice(1, None, 2),) * x.dim()].permute(*reversed(range(x.dim())))
    return view.copy_(x)


@each_problem
def test_inputs_of_any_strides(inputs: Inputs) -> None:
    wanted = run_small(inputs)
    with triton_cases.guarded(), using(SMALL_TILES):
        x = Inputs(*map(scattered, inputs))
        leaves = [t.requires_grad_() for t in x.leaves()]
        nll = plackett_luce(*x, impl="triton")
        actual = torch.autograd.grad(nll, leaves, upstream(len(nll)))
    assert torch.equal(nll, wanted.nll)
    assert all(map(torch.equal, actual, wanted.gradients()))


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("k", [5, 18])
def test_expanded_inputs(k: int, order: int) -> None:
    """One row of scores, one ranking, one length, one weight for all."""
    inputs = triton_cases.make_inputs(1, 20, k, order)
    n = 3
    expanded = inputs._replace(
        scores=inputs.scores.expand(n, 20),
        ranking=inputs.ranking.expand(n, k),
        lengths=inputs.lengths.expand(n),
        weights=torch.full((1,), 0.5, device=DEVICE).expand(k),
    )
    materialised = Inputs(*(x.contiguous() for x in expanded))
    with triton_cases.guarded(), using(SMALL_TILES):
        assert torch.equal(
            plackett_luce(*expanded, impl="triton"), plackett_luce(*materialised, impl="triton")
        )
        grad = torch.ones(1, device=DEVICE).expand(n)
        found = torch.ops.rankloss.plackett_luce_gradients(grad, *expanded, "triton")
    wanted = expected(materialised, torch.ones(n, device=DEVICE))
    triton_cases.assert_close(Results(*found), wanted, materialised)


# ---------------------------------------------------------------- order of programs, determinism


@each_problem
def test_results_repeat_bit_for_bit(inputs: Inputs) -> None:
    """With and without deterministic algorithms, with and without NaN in fresh buffers."""
    with using(SMALL_TILES):
        triton_cases.assert_identical(run(inputs), run_small(inputs))


@triton_cases.interpreted_only
@each_problem
def test_results_do_not_depend_on_the_order_of_programs(inputs: Inputs) -> None:
    with triton_cases.guarded(reverse=True), using(SMALL_TILES):
        backwards = run(inputs)
    triton_cases.assert_identical(backwards, run_small(inputs))


# ---------------------------------------------------------------- chunks of anchors


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("name", ["order 3", "order 3, completed", "order 3, natural"])
def test_gradients_of_tables_by_chunks(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = PROBLEMS[name]
    monkeypatch.setattr(high_order.Sizes, "chunk", lambda *_: chunk)
    with triton_cases.guarded(), using(SMALL_TILES):
        actual = run(inputs)
    triton_cases.assert_close(actual, expected(inputs), inputs)
    assert torch.equal(actual.d_scores, run_small(inputs).d_scores)


@pytest.mark.parametrize(("m", "k"), [(4, 4), (5, 2)], ids=["ranked walk", "natural walk"])
def test_half_precision_gradients_add_up_in_float32(
    m: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 equal anchors, one a chunk: 48 times one's gradient. Each rounding to half would show."""
    one = triton_cases.make_inputs(1, m, k, 2, dtype=torch.float16)
    rows = (x.expand(48, *x.shape[1:]) for x in one[:3])
    inputs = Inputs(*[*rows, *one[3:]])
    monkeypatch.setattr(high_order.Sizes, "chunk", lambda *_, **__: 1)
    op = torch.ops.rankloss.plackett_luce_gradients
    with using(SMALL_TILES):
        found = op(torch.ones(48, device=DEVICE), *inputs, "triton")[2:]
        wanted = op(torch.ones(1, device=DEVICE), *one, "triton")[2:]
    for many, single in zip(found, wanted, strict=True):
        assert many.dtype == torch.float32
        assert (many - 48 * single).norm() < 1e-6 * many.norm()  # a rounding is of 5e-4


def sizes(n: int, m: int, k: int) -> high_order.Sizes:
    shapes = (n, m), (n, k), (n,), (k,), (3, m, 32), (2, m, 32)
    x = Lists(*(torch.empty(shape, device="meta") for shape in shapes))
    return high_order.sizes_of(x, plan("sm_90", torch.bfloat16, 64, k))


def test_size_of_a_chunk() -> None:
    """Few chunks where buffers of 56 MiB do, else of 30, or 96 of many scores; equal in size."""

    def chunk(n: int, m: int, k: int, element: int = 2) -> int:
        return sizes(n, m, k).chunk(element, gradients=True)

    assert chunk(64, 512, 512) == 64
    assert chunk(512, 512, 512) == 256
    anchor = 4096 * 3 * 64 * 2  # C, whose memory dC takes over, Q and dQ
    assert chunk(128, 4096, 4096) * anchor <= 30 << 20
    assert 30 << 20 < chunk(4096, 4096, 4096) * anchor <= 96 << 20
    assert chunk(3, 1 << 20, 1 << 20) == 1


def test_short_rankings_copy_the_keys_of_ranked_candidates_only() -> None:
    """Below half of the candidates; from there on a list holds all, and there is no rest."""
    found = {k: sizes(4, 1024, k) for k in (1024, 512, 511, 16)}
    assert {k: x.listed for k, x in found.items()} == {1024: 1024, 512: 1024, 511: 511, 16: 16}
    assert {k: x.rest for k, x in found.items()} == {1024: 0, 512: 0, 511: 1024, 16: 1024}


# ---------------------------------------------------------------- the checks themselves


@triton_cases.interpreted_only
def test_the_sanitizer_watches_the_kernels() -> None:
    """A tensor that is too short is caught, so the silence of the other tests means much."""
    inputs = PROBLEMS["order 3"]
    short = inputs._replace(weights=inputs.weights[:-1])
    tensors = [x.contiguous() for x in short]
    with sanitize(), using(SMALL_TILES), pytest.raises(Exception, match="out of bounds: load") as e:
        torch.ops.rankloss.plackett_luce(*tensors, "triton")
    assert KernelFault.__name__ in repr(e.value)


@triton_cases.interpreted_only
@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_products_are_exact(name: str) -> None:
    """The table multiplies float32 as three products of parts."""
    with triton_cases.guarded() as report:
        run(PROBLEMS[name])
    assert report.dot_precisions <= {"tf32x3"}
    assert report.dot_precisions or name.startswith("order 1")

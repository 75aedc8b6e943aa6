"""The op as PyTorch sees it: registration, tracing, compilation, transforms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rankloss import Transitions, plackett_luce_nll
from tests.helpers.problems import (
    Problem,
    arguments,
    each_case,
    each_implementation,
    each_streaming,
    make_problem,
)
from tests.properties import nll, value_and_gradients

# ---------------------------------------------------------------- registration


@each_streaming
@each_case
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout: str, p: Problem, impl: str) -> None:
    ops = torch.ops.rankloss
    args = arguments(p)
    if layout == "transposed":
        args = (args[0].T.contiguous().T, args[1].T.contiguous().T, *args[2:])
    torch.library.opcheck(ops.plackett_luce.default, (*args, impl))
    _, *kept = ops.plackett_luce(*args, impl)
    grad = torch.linspace(0.5, 1.5, len(p.scores), dtype=p.scores.dtype)
    torch.library.opcheck(ops.plackett_luce_backward.default, (grad, *kept, *args, impl))


@each_implementation
@each_case
def test_meta_tensors(p: Problem, impl: str) -> None:
    real = value_and_gradients(p, impl)
    tables = p.transitions and Transitions(*(x.to("meta") for x in p.transitions))
    meta = p._replace(scores=p.scores.to("meta"), ranking=p.ranking.to("meta"), transitions=tables)
    fake = value_and_gradients(meta, impl, torch.ones(len(p.scores), device="meta"))
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@each_implementation
@each_case
def test_fake_tensors(p: Problem, impl: str) -> None:
    """validate=False: the values of a fake ranking cannot be checked."""
    with FakeTensorMode() as mode:
        scores, ranking, *tables = (
            mode.from_tensor(x) for x in (p.scores, p.ranking, *(p.transitions or ()))
        )
        scores.requires_grad_()
        loss = plackett_luce_nll(
            scores,
            ranking,
            Transitions(*tables) if tables else None,
            impl=impl,
            validate=False,
        )
        loss.backward()  # type: ignore[no-untyped-call]
    assert loss.shape == ()
    assert scores.grad is not None
    assert scores.grad.shape == p.scores.shape


# ---------------------------------------------------------------- torch.compile


def loss_of(p: Problem, impl: str) -> Callable[..., Tensor]:
    def loss(scores: Tensor, ranking: Tensor, *tables: Tensor) -> Tensor:
        return plackett_luce_nll(
            scores,
            ranking,
            Transitions(*tables) if tables else None,
            discount="log",
            mask=p.mask,
            impl=impl,
        )

    return loss


@each_implementation
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("k", [4, 9])
def test_compile(k: int, order: int, impl: str) -> None:
    """One graph, the same bits (the default backend may fuse, hence round, differently)."""
    p = make_problem(7, 5, 9, k, order, keep=0.8, dtype=torch.float32)
    loss = loss_of(p, impl)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for f in (loss, compiled):
        leaves = [x.detach().requires_grad_() for x in p.tensors()]
        value = f(leaves[0], p.ranking, *leaves[1:])
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_streaming
def test_compile_with_the_default_backend_and_growing_shapes(impl: str) -> None:
    """A second shape recompiles once, to a dynamic graph; a third one does not."""
    torch._dynamo.reset()
    compiles = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    loss = loss_of(make_problem(0, 1, 1, 1, 1), impl)
    compiled = torch.compile(loss, fullgraph=True, backend=compiles)
    for n in (4, 5, 6, 9):
        p = make_problem(n, n, 2 * n, n + 1, 3, dtype=torch.float32)
        leaf = p.scores.requires_grad_()
        args = (leaf, p.ranking, *p.tensors()[1:])
        (a,), (b,) = (torch.autograd.grad(f(*args), leaf) for f in (compiled, loss))
        torch.testing.assert_close(a, b)
    assert compiles.frame_count == 2


# ---------------------------------------------------------------- torch.func


@each_implementation
@pytest.mark.parametrize("order", [1, 3])
def test_func_grad(order: int, impl: str) -> None:
    p = make_problem(8, 3, 7, 5, order)
    loss = loss_of(p._replace(mask=None), impl)

    def positional(*leaves: Tensor) -> Tensor:
        return loss(leaves[0], p.ranking, *leaves[1:])

    p = p._replace(discount="log")
    expected = value_and_gradients(p, impl, torch.full((3,), 1 / 3, dtype=torch.float64))[1:]
    every = tuple(range(len(expected)))
    actual = torch.func.grad(positional, argnums=every)(*p.tensors())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@each_implementation
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("k", [3, 7])
def test_vmap_equals_a_loop(k: int, gradient: bool, impl: str) -> None:
    """Over scores, ranking and tables together, and over scores and ranking alone."""
    batch = [make_problem(seed, 3, 7, k, 3) for seed in range(4)]
    stacked = [
        torch.stack(x)
        for x in zip(*((p.scores, p.ranking, *(p.transitions or ())) for p in batch), strict=True)
    ]

    def loss(scores: Tensor, ranking: Tensor, predecessors: Tensor, keys: Tensor) -> Tensor:
        tables = Transitions(predecessors, keys)
        return plackett_luce_nll(scores, ranking, tables, impl=impl, validate=False)

    f: Any = torch.func.grad(loss, argnums=(0, 2, 3)) if gradient else loss
    for in_dims in ((0, 0, 0, 0), (0, 0, None, None)):
        shared = [x if d == 0 else x[0] for x, d in zip(stacked, in_dims, strict=True)]
        actual = torch.func.vmap(f, in_dims)(*shared)
        loop = [
            f(*(x[i] if d == 0 else x for x, d in zip(shared, in_dims, strict=True)))
            for i in range(4)
        ]
        if not gradient:
            actual, loop = (actual,), [(x,) for x in loop]
        for a, b in zip(actual, zip(*loop, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b))


@each_streaming
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("which", [0, 1, 2], ids=["scores", "predecessors", "keys"])
def test_forward_mode_is_refused_not_zero(which: int, impl: str) -> None:
    p = make_problem(9, 3, 7, 5, 2)
    leaves = p.tensors()

    def value(x: Tensor) -> Tensor:
        changed = [*leaves[:which], x, *leaves[which + 1 :]]
        return nll(p._replace(scores=changed[0], transitions=Transitions(*changed[1:])), impl)

    with pytest.raises(NotImplementedError, match=r"forward mode|jvp"):
        torch.func.jvp(value, (leaves[which],), (torch.ones_like(leaves[which]),))


@each_streaming
@pytest.mark.parametrize("order", [1, 3])
def test_double_backward_is_refused_with_the_remedy(order: int, impl: str) -> None:
    p = make_problem(10, 3, 7, 5, order)
    leaf = p.scores.requires_grad_()
    (gradient,) = torch.autograd.grad(nll(p, impl).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference'"):
        torch.autograd.grad(gradient.square().sum(), leaf)

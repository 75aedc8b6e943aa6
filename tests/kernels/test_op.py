"""The op as PyTorch sees it: registration, tracing, compilation, transforms."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import Transitions, plackett_luce_nll
from rankloss.kernels import plackett_luce
from rankloss.kernels.signature import Lists
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
    grad = torch.linspace(0.5, 1.5, len(p.scores), dtype=p.scores.dtype)
    torch.library.opcheck(ops.plackett_luce_gradients.default, (grad, *args, impl))


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
@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.hessian])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["scores", "predecessors", "keys"])
def test_forward_mode_and_hessians_name_the_remedy(which: int, transform: Any, impl: str) -> None:
    """Rather than a tangent of zero."""
    p = make_problem(9, 3, 7, 5, 2)
    leaves = p.tensors()

    def value(x: Tensor, *, total: bool) -> Tensor:
        changed = [*leaves[:which], x, *leaves[which + 1 :]]
        tables = Transitions(*changed[1:])
        q = p._replace(scores=changed[0], transitions=tables)
        return nll(q, impl).sum() if total else nll(q, impl)

    for total in (False, True):
        with pytest.raises(NotImplementedError, match="impl='reference'"):
            transform(lambda x, total=total: value(x, total=total).sum())(leaves[which])


@each_streaming
@pytest.mark.parametrize("order", [1, 3])
def test_double_backward_is_refused_with_the_remedy(order: int, impl: str) -> None:
    p = make_problem(10, 3, 7, 5, order)
    leaf = p.scores.requires_grad_()
    (gradient,) = torch.autograd.grad(nll(p, impl).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference'"):
        torch.autograd.grad(gradient.square().sum(), leaf)


# ---------------------------------------------------------------- sums weighted by anchor


def inputs_and_leaves(order: int) -> tuple[Lists, list[Tensor]]:
    scores, ranking, lengths, weights, *tables = arguments(make_problem(11, 4, 9, 7, order))
    leaves = [x.clone().requires_grad_() for x in (scores, *tables)]
    return Lists(leaves[0], ranking, lengths, weights, leaves[1], leaves[2]), leaves


@each_implementation
@pytest.mark.parametrize("order", [1, 3])
def test_a_weighted_sum_is_that_of_the_anchors(order: int, impl: str) -> None:
    """Value and gradients; twice, and at another scale, from one forward pass."""
    share = torch.tensor([0.5, -2.0, 0.0, 1.0], dtype=torch.float64)
    x, leaves = inputs_and_leaves(order)
    options: Any = {"allow_unused": True, "materialize_grads": True}
    expected = (plackett_luce(*x, impl="reference") * share).sum()
    wanted = torch.autograd.grad(expected, leaves, **options)
    total = plackett_luce(*x, impl=impl, anchor_weights=share)
    torch.testing.assert_close(total, expected)
    for factor in (1.0, 1.0, 3.0):
        found = torch.autograd.grad(factor * total, leaves, retain_graph=True, **options)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, factor * b)
    with torch.no_grad():
        torch.testing.assert_close(plackett_luce(*x, impl=impl, anchor_weights=share), expected)


@each_streaming
def test_a_weighted_sum_has_no_second_derivative(impl: str) -> None:
    x, leaves = inputs_and_leaves(3)
    total = plackett_luce(*x, impl=impl, anchor_weights=torch.ones(4))
    (gradient,) = torch.autograd.grad(total, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference'"):
        torch.autograd.grad(gradient.square().sum(), leaves[0])


@each_streaming
def test_a_weighted_sum_inside_vmap_inside_grad(impl: str) -> None:
    """Inputs of which none says that it needs a gradient."""
    x, _ = inputs_and_leaves(3)
    scores = x[0].detach().expand(2, *x[0].shape)

    def one(s: Tensor) -> Tensor:
        return plackett_luce(s, *x[1:4], x[4].detach(), x[5].detach(), impl, torch.ones(4))

    found = torch.func.grad(lambda s: torch.func.vmap(one)(s).sum())(scores)
    (wanted,) = torch.autograd.grad(plackett_luce(*x, impl="reference").sum(), x[0])
    torch.testing.assert_close(found, wanted.expand(2, *wanted.shape))


@each_implementation
def test_weights_have_no_gradient_in_any_implementation(impl: str) -> None:
    x, _ = inputs_and_leaves(3)
    weights, share = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (7, 4))
    nll = plackett_luce(*x[:3], weights, *x[4:], impl=impl)
    total = plackett_luce(*x[:3], weights, *x[4:], impl=impl, anchor_weights=share)
    for value in (nll.sum(), total):
        found = torch.autograd.grad(value, [weights, share], allow_unused=True)
        assert all(x is None for x in found)


# ---------------------------------------------------------------- what PyTorch forbids on a GPU


class NoFloatCumsum(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """As under use_deterministic_algorithms on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("cumsum", "cumprod") or not args[0].is_floating_point(), name
        return func(*args, **(kwargs or {}))


@each_streaming
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("k", [3, 7])
def test_nothing_that_cuda_cannot_repeat(k: int, order: int, impl: str) -> None:
    p = make_problem(12, 3, 7, k, order, keep=0.7, discount="log")
    with NoFloatCumsum():  # type: ignore[no-untyped-call]
        value_and_gradients(p, impl)


FIRST_CALLS = """
import os, sys, torch
from rankloss.kernels import plackett_luce
from rankloss.kernels.signature import Lists
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

x = (torch.zeros(2, 4), torch.arange(4).expand(2, 4), torch.tensor([4, 3]), torch.ones(4),
     torch.ones(3, 4, 8), torch.ones(2, 4, 8))

def loss(scores):
    total = plackett_luce(scores, *x[1:], "auto", torch.ones(2))
    return plackett_luce(scores, *x[1:]).sum() + total

class Module(torch.nn.Module):
    def forward(self, scores, ranking, lengths, weights, predecessors, keys):
        return plackett_luce(scores, ranking, lengths, weights, predecessors, keys)

def vmap():
    assert torch.func.vmap(torch.func.grad(loss))(x[0].expand(3, 2, 4)).shape == (3, 2, 4)

def fake():
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(t) for t in x]
        assert plackett_luce(*given).shape == (2,)

def export():
    program = torch.export.export(Module(), x)
    torch.testing.assert_close(program.module()(*x), plackett_luce(*x))

for first in (vmap, fake, export):
    child = os.fork()
    if not child:
        first()
        sys.stdout.write(first.__name__ + " ")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_the_first_call_of_a_process_may_be_traced() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["vmap", "fake", "export"], done.stderr

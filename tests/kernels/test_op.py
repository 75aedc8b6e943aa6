"""The op as PyTorch sees it: registration, compilation, sums weighted by anchor."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

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

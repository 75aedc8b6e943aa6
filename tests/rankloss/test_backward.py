"""Backward passes: odd upstream gradients, shared inputs, products that nobody wants."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import HighOrderPLLoss, Transitions
from rankloss.scores import scaled_cosines
from tests.helpers.features import features
from tests.helpers.problems import each_implementation, make_problem
from tests.helpers.recorder import inside_ops
from tests.properties import nll, value_and_gradients


@each_implementation
@pytest.mark.parametrize("order", [1, 3])
def test_any_upstream_gradient(order: int, impl: str) -> None:
    p = make_problem(11, 6, 7, 5, order)
    wide = torch.randn(6, 4, dtype=torch.float64)
    odd = {
        "strided": wide[:, 1],
        "expanded": torch.tensor(0.7, dtype=torch.float64).expand(6),
        "offset": torch.randn(9, dtype=torch.float64)[3:],
        "slice of a cat": torch.cat([wide[0], wide[1]])[1:7],
    }
    for up in odd.values():
        plain = value_and_gradients(p, impl, up.clone().contiguous())
        for a, b in zip(value_and_gradients(p, impl, up), plain, strict=True):
            assert torch.equal(a, b)
    leaf = p.scores.requires_grad_()
    (summed,) = torch.autograd.grad(nll(p, impl).sum(), leaf)  # an expanded 1
    torch.testing.assert_close(summed, value_and_gradients(p, impl, torch.ones(6))[1])


@each_implementation
@pytest.mark.parametrize("order", [1, 3])
def test_expanded_scores(order: int, impl: str) -> None:
    """One row of scores, many rankings; its gradient is the sum over the rows."""
    p = make_problem(12, 5, 7, 6, order)
    row = p.scores[:1].clone().requires_grad_()
    value = nll(p._replace(scores=row.expand(5, 7)), impl)
    (actual,) = torch.autograd.grad(value.sum(), row)
    same = p._replace(scores=p.scores[:1].repeat(5, 1))
    expected = value_and_gradients(same, impl, torch.ones(5))[1].sum(0, keepdim=True)
    torch.testing.assert_close(actual, expected)


@each_implementation
def test_only_what_needs_a_gradient_gets_one(impl: str) -> None:
    p = make_problem(14, 4, 6, 5, 3)
    expected = value_and_gradients(p, impl)[1:]
    for which in range(3):
        leaves = [x.detach().requires_grad_(i == which) for i, x in enumerate(p.tensors())]
        value = nll(p._replace(scores=leaves[0], transitions=Transitions(*leaves[1:])), impl)
        value.backward(torch.linspace(0.5, 1.5, 4, dtype=torch.float64))  # type: ignore[no-untyped-call]
        for i, (x, g) in enumerate(zip(leaves, expected, strict=True)):
            if i == which:
                torch.testing.assert_close(x.grad, g)
            else:
                assert x.grad is None


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("wanted", ["anchors", "candidates"])
def test_only_the_wanted_product_is_computed(wanted: str) -> None:
    """A frozen tower costs no matrix product in the backward pass."""
    anchors, candidates = torch.randn(4, 3), torch.randn(5, 3)
    leaf = (anchors if wanted == "anchors" else candidates).requires_grad_()
    scores = scaled_cosines(anchors, candidates, torch.tensor(2.0))
    with torch.profiler.profile() as profile:
        torch.autograd.backward(scores.sum())
    products = [x for x in profile.events() if x.name == "aten::mm"]
    assert len(products) == 1
    other = candidates if wanted == "anchors" else anchors
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * other.sum(0).expand_as(leaf))


FORBIDDEN = ("cumsum", "cumsum_", "put_", "histc", "bincount", "kthvalue", "median", "index_copy")


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("discount", "top_k"), [("none", None), ("log", None), ("log", 3)])
def test_nothing_that_deterministic_algorithms_refuse(
    discount: Any, top_k: int | None, order: int
) -> None:
    """Those that torch.use_deterministic_algorithms(True) refuses on CUDA, here where they run."""
    image, text = features(9, dtype=torch.float32)
    loss = HighOrderPLLoss(8, order, discount=discount, top_k=top_k, exclude_self=True)
    with inside_ops(), Operations() as operations, torch.autograd.set_multithreading_enabled(False):
        loss(image, text, 14.3, image_ids=torch.arange(9) // 2).backward()
    assert "mm" in operations.names
    assert not operations.names & set(FORBIDDEN)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operations with a floating result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.names.add(func.name().split("::")[1].split(".")[0])
        return result

"""Backward passes: repeated, odd upstream gradients, odd layouts, inputs left alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import HighOrderPLLoss, Transitions
from rankloss.scores import scaled_cosines
from tests.helpers.features import features
from tests.helpers.problems import Problem, each_case, each_implementation, make_problem
from tests.helpers.recorder import inside_ops
from tests.properties import nll, value_and_gradients


@each_implementation
@each_case
def test_repeated_backward(p: Problem, impl: str) -> None:
    """Two different retained backwards do not disturb each other, nor do they scale each other."""
    leaves = [x.detach().requires_grad_() for x in p.tensors()]
    tables = Transitions(*leaves[1:]) if p.transitions else None
    value = nll(p._replace(scores=leaves[0], transitions=tables), impl)
    ups = [torch.randn_like(value) for _ in range(2)]
    first, second, again = (
        torch.autograd.grad(value, leaves, up, retain_graph=True) for up in (*ups, ups[0])
    )
    tripled = torch.autograd.grad(3 * value, leaves, ups[0])
    for a, b, c, d in zip(first, second, again, tripled, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(d, 3 * a)
        assert a.numel() == 0 or len(p.scores) == 0 or not torch.equal(a, b)
    for up, gradients in zip(ups, (first, second), strict=True):
        for a, b in zip(gradients, value_and_gradients(p, impl, up)[1:], strict=True):
            assert torch.equal(a, b)


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
@each_case
def test_non_contiguous_inputs(p: Problem, impl: str) -> None:
    def scattered(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 1]

    tables = p.transitions and Transitions(*(scattered(x) for x in p.transitions))
    odd = p._replace(scores=scattered(p.scores), ranking=scattered(p.ranking), transitions=tables)
    assert len(p.scores) < 2 or not odd.scores.is_contiguous()
    for a, b in zip(value_and_gradients(odd, impl), value_and_gradients(p, impl), strict=True):
        torch.testing.assert_close(a, b)


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
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("order", [1, 3])
def test_inputs_are_unchanged(order: int, masked: bool, impl: str) -> None:
    p = make_problem(13, 5, 7, 4, order, keep=0.7 if masked else 1.0)
    everything = [x for x in (*p.tensors(), p.ranking, p.mask) if x is not None]
    before = [x.clone() for x in everything]
    for x in p.tensors():
        x.requires_grad_()
    value = nll(p, impl)
    up = torch.ones_like(value)
    value.backward(up)  # type: ignore[no-untyped-call]
    assert [x._version for x in (*everything, up)] == [0] * (len(everything) + 1)
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


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
    with torch.no_grad():
        assert not nll(p, impl).requires_grad
    with torch.inference_mode():
        assert torch.equal(nll(p, impl), nll(p.to(torch.float64), impl))


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
@pytest.mark.parametrize("discount", ["none", "log"])
def test_nothing_that_deterministic_algorithms_refuse(discount: Any, order: int) -> None:
    """Those that torch.use_deterministic_algorithms(True) refuses on CUDA, here where they run."""
    image, text = features(9, dtype=torch.float32)
    loss = HighOrderPLLoss(8, order, discount=discount, exclude_self=True)
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

"""The losses under autocast and torch.compile, in mixed dtypes, at scales of any form."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloss import (
    ClipLoss,
    HighOrderPLLoss,
    plackett_luce_nll,
)
from tests.helpers.features import LOSSES, each_loss, features, randomize
from tests.helpers.problems import each_implementation, make_problem

HALF = [torch.bfloat16, torch.float16]


def value_and_gradients(
    loss: Callable[..., Tensor],
    module: HighOrderPLLoss,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    **ids: Tensor,
) -> list[Tensor]:
    """Value, then gradients to image, text, scale and the loss's parameters.

    As PyTorch recommends, the backward pass runs outside autocast.
    """
    image, text = features(9, dtype=dtype)
    scale = torch.tensor(20.0, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        value = loss(image, text, scale, **ids)
    leaves = [image, text, scale, *module.parameters()]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_equal_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert [x.dtype for x in a] == [x.dtype for x in b]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("autocast", HALF, ids=str)
def test_autocast_is_explicit_casting_of_features_and_heads(autocast: torch.dtype) -> None:
    loss = LOSSES["order 3"]()
    cast = value_and_gradients(loss, loss, autocast, autocast)
    half = copy.deepcopy(loss).to(autocast)
    explicit = value_and_gradients(half, half, autocast)
    assert_equal_bits([cast[0], cast[3]], [explicit[0], explicit[3]])  # loss, and to the scale
    for a, b in zip(cast[1:], explicit[1:], strict=True):  # sums of rounded gradients
        tolerance = torch.finfo(autocast).eps * float(b.abs().max())
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=2 * tolerance)


# ---------------------------------------------------------------- torch.compile


@each_loss
@pytest.mark.parametrize("autocast", [None, *HALF], ids=str)
def test_compiled_values_and_gradients_are_eager(
    autocast: torch.dtype | None, make: Callable[[], HighOrderPLLoss]
) -> None:
    """One graph, and its operations give the same bits; statistics come out too."""
    torch._dynamo.reset()
    loss = make()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for given in ({}, {"text_ids": torch.arange(9) // 2}):
        results = []
        for f in (loss, compiled):
            found = value_and_gradients(f, loss, torch.float32, autocast, **given)
            results.append([*found, *loss.last_stats.values()])
        assert_equal_bits(*results)


def test_compiled_by_the_default_backend() -> None:
    loss = LOSSES["order 3"]()
    compiled = torch.compile(loss, fullgraph=True)
    results = [value_and_gradients(f, loss, torch.float32) for f in (compiled, loss)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


# ---------------------------------------------------------------- dtypes and scales


@pytest.mark.parametrize("features_in", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads_in", [*HALF, torch.float32, torch.float64], ids=str)
@each_implementation
def test_features_and_heads_of_any_dtype(
    impl: str, heads_in: torch.dtype, features_in: torch.dtype
) -> None:
    """Close to float64 on the same rounded inputs; each gradient in the dtype of its input."""
    loss = randomize(HighOrderPLLoss(8, 3, transition_dim=4, impl=impl)).to(heads_in)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(0.5)
    actual = value_and_gradients(loss, loss, features_in)
    wide = torch.promote_types(torch.promote_types(heads_in, features_in), torch.float32)
    assert actual[0].dtype == wide
    assert [x.dtype for x in actual[1:]] == [features_in] * 2 + [torch.float32] + [heads_in] * 2

    exact = copy.deepcopy(loss).double()
    image, text = (x.detach().double().requires_grad_() for x in features(9, dtype=features_in))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    value = exact(image, text, scale)
    expected = torch.autograd.grad(value, [image, text, scale, *exact.parameters()])
    # the tables are held in the wider dtype of features and heads, gradients in their own
    eps = max(torch.finfo(x).eps for x in (features_in, heads_in))
    for a, b in zip(actual, [value.detach(), *expected], strict=True):
        size = float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=max(4 * eps, 1e-5) * size)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_scales_of_every_form(dtype: torch.dtype, make: Callable[[], HighOrderPLLoss]) -> None:
    """0-D, (1,) and float; the gradient has the shape and dtype of what was given."""
    loss = make()
    image, text = features(9, dtype=torch.float32)
    forms: list[Any] = [
        torch.tensor(16.0, dtype=dtype),
        torch.tensor([16.0], dtype=dtype),
        16.0,
        16,
    ]
    values, gradients = [], []
    for scale in forms:
        for bias in (None, -2.0, torch.tensor(-2.0), torch.tensor([-2.0], dtype=dtype)):
            if isinstance(scale, Tensor):
                scale = scale.detach().requires_grad_()
            value = loss(image, text, scale, bias)
            assert value.shape == ()
            values.append(value.item())
            if isinstance(scale, Tensor):
                (g,) = torch.autograd.grad(value, scale)
                assert (g.shape, g.dtype) == (scale.shape, dtype)
                gradients.append(g.item())
    without_bias, with_bias = values[::4], values[1::4] + values[2::4] + values[3::4]
    assert len(set(without_bias)) == len(set(gradients[::4])) == 1
    torch.testing.assert_close(with_bias, [without_bias[0]] * len(with_bias))


def test_a_float_scale_keeps_its_digits_in_float64() -> None:
    image, text = features(9)
    exact = ClipLoss()(image, text, torch.tensor(14.3, dtype=torch.float64))
    torch.testing.assert_close(ClipLoss()(image, text, 14.3), exact, rtol=1e-12, atol=0)


@each_implementation
def test_tables_in_float64_make_everything_float64(impl: str) -> None:
    p = make_problem(0, 5, 9, 7, 3, discount="log")
    scores = p.scores.float()
    mixed = plackett_luce_nll(scores, p.ranking, p.transitions, discount="log", impl=impl)
    exact = plackett_luce_nll(scores.double(), p.ranking, p.transitions, discount="log", impl=impl)
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, exact, rtol=1e-12, atol=0)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_scale_100_is_finite(order: int, dtype: torch.dtype, impl: str) -> None:
    loss = HighOrderPLLoss(8, order, transition_dim=4, impl=impl)
    randomize(loss)
    for sign in (1, -1):  # matches at +100 or at -100
        image, _ = features(40, dtype=dtype)
        scale = torch.tensor(100.0, requires_grad=True)
        value = loss(image, sign * image.detach(), scale)
        leaves = [image, scale, *loss.parameters()]
        for x in (value, *torch.autograd.grad(value, leaves)):
            assert x.isfinite().all()

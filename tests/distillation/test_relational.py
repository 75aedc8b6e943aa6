"""RelationalDistanceLoss and RelationalAngleLoss: definition, invariances, degenerate batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import KoLeoLoss, RelationalAngleLoss, RelationalDistanceLoss
from tests.helpers.distillation_loops import (
    gradient,
    permutations,
    random_features,
    relational_angle,
    relational_distance,
    value_and_gradient,
)
from tests.helpers.recorder import Recorder

Loops = Callable[[Tensor, Tensor], Tensor]
LOSSES = {
    "distance": (RelationalDistanceLoss, relational_distance),
    "angle": (RelationalAngleLoss, relational_angle),
}
each_loss = pytest.mark.parametrize(("make", "loops"), LOSSES.values(), ids=LOSSES.keys())
each_make = pytest.mark.parametrize(
    "make", [RelationalDistanceLoss, RelationalAngleLoss], ids=LOSSES.keys()
)


def assert_equals_loops(
    loss: nn.Module, loops: Loops, student: Tensor, teacher: Tensor, tolerance: float = 1e-10
) -> None:
    value, d_student = value_and_gradient(loss, student, teacher)
    leaf = student.detach().requires_grad_()
    expected = loops(leaf, teacher)
    torch.testing.assert_close(value, expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(d_student, gradient(expected, leaf), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- definition


@each_loss
@settings(max_examples=25)
@given(data=st.data())
def test_equals_the_loops(make: Callable[[], nn.Module], loops: Loops, data: st.DataObject) -> None:
    n, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2**31))
    scale = data.draw(st.sampled_from([0.1, 1.0, 30.0]))  # differences in both parts of smooth L1
    student = random_features(n, data.draw(st.integers(1, 4)), seed=seed) * scale
    teacher = random_features(n, data.draw(st.integers(1, 4)), seed=seed + 1)
    assert_equals_loops(make(), loops, student, teacher)


@each_loss
def test_duplicates_equal_the_loops(make: Callable[[], nn.Module], loops: Loops) -> None:
    """Exact in float64 on a grid of small integers; one pair coincides for both."""
    student = random_features(5, 3).mul(3).round()
    teacher = random_features(5, 3, seed=1).mul(3).round()
    student[1], teacher[1] = student[0], teacher[0]
    student[3] = student[2]
    # coinciding samples are 1e-6 apart where rounding decides whether they are 0 apart
    assert_equals_loops(make(), loops, student, teacher, 1e-6)


@each_make
def test_both_parts_of_smooth_l1(make: Callable[[], nn.Module]) -> None:
    """Another sample lies between the other two, which a squared difference would overrate."""
    student = torch.tensor([[0.0], [0.1], [9.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [9.0], [5.0]], dtype=torch.float64)
    value = make()(student, teacher)
    angle = 4 * 1.5 / 27
    distance = 2 * (89 / 60 - 0.5 + (2 / 3) ** 2 / 2 + (49 / 60) ** 2 / 2) / 9
    expected = angle if make is RelationalAngleLoss else distance
    assert float(value) == pytest.approx(expected)


@each_make
def test_gradcheck(make: Callable[[], nn.Module]) -> None:
    student = random_features(5, 3).requires_grad_()
    teacher = random_features(5, 4, seed=1)
    loss = make()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, teacher), student)


# ---------------------------------------------------------------- invariances


@each_make
def test_invariances(make: Callable[[], nn.Module]) -> None:
    loss = make()
    student, teacher = random_features(6, 4), random_features(6, 5, seed=1)
    value, d_student = value_and_gradient(loss, student, teacher)
    rotation = torch.linalg.qr(random_features(4, 4, seed=2)).Q
    order = permutations(1, 6)[0]
    for s, t in [
        (student * 7.5, teacher),
        (student, teacher * 0.02),
        (student + 3, teacher),
        (student, teacher - 2),
        (student @ rotation, teacher),
        (student[order], teacher[order]),
    ]:
        torch.testing.assert_close(loss(s, t), value)
    assert abs(loss(student[order], teacher) - value) > 1e-4
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(d_student.sum(0), zero, rtol=0, atol=1e-14)  # of translation
    assert (d_student * student).sum().abs() < 1e-14  # of scale
    assert loss(student, 3 * student @ rotation + 1) < 1e-28


# ---------------------------------------------------------------- degenerate batches

x = random_features(6, 4)
DEGENERATE: dict[str, Callable[[], Tensor]] = {
    "one sample": lambda: x[:1],
    "two samples": lambda: x[:2],
    "three samples": lambda: x[:3],
    "two that coincide": lambda: x[[0, 0]],
    "three that coincide": lambda: x[[0, 0, 0]],
    "duplicates": lambda: x[[0, 1, 0, 2, 1, 0]],
    "collapse": lambda: x[[3] * 6],
    "collapse to zero": lambda: torch.zeros_like(x),
    "on a line": lambda: torch.arange(6.0)[:, None] * x[:1],
    "nearly collapsed": lambda: x[[3] * 6] + 1e-6 * x,
    "far away": lambda: x + 1e4,
    "tiny": lambda: 1e-4 * x,
}


@each_make
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("which", DEGENERATE)
def test_degenerate_batches_are_finite(
    which: str, side: str, dtype: torch.dtype, make: Callable[[], nn.Module]
) -> None:
    odd = DEGENERATE[which]().to(dtype)
    other = random_features(len(odd), 5, seed=9, dtype=dtype)
    student, teacher = (odd if side in (s, "both") else other for s in ("student", "teacher"))
    value, d_student = value_and_gradient(make(), student, teacher)
    assert value.isfinite()
    assert d_student.isfinite().all()
    assert value >= 0
    if side == "both":
        assert value < 1e-12
    if len(odd) == 1 or (side == "student" and which.startswith("collapse")):
        assert d_student.abs().max() == 0


@each_make
def test_no_samples(make: Callable[[], nn.Module]) -> None:
    student = torch.zeros(0, 3, requires_grad=True)
    value = make()(student, torch.zeros(0, 5))
    assert value == 0
    assert gradient(value, student).shape == (0, 3)


@each_make
def test_float32_far_from_the_origin(make: Callable[[], nn.Module]) -> None:
    """Features share a large mean, as those of real encoders do; distances do not."""
    student, teacher = random_features(8, 16), random_features(8, 16, seed=1)
    student, teacher = ((x + 100).float() for x in (student, teacher))
    exact = value_and_gradient(make(), student.double(), teacher.double())
    actual = value_and_gradient(make(), student, teacher)
    for a, b in zip(actual, exact, strict=True):
        assert (a - b).abs().max() <= 3e-6 * b.abs().max()


@each_make
@pytest.mark.parametrize("apart", [1e-2, 4.4e-4, 1e-5])
def test_near_pairs_keep_their_digits(make: Callable[[], nn.Module], apart: float) -> None:
    """Samples 4.4e-4 apart: the expansion |a|^2 + |b|^2 - 2ab in float32 keeps none."""
    student, teacher = random_features(6, 512), random_features(6, 512, seed=1)
    student = torch.nn.functional.normalize(student, dim=1)
    step = torch.nn.functional.normalize(random_features(3, 512, seed=2), dim=1)
    student[3:] = student[:3] + apart * step
    student, teacher = student.float(), teacher.float()
    exact = value_and_gradient(make(), student.double(), teacher.double())
    for a, b in zip(value_and_gradient(make(), student, teacher), exact, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.dtypes |= {x.dtype for x in args}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [RelationalDistanceLoss, RelationalAngleLoss, KoLeoLoss])
def test_no_tf32_setting_reaches_a_product(make: Callable[[], nn.Module]) -> None:
    """Forward and backward: such settings change float32 products only."""
    student = random_features(6, 8, dtype=torch.float32).requires_grad_()
    teacher = [] if make is KoLeoLoss else [random_features(6, 4, seed=1, dtype=torch.float32)]
    with Products() as products:
        torch.autograd.backward(make()(student, *teacher))
    assert products.dtypes == {torch.float64}


# ---------------------------------------------------------------- angles: a subset of samples


def test_samples_within_memory() -> None:
    """The most samples whose differences and cosines fit."""
    for max_bytes in (1, 4 * (5 + 2), 10_000, 123_456, 1 << 28):
        for widths in (2, 64, 1536):
            n = RelationalAngleLoss(max_bytes).samples_within_memory(widths)
            floats = [k * k * widths + 2 * k**3 for k in (n, n + 1)]
            assert n == 1 or 4 * floats[0] <= max_bytes
            assert 4 * floats[1] > max_bytes


def test_angles_beyond_memory_use_some_samples_with_all_their_triples() -> None:
    student, teacher = random_features(12, 3), random_features(12, 5, seed=1)
    loss = RelationalAngleLoss(max_bytes=4 * (5**2 * 8 + 2 * 5**3))
    chosen = torch.randperm(12, generator=torch.Generator().manual_seed(3))[:5]
    generator = torch.Generator().manual_seed(3)
    leaf = student.requires_grad_()
    value = loss(leaf, teacher, generator=generator)
    assert value == RelationalAngleLoss()(student[chosen], teacher[chosen])
    d_student = gradient(value, leaf)
    assert sorted(d_student.abs().sum(1).nonzero().flatten().tolist()) == sorted(chosen.tolist())
    assert loss(student, teacher, generator=generator) != value  # drawn on
    assert loss(student, teacher, generator=torch.Generator().manual_seed(3)) == value


def test_angles_within_memory_draw_nothing() -> None:
    student, teacher = random_features(5, 3), random_features(5, 5, seed=1)
    loss = RelationalAngleLoss(max_bytes=4 * (5**2 * 8 + 2 * 5**3))
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert loss(student, teacher, generator) == RelationalAngleLoss()(student, teacher)
    assert torch.equal(generator.get_state(), before)


def test_no_tensor_of_the_angles_exceeds_the_memory() -> None:
    student = torch.randn(200, 8, requires_grad=True)
    loss = RelationalAngleLoss(max_bytes=100_000)
    with Recorder() as recorder:
        value = loss(student, torch.randn(200, 16))
        torch.autograd.grad(value, student)
    assert 4 * recorder.largest <= 100_000 / 2
    with Recorder() as unbounded:
        RelationalAngleLoss()(student, torch.randn(200, 16))
    assert unbounded.largest >= 200**3

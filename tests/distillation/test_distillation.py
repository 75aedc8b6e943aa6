"""Half-precision teachers, rounding, resizing and errors of the distillation losses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloss import (
    GramAnchor,
    GramLoss,
    KoLeoLoss,
    RelationalAngleLoss,
    RelationalDistanceLoss,
)
from rankloss.distillation import resize_features
from tests.helpers.distillation_loops import random_features, value_and_gradient

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "gram": GramLoss,
    "gram, batch, clamped": lambda: GramLoss("batch", "clamp"),
    "gram, teacher clamped": lambda: GramLoss(negatives="clamp_teacher"),
    "gram, reference": lambda: GramLoss(impl="reference"),
    "distance": RelationalDistanceLoss,
    "angle": RelationalAngleLoss,
}
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())


def inputs(loss: nn.Module) -> list[Tensor]:
    """Student and teacher."""
    shape = (2, 6) if isinstance(loss, GramLoss) else (6,)
    widths = ((5, 0), (7, 1000))
    return [random_features(*shape, d, seed=seed, dtype=torch.float32) for d, seed in widths]


# ---------------------------------------------------------------- precision


@each_loss
def test_a_float64_teacher_decides(make: Callable[[], nn.Module]) -> None:
    loss = make()
    student, teacher = inputs(loss)
    value, d_student = value_and_gradient(loss, student, teacher.double())
    exact, d_exact = value_and_gradient(loss, student.double(), teacher.double())
    assert value.dtype == torch.float64
    assert d_student.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_student, d_exact.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["blocked", "reference"])
@pytest.mark.parametrize("negatives", ["keep", "clamp", "clamp_teacher"])
def test_rounding(negatives: Any, impl: str) -> None:
    """Against float64 on the same numbers, the error of a plain float32 computation at most
    doubles; and both are a few roundings of a cosine."""
    eps = torch.finfo(torch.float32).eps
    for seed in range(20):
        student, teacher = (
            random_features(3, 40, width, seed=seed + width, dtype=torch.float32)
            for width in (16, 24)
        )
        if seed % 2:  # a distilled student: differences are small
            student, teacher = teacher + 1e-3 * random_features(3, 40, 24).float(), teacher
        exact = value_and_gradient(
            GramLoss(negatives=negatives, impl="reference"), student.double(), teacher.double()
        )
        actual = value_and_gradient(GramLoss(negatives=negatives, impl=impl), student, teacher)
        size = float(exact[0].sqrt())  # of a difference of cosines, each off by a few eps
        assert abs(float(actual[0] - exact[0])) <= 4 * eps * size * (1 + size)
        error = (actual[1] - exact[1]).norm() / exact[1].norm()
        assert error <= 8 * eps * (1 + 1 / size), f"{error:.1e}, differences of {size:.1e}"


# ---------------------------------------------------------------- teachers


def test_resized_teachers_never_get_gradient() -> None:
    student, teacher = random_features(1, 4, 3), random_features(1, 16, 3, seed=1)
    student.requires_grad_()
    teacher.requires_grad_()
    GramLoss()(student, teacher, student_grid=(2, 2), teacher_grid=(4, 4)).backward()
    assert teacher.grad is None
    assert student.grad is not None


@each_loss
def test_a_student_may_be_its_own_teacher(make: Callable[[], nn.Module]) -> None:
    loss = make()
    student, _ = inputs(loss)
    value, d_student = value_and_gradient(lambda x: loss(x, x), student)
    if "clamp_teacher" in repr(loss):
        return  # the student's positive part differs from all of it
    assert value < 1e-12
    assert d_student.abs().max() < 1e-6


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("level", ["image", "batch"])
def test_compile_with_mask_and_grids(level: Any) -> None:
    student, teacher = random_features(2, 6, 4), random_features(2, 24, 5, seed=1)
    mask = torch.arange(12).reshape(2, 6) % 3 != 0
    loss = GramLoss(level)

    def f(x: Tensor) -> Tensor:
        value: Tensor = loss(x, teacher, mask, student_grid=(2, 3), teacher_grid=(4, 6))
        return value

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        value_and_gradient(compiled, student), value_and_gradient(f, student), strict=True
    ):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- errors

one, two = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
rows = torch.ones(3, 4)
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: GramLoss("token"),  # type: ignore[arg-type]
        ValueError,
        r"unknown level 'token'; choose one of \['image', 'batch'\]",
    ),
    (
        lambda: GramLoss(negatives="drop"),  # type: ignore[arg-type]
        ValueError,
        "unknown negatives 'drop'; choose one of",
    ),
    (lambda: GramLoss(max_tokens=0), ValueError, "max_tokens must be at least 1, got 0"),
    (lambda: GramLoss(impl="fast")(one, one), ValueError, "unknown impl 'fast'"),
    (
        lambda: GramLoss()(one, two),
        ValueError,
        r"got \(2, 3, 4\) and \(2, 5, 4\); give student_grid and teacher_grid to resize",
    ),
    (lambda: GramLoss()(rows, rows), ValueError, r"must be \(B, P, D\).*\(3, 4\) and \(3, 4\)"),
    (
        lambda: GramLoss()(one, two, student_grid=(1, 3)),
        ValueError,
        "give both student_grid and teacher_grid, or neither",
    ),
    (
        lambda: GramLoss()(one, two, student_grid=(1, 3), teacher_grid=(2, 3)),
        ValueError,
        r"need \(B, 2 \* 3, D\) to fill a grid of \(2, 3\), got \(2, 5, 4\)",
    ),
    (
        lambda: GramLoss()(one, one[0], student_grid=(1, 3), teacher_grid=(1, 3)),
        ValueError,
        r"need \(B, 1 \* 3, D\).*got \(3, 4\)",
    ),
    (
        lambda: GramLoss()(one, two, student_grid=(2, 2), teacher_grid=(1, 5)),
        ValueError,
        r"got \(2, 3, 4\) and \(2, 4, 4\)",
    ),
    (lambda: GramLoss()(one, one.to("meta")), ValueError, "student is on cpu but teacher on meta"),
    (lambda: GramLoss()(one.int(), one), TypeError, "floating point, got torch.int32 and"),
    (lambda: GramLoss()(one, one, torch.ones(2, 3)), TypeError, "mask must be bool.*float32"),
    (
        lambda: GramLoss()(one, one, torch.ones(2, 5).bool()),
        ValueError,
        r"mask must be \(B, P\) = \(2, 3\) on cpu, got \(2, 5\) on cpu",
    ),
    (lambda: resize_features(one, (2, 2), (1, 1)), ValueError, r"to fill a grid of \(2, 2\)"),
    (
        lambda: RelationalDistanceLoss()(rows, rows[:2]),
        ValueError,
        r"RelationalDistanceLoss: .*must be \(B, D\), equal but for D; got \(3, 4\) and \(2, 4\)$",
    ),
    (lambda: RelationalDistanceLoss()(rows.long(), rows), TypeError, "torch.int64 and"),
    (lambda: RelationalAngleLoss()(one, one), ValueError, r"RelationalAngleLoss: .*\(B, D\)"),
    (lambda: RelationalAngleLoss(0), ValueError, "max_bytes must be positive, got 0"),
    (lambda: KoLeoLoss(0), ValueError, "top_k and group_size must be positive, got 0, None"),
    (lambda: KoLeoLoss(1, 0), ValueError, "must be positive, got 1, 0"),
    (
        lambda: KoLeoLoss(group_size=2, distributed=True),
        ValueError,
        "groups are within a process; leave distributed=False",
    ),
    (
        lambda: KoLeoLoss(process_group="dp"),  # type: ignore[arg-type]
        ValueError,
        "KoLeoLoss: process_group has no effect without distributed=True",
    ),
    (
        lambda: GramLoss("batch", process_group="dp"),  # type: ignore[arg-type]
        ValueError,
        "GramLoss: process_group has no effect without distributed=True",
    ),
    (lambda: GramLoss(distributed=True), ValueError, 'on one process; use level="batch"'),
    (lambda: KoLeoLoss()(one), ValueError, r"x must be \(B, D\), got \(2, 3, 4\)"),
    (lambda: KoLeoLoss()(rows.long()), TypeError, "floating point, got torch.int64"),
    (
        lambda: KoLeoLoss(group_size=2)(rows),
        ValueError,
        "3 samples are no multiple of group_size=2",
    ),
    (lambda: GramAnchor(nn.Linear(1, 1), -1, 1), ValueError, "got -1, 1 and None"),
    (lambda: GramAnchor(nn.Linear(1, 1), 0, 0), ValueError, "every >= 1.*got 0, 0 and None"),
    (lambda: GramAnchor(nn.Linear(1, 1), 0, 1, -1), ValueError, "got 0, 1 and -1"),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=[text for _, _, text in ERRORS])
def test_errors(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()

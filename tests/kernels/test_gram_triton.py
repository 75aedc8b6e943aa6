"""The Triton kernel of the Gram distance against float64, sanitised, with NaN in fresh buffers."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloss import GramLoss
from rankloss.kernels import configurations, gram, gram_distance
from rankloss.kernels.configurations import GramPlan
from rankloss.kernels.gram_distance import NEGATIVES
from tests.helpers.sanitizer import WHY_NOT, Report, sanitize
from tests.helpers.triton_cases import DEVICE, can_run, guarded, interpreted_only, reserve

pytestmark = can_run

SMALL = GramPlan(rows=16, inner=16, columns=16)
EPS = torch.finfo(torch.float32).eps
each_negatives = pytest.mark.parametrize("negatives", NEGATIVES)


@contextmanager
def using(config: GramPlan) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configurations, "GRAM", config)
        yield


def features(b: int, p: int, ds: int, dt: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = (torch.randn(b, p, d, generator=generator) for d in (ds, dt))
    student, teacher = (x.to(DEVICE) for x in pair)
    return student, teacher


def value_and_gradient(
    student: Tensor, teacher: Tensor, negatives: str, impl: str
) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = gram_distance(leaf, teacher, negatives, impl)
    upstream = torch.linspace(1.5, -0.5, len(value), dtype=value.dtype, device=value.device)
    (d_student,) = torch.autograd.grad(value, leaf, upstream)
    return value.detach(), d_student


def check(student: Tensor, teacher: Tensor, negatives: str, config: GramPlan) -> Report:
    """Values and gradients equal those of float64 up to a few roundings of cosines."""
    with guarded() as report, using(config):
        value, d_student = value_and_gradient(student, teacher, negatives, "triton")
    exact, d_exact = value_and_gradient(student.double(), teacher.double(), negatives, "reference")
    p = student.shape[1]
    assert value.dtype == d_student.dtype == torch.float32
    assert ((value - exact).abs() <= 8 * EPS * (exact + p * exact.sqrt()) + 1e-12).all()
    assert d_student.isfinite().all()
    assert (d_student - d_exact).norm() <= 8 * EPS * (d_exact.norm() + p)
    return report


SIZES = [  # b, p, ds, dt
    (1, 1, 1, 1),
    (2, 3, 5, 2),
    (1, 16, 16, 16),  # whole tiles
    (2, 17, 16, 33),  # a row, and columns, past a tile
    (2, 33, 20, 40),
    (3, 40, 50, 7),  # several blocks of the gradient's columns
]


@each_negatives
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_size(size: tuple[int, int, int, int], negatives: str) -> None:
    report = check(*features(*size), negatives, SMALL)
    if WHY_NOT is None:
        b, p, ds, _ = size
        assert report.programs == b * -(-p // 16) * (1 + -(-ds // 16))
        assert report.dot_precisions == {"tf32x3"}


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (32, 16), (64, 64)])
def test_oblong_and_large_tiles(rows: int, columns: int) -> None:
    check(*features(2, 70, 40, 90), "clamp_teacher", GramPlan(rows, columns, columns))


@each_negatives
def test_rows_of_an_image_that_is_too_large(
    negatives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then differences exist for 16 rows at a time; small images, two at a time."""
    monkeypatch.setattr(gram, "TILE", 40 * 16)
    check(*features(2, 40, 20, 6), negatives, SMALL)
    monkeypatch.setattr(gram, "TILE", 2 * 20 * 20)
    check(*features(3, 20, 20, 6), negatives, SMALL)


@interpreted_only
def test_counted_products_are_within_those_of_two_gram_matrices() -> None:
    """At most 1.2 times: half of both matrices, and one product for the gradient."""
    p, ds, dt = 8 * 16, 48, 64
    with guarded() as report, using(SMALL):
        value_and_gradient(*features(1, p, ds, dt), "keep", "triton")
    assert 0 < report.dot_flops <= 1.2 * 2 * p * p * (ds + dt)


@each_negatives
def test_configuration_of_the_table(negatives: str) -> None:
    check(*features(1, 70, 100, 30), negatives, configurations.GRAM)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    report = check(*features(*shape, 3, 5), "keep", SMALL)
    assert report.programs == 0


@each_negatives
def test_zero_rows_and_orthogonal_ones(negatives: str) -> None:
    """Similarities of exactly 0 keep their gradient, as in every implementation."""
    student, teacher = features(2, 20, 20, 6)
    student[0] = torch.eye(20)
    student[1, 3], teacher[1, 5] = 0.0, 0.0
    check(student, teacher, negatives, SMALL)
    with using(SMALL):
        _, d_student = value_and_gradient(student, teacher, negatives, "triton")
    assert d_student[1, 3].abs().max() == 0


@each_negatives
def test_equal_features_cost_nothing(negatives: str) -> None:
    """To the last bit: both Gram matrices are made by the same operations."""
    student, _ = features(2, 20, 20, 1)
    if negatives == "clamp_teacher":
        student = student.abs()  # the student's positive part is all of it
    with guarded(), using(SMALL):
        value, d_student = value_and_gradient(student, student, negatives, "triton")
    assert value.abs().max() == 0
    assert d_student.abs().max() == 0


@interpreted_only
@each_negatives
def test_programs_run_in_any_order(negatives: str) -> None:
    student, teacher = features(2, 37, 20, 40)
    results = []
    for reverse in (False, True):
        with guarded(reverse=reverse), using(SMALL):
            results.append(value_and_gradient(student, teacher, negatives, "triton"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_negatives
def test_any_layout(negatives: str) -> None:
    student, teacher = features(2, 20, 18, 5)
    strided = student.mT.contiguous().mT
    with guarded(), using(SMALL):
        results = [value_and_gradient(x, teacher, negatives, "triton") for x in (student, strided)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", ["image", "batch"])
def test_the_loss(level: Any, dtype: torch.dtype) -> None:
    """With mask and half precision, as the streaming twin computes it."""
    student, teacher = (x.to(dtype) for x in features(3, 11, 20, 9))
    mask = (torch.arange(33, device=DEVICE).reshape(3, 11) % 4) != 0
    results = []
    for impl in ("triton", "blocked"):
        leaf = student.detach().requires_grad_()
        with guarded(), using(SMALL):
            value = GramLoss(level, "clamp_teacher", impl=impl)(leaf, teacher, mask)
            value.backward()
        assert leaf.grad is not None
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.rankloss.gram_distance.default, (*features(2, 17, 5, 6), "keep", "triton")
    )


# ---------------------------------------------------------------- offsets beyond 2^31


@pytest.mark.skipif(
    WHY_NOT is not None or sys.platform != "linux", reason=WHY_NOT or "needs Linux's mmap"
)
def test_the_last_image_of_a_huge_batch() -> None:
    """Its offsets need 64 bits."""
    p, d, tiles = 17, 5, 2
    image = 2**31 // (p * d) + 10
    student, teacher = features(1, p, d, d)

    def launch(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        distance, gradient = reserve(len(s), tiles), reserve(*s.shape)
        differences = torch.zeros(1, p, p)
        sizes = len(s) - 1, 0, p, p  # of the last image alone
        constants = {"DS": d, "BI": 16, "BD": 16, "PRECISION": "ieee"}
        with sanitize(races=False):
            gram.gram_kernel[(tiles,)](
                *(s, t, differences, distance),
                *sizes,
                DT=d,
                MIRROR=True,
                NEGATIVES="keep",
                **constants,
            )
            gram.gradient_kernel[(tiles, 1)](differences, s, gradient, *sizes, **constants)
        return distance[-1], gradient[-1]

    huge = [reserve(image + 1, p, d) for _ in range(2)]
    for x, y in zip(huge, (student, teacher), strict=True):
        x[-1] = y[0]
    expected, actual = launch(student, teacher), launch(huge[0], huge[1])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert expected[1].abs().max() > 0

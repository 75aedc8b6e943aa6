"""GramLoss: its definition, options, invariances, edges."""

import copy
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankloss import GramLoss
from rankloss.distillation import Level, Negatives, resize_features
from rankloss.kernels import blocked
from tests.helpers.distillation_loops import (
    frobenius,
    gradient,
    permutations,
    random_features,
    value_and_gradient,
)
from tests.helpers.distillation_loops import gram as gram_by_loops
from tests.helpers.processes import ProcessGroup

LEVELS, NEGATIVES = get_args(Level), get_args(Negatives)
each_level = pytest.mark.parametrize("level", LEVELS)
each_negatives = pytest.mark.parametrize("negatives", NEGATIVES)
each_impl = pytest.mark.parametrize("impl", ["blocked", "reference"])


def assert_equals_loops(
    loss: GramLoss, student: Tensor, teacher: Tensor, mask: Tensor | None = None
) -> None:
    value, d_student = value_and_gradient(loss, student, teacher, mask)
    leaf = student.detach().requires_grad_()
    expected = gram_by_loops(leaf, teacher, loss.level, loss.negatives, mask)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(d_student, gradient(expected, leaf), rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------- definition


@st.composite
def gram_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student, teacher and mask; some rows are 0, some equal, some orthogonal."""
    b, p = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    seed = draw(st.integers(0, 2**31))
    features = [random_features(b, p, draw(st.integers(1, 4)), seed=seed + i) for i in range(2)]
    if draw(st.booleans()):  # many ties, zero rows, and rows that are orthogonal without rounding
        features = [x.round().abs() for x in features]
    keep = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    mask = None if keep is None else torch.rand(b, p, generator=generator) < keep
    return features[0], features[1], mask


@each_impl
@each_negatives
@each_level
@given(problem=gram_problems(), tile=st.sampled_from([1, 7, 1 << 22]))
def test_equals_the_loops(
    level: Level,
    negatives: Negatives,
    impl: str,
    problem: tuple[Tensor, Tensor, Tensor | None],
    tile: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "GRAM_TILE", tile)
        assert_equals_loops(GramLoss(level, negatives, impl=impl), *problem)


@each_impl
@each_negatives
@each_level
def test_gradcheck(level: Level, negatives: Negatives, impl: str) -> None:
    student = random_features(2, 5, 3, seed=1).requires_grad_()
    teacher = random_features(2, 5, 4, seed=2)
    mask = torch.tensor([[True, True, False, True, True], [True] * 5])
    loss = GramLoss(level, negatives, impl=impl)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, mask), student)
    if impl == "reference":
        assert torch.autograd.gradgradcheck(lambda x: loss(x, teacher, mask), student)


def test_zero_rows_can_be_differentiated_twice() -> None:
    student = random_features(1, 3, 4).index_fill(1, torch.tensor([1]), 0.0).requires_grad_()
    value = GramLoss(impl="reference")(student, random_features(1, 3, 4, seed=1))
    (first,) = torch.autograd.grad(value, student, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), student)
    assert second.isfinite().all()
    assert second.abs().max() > 0


@each_impl
def test_the_papers_sum_is_the_mean_times_the_pairs(impl: str) -> None:
    student, teacher = random_features(3, 4, 3), random_features(3, 4, 5, seed=1)
    mean = GramLoss(impl=impl)(student, teacher)
    sums = frobenius(student, teacher)
    torch.testing.assert_close(mean * 4**2, torch.stack(sums).mean())
    batch = frobenius(student.flatten(0, 1)[None], teacher.flatten(0, 1)[None])[0]
    of_batch = GramLoss("batch", impl=impl)(student, teacher)
    torch.testing.assert_close(of_batch * 12**2, batch)


TABLE = [  # cosines of student and teacher; keep, clamp, clamp_teacher; DINOv3's code for the last
    (0.6, 0.8, 0.02, 0.02, 0.02, 0.02),
    (-0.6, 0.8, 0.98, 0.32, 0.98, 0.98),
    (0.6, -0.8, 0.98, 0.18, 0.18, 0.18),
    (-0.6, -0.8, 0.02, 0.0, 0.0, 0.18),  # documented: the student's counts as 0 as well
]


def two_tokens(cosine: float) -> Tensor:
    """Two tokens of an image with this cosine, one twice as long as the other."""
    return torch.tensor([[[2.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]]], dtype=torch.float64)


@each_impl
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}, {row[1]}")
def test_truth_table_of_negatives(row: tuple[float, ...], impl: str) -> None:
    """Two tokens: the two off-diagonal pairs of four differ, so the mean is diff^2 / 2."""
    s, t, *expected, as_written = row
    values = [
        float(GramLoss(negatives=negatives, impl=impl)(two_tokens(s), two_tokens(t)))
        for negatives in NEGATIVES
    ]
    assert values == pytest.approx(expected, abs=1e-12)
    both_negative = s < 0 and t < 0
    assert (values[2] != pytest.approx(as_written)) == both_negative


@each_impl
@pytest.mark.parametrize("teacher", [0.8, 0.0, -0.8])
@each_negatives
def test_similarities_of_exactly_zero_keep_their_gradient(
    negatives: Negatives, teacher: float, impl: str
) -> None:
    assert_equals_loops(
        GramLoss(negatives=negatives, impl=impl), two_tokens(0.0), two_tokens(teacher)
    )


# ---------------------------------------------------------------- invariances


@each_impl
@each_negatives
@each_level
def test_invariances(level: Level, negatives: Negatives, impl: str) -> None:
    loss = GramLoss(level, negatives, impl=impl)
    student, teacher = random_features(3, 5, 4), random_features(3, 5, 6, seed=1)
    value, d_student = value_and_gradient(loss, student, teacher)
    assert value > 0.01

    def same(s: Tensor, t: Tensor) -> None:
        torch.testing.assert_close(loss(s, t), value)

    rotation = torch.linalg.qr(random_features(4, 4, seed=2)).Q
    other_rotation = torch.linalg.qr(random_features(6, 6, seed=3)).Q
    same(student @ rotation, teacher)
    same(student, teacher @ other_rotation)
    lengths = random_features(3, 5, 1, seed=4).exp()
    same(student * lengths, teacher)
    same(student, teacher * lengths)
    torch.testing.assert_close(
        (d_student * student).sum(2), torch.zeros(3, 5, dtype=torch.float64), rtol=0, atol=1e-14
    )
    images, tokens = permutations(1, 3)[0], permutations(3, 5, seed=1)
    same(student[images], teacher[images])
    s, t = (
        torch.stack([x[order] for x, order in zip(y, tokens, strict=True)])
        for y in (student, teacher)
    )
    same(s, t)
    assert abs(loss(s, teacher) - value) > 1e-3  # the student alone must not be permuted
    if negatives != "clamp_teacher":
        assert loss(student, student @ rotation) < 1e-28


# ---------------------------------------------------------------- edges


@each_impl
@each_negatives
@each_level
def test_zero_rows(level: Level, negatives: Negatives, impl: str) -> None:
    """Similarity 0, to themselves as well, and no gradient; others see theirs as usual."""
    student, teacher = random_features(2, 4, 3), random_features(2, 4, 3, seed=1)
    student[0, 1] = 0.0
    teacher[1, 2] = 0.0
    loss = GramLoss(level, negatives, impl=impl)
    assert_equals_loops(loss, student, teacher)
    _, d_student = value_and_gradient(loss, student, teacher)
    assert d_student[0, 1].abs().max() == 0
    assert d_student.abs().max() < 10
    everything = loss(torch.zeros_like(student), torch.zeros_like(teacher))
    assert everything == 0


@each_impl
@each_level
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0, 0, 3)])
def test_no_tokens(shape: tuple[int, int, int], level: Level, impl: str) -> None:
    student, teacher = torch.zeros(shape), torch.zeros(*shape[:2], 5)
    for mask in (None, torch.ones(shape[:2], dtype=torch.bool)):
        value, d_student = value_and_gradient(GramLoss(level, impl=impl), student, teacher, mask)
        assert value == 0
        assert d_student.shape == shape


# ---------------------------------------------------------------- masks


@each_impl
@each_negatives
@each_level
@pytest.mark.parametrize("junk", [0.0, 1e30, float("nan"), float("inf")])
def test_a_mask_deletes_tokens(junk: float, level: Level, negatives: Negatives, impl: str) -> None:
    """Whatever the left-out tokens hold; pairs, not images, weigh the same."""
    loss = GramLoss(level, negatives, impl=impl)
    student, teacher = random_features(3, 5, 4), random_features(3, 5, 6, seed=1)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    student[~mask], teacher[~mask] = junk, junk
    value, d_student = value_and_gradient(loss, student, teacher, mask)
    leaf = student.detach().requires_grad_()
    if level == "batch":
        expected = loss(leaf[mask][None], teacher[mask][None])
    else:
        parts = [loss(leaf[b][mask[b]][None], teacher[b][mask[b]][None]) for b in (0, 2)]
        expected = (parts[0] * 3**2 + parts[1] * 5**2) / (3**2 + 5**2)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(d_student, gradient(expected, leaf))
    assert d_student[~mask].abs().max() == 0


# ---------------------------------------------------------------- processes


def _on_two_processes(
    negatives: Negatives, student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    part = None if mask is None else mask.chunk(2)[rank]
    loss = copy.deepcopy(GramLoss("batch", negatives, distributed=True))
    return value_and_gradient(loss, student.chunk(2)[rank], teacher.chunk(2)[rank], part)


def _in_a_group_of_its_own(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    group = [dist.new_group([0]), dist.new_group([1])][rank]
    assert isinstance(group, dist.ProcessGroup)
    loss = GramLoss("batch", distributed=True, process_group=group)
    return value_and_gradient(loss, student.chunk(2)[rank], teacher.chunk(2)[rank])


def test_pairs_cross_processes(two: ProcessGroup) -> None:
    """Value, and gradient by DDP's average over processes; masks keep other numbers of tokens.

    They do not cross the borders of a process group.
    """
    student, teacher = random_features(4, 5, 3), random_features(4, 5, 6, seed=1)
    masks = [None, torch.arange(20).reshape(4, 5) % 3 != 0, torch.zeros(4, 5).bool()]
    for negatives in NEGATIVES:
        for mask in masks:
            value, d_student = value_and_gradient(
                GramLoss("batch", negatives), student, teacher, mask
            )
            results = two.run(_on_two_processes, negatives, student, teacher, mask)
            for each, _ in results:
                torch.testing.assert_close(each, value)
            torch.testing.assert_close(torch.cat([d for _, d in results]) / 2, d_student)
    results = two.run(_in_a_group_of_its_own, student, teacher)
    for found, *part in zip(results, student.chunk(2), teacher.chunk(2), strict=True):
        torch.testing.assert_close(found, value_and_gradient(GramLoss("batch"), *part))


# ---------------------------------------------------------------- max_tokens


@each_level
@pytest.mark.parametrize("masked", [False, True])
def test_max_tokens_are_the_same_ones_in_every_image(masked: bool, level: Level) -> None:
    student, teacher = random_features(2, 9, 4), random_features(2, 9, 4, seed=1)
    mask = torch.arange(18).reshape(2, 9) % 4 != 0 if masked else None
    chosen = torch.randperm(9, generator=torch.Generator().manual_seed(7))[:4]
    few, every = GramLoss(level, max_tokens=4), GramLoss(level)
    generator = torch.Generator().manual_seed(7)
    value, d_student = value_and_gradient(few, student, teacher, mask, generator=generator)
    part = None if mask is None else mask[:, chosen]
    assert value == every(student[:, chosen], teacher[:, chosen], part)
    left_out = torch.ones(9, dtype=torch.bool).index_fill(0, chosen, False)
    assert d_student[:, left_out].abs().max() == 0
    assert d_student[:, chosen].abs().max() > 0
    other = few(student, teacher, mask, generator=generator)  # drawn on
    assert other != value
    again = few(student, teacher, mask, generator=torch.Generator().manual_seed(7))
    assert again == value


@pytest.mark.parametrize("max_tokens", [9, 10])
def test_max_tokens_beyond_the_tokens_draw_nothing(max_tokens: int) -> None:
    student, teacher = random_features(2, 9, 4), random_features(2, 9, 4, seed=1)
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    loss = GramLoss(max_tokens=max_tokens)
    assert loss(student, teacher, generator=generator) == GramLoss()(student, teacher)
    assert torch.equal(generator.get_state(), before)


# ---------------------------------------------------------------- high-resolution teachers


def ramp(height: int, width: int, of: tuple[int, int]) -> Tensor:
    """(1, height x width, 2): rows and columns of patch centres, in patches of the grid `of`."""
    y = (torch.arange(height, dtype=torch.float64) + 0.5) * of[0] / height - 0.5
    x = (torch.arange(width, dtype=torch.float64) + 0.5) * of[1] / width - 0.5
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=2).reshape(1, -1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("grid", "target"),
    [((16, 16), (8, 8)), ((12, 24), (6, 12)), ((24, 12), (8, 6)), ((12, 32), (4, 8))],
)
def test_resizing_keeps_linear_ramps(
    grid: tuple[int, int], target: tuple[int, int], dtype: torch.dtype
) -> None:
    """At centres and edges of patches, elsewhere its kernel is not exact; not near the border."""
    actual = resize_features(ramp(*grid, of=grid).to(dtype), grid, target)
    assert actual.dtype == dtype
    expected = ramp(*target, of=grid)
    patch = expected[0]
    inner = ((patch > 1) & (patch < torch.tensor(grid) - 2)).all(1)
    assert inner.sum() >= 8
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        actual[:, inner].double(), expected[:, inner], rtol=0, atol=tolerance
    )


def bicubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def test_resizing_is_bicubic_without_antialiasing() -> None:
    """Every patch by the 4 x 4 around its centre; the border patch repeats."""
    (h, w), (height, width) = (6, 9), (3, 4)
    features = random_features(2, h * w, 3)
    actual = resize_features(features, (h, w), (height, width))
    image = features.reshape(2, h, w, 3)
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * h / height - 0.5, (j + 0.5) * w / width - 0.5
            expected = torch.zeros(2, 3, dtype=torch.float64)
            for m in range(int(y) - 2, int(y) + 4):
                for n in range(int(x) - 2, int(x) + 4):
                    weight = bicubic(y - m) * bicubic(x - n)
                    expected += weight * image[:, min(max(m, 0), h - 1), min(max(n, 0), w - 1)]
            torch.testing.assert_close(actual[:, i * width + j], expected)


@each_level
def test_the_same_grid_changes_nothing(level: Level) -> None:
    student, teacher = random_features(2, 12, 4), random_features(2, 12, 5, seed=1)
    loss = GramLoss(level)
    same = loss(student, teacher, student_grid=(3, 4), teacher_grid=(3, 4))
    assert same == loss(student, teacher)
    assert resize_features(teacher, (3, 4), (3, 4)) is teacher


@each_impl
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_teachers_are_resized_before_they_are_normalised(dtype: torch.dtype, impl: str) -> None:
    """In full precision: a half-precision teacher is not rounded again in between."""
    student = random_features(2, 6, 4)
    teacher = random_features(2, 4 * 9, 5, seed=1) * random_features(2, 36, 1, seed=2).exp()
    teacher = teacher.to(dtype)
    grids = {"student_grid": (2, 3), "teacher_grid": (4, 9)}
    loss = GramLoss(impl=impl)
    actual = loss(student, teacher, **grids)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    resized = resize_features(teacher.to(full), (4, 9), (2, 3))
    assert torch.equal(actual, loss(student, resized))
    unit = torch.nn.functional.normalize(teacher.to(full), dim=2)
    too_early = loss(student, resize_features(unit, (4, 9), (2, 3)))
    assert abs(actual - too_early) > 1e-3

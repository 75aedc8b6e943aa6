"""The op `gram_distance`: values in tiles, memory, registration, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloss import GramLoss
from rankloss.kernels import blocked, gram_distance, reference
from rankloss.kernels.gram_distance import NEGATIVES
from tests.helpers.distillation_loops import frobenius, random_features
from tests.helpers.recorder import Peak, Recorder, bytes_of, saved_storages

each_negatives = pytest.mark.parametrize("negatives", NEGATIVES)
each_impl = pytest.mark.parametrize("impl", ["blocked", "reference"])


def features(b: int = 3, p: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return random_features(b, p, 4, dtype=dtype), random_features(b, p, 5, seed=1, dtype=dtype)


@pytest.fixture
def shrink(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda tile: monkeypatch.setattr(blocked, "GRAM_TILE", tile)


# ---------------------------------------------------------------- values


@each_impl
def test_one_distance_for_each_image(impl: str) -> None:
    student, teacher = features()
    expected = torch.stack(frobenius(student, teacher))
    torch.testing.assert_close(gram_distance(student, teacher, impl=impl), expected)


@each_negatives
@pytest.mark.parametrize("tile", [1, 6, 13, 36, 54, 100, 1 << 22])
def test_tiles_change_nothing(tile: int, negatives: str, shrink: Callable[[int], None]) -> None:
    """From one row at a time, over ragged tiles and single images, to the whole batch."""
    student, teacher = features()
    upstream = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    leaf = student.requires_grad_()
    expected = gram_distance(leaf, teacher, negatives, "reference")
    shrink(tile)
    actual = gram_distance(leaf, teacher, negatives, "blocked")
    torch.testing.assert_close(actual, expected)
    pair = (torch.autograd.grad(x, leaf, upstream)[0] for x in (actual, expected))
    torch.testing.assert_close(*pair)


# ---------------------------------------------------------------- memory


@each_negatives
@pytest.mark.parametrize("tile", [512, 4096, 40_000])
def test_blocked_never_holds_gram_matrices_of_the_batch(
    tile: int, negatives: str, shrink: Callable[[int], None]
) -> None:
    """Nor a copy of the features, but for the gradient."""
    b, p, width = 8, 96, 4
    student, teacher = torch.randn(b, p, width), torch.randn(b, p, 2 * width)
    shrink(tile)
    with Recorder(student, teacher) as recorder:
        blocked.gram_distance(student, teacher, negatives)
    assert recorder.largest <= max(tile, p, student.numel())
    assert recorder.largest < p * p * b / 1.8
    with Recorder() as plain:
        reference.gram_distance(student, teacher, negatives)
    assert plain.largest == b * p * p


def test_blocked_rows_are_normalised_a_few_images_at_a_time(shrink: Callable[[int], None]) -> None:
    """Features that are wider than there are patches."""
    student, teacher = torch.randn(16, 4, 64), torch.randn(16, 4, 512)
    shrink(2 * 4 * (64 + 512))
    with Recorder(student, teacher) as recorder:
        blocked.gram_distance(student, teacher, "keep")
    assert recorder.largest <= max(2 * teacher[0].numel(), student.numel())


@pytest.mark.parametrize("level", ["image", "batch"])
def test_the_loss_saves_one_gradient_for_backward(level: Any) -> None:
    student, teacher = torch.randn(4, 32, 8, requires_grad=True), torch.randn(4, 32, 64)
    with saved_storages() as saved:
        value = GramLoss(level, impl="blocked")(student, teacher)
    assert bytes_of(saved) <= student.numel() * 4 + 64
    with Peak() as peak:
        value.backward()
    assert peak.bytes <= 4 * (student.numel() + 64)  # nothing else as large as it


# ---------------------------------------------------------------- registration, transforms


@each_negatives
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout: str, negatives: str) -> None:
    student, teacher = features(dtype=torch.float32)
    if layout == "transposed":
        student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
    torch.library.opcheck(
        torch.ops.rankloss.gram_distance.default, (student, teacher, negatives, "blocked")
    )


# ---------------------------------------------------------------- refusals


s, t = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: gram_distance(s, t, "drop"), ValueError, r"unknown negatives 'drop'; .*'keep'"),
    (lambda: gram_distance(s[0], t[0]), ValueError, r"need \(B, P, Ds\).*\(3, 4\) and \(3, 5\)"),
    (lambda: gram_distance(s, t[:, :2]), ValueError, r"got \(2, 3, 4\) and \(2, 2, 5\)"),
    (lambda: gram_distance(s, t.to("meta")), ValueError, "student is on cpu but teacher on meta"),
    (lambda: gram_distance(s, t.int()), TypeError, "floating point, got torch.float32 and torch.i"),
    (lambda: gram_distance(s, t, impl="x"), ValueError, "unknown impl 'x'; choose 'auto' or one"),
    (lambda: gram_distance(s.double(), t, impl="triton"), ValueError, "for float64|not installed"),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=[text for _, _, text in ERRORS])
def test_errors(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()

"""The op `gram_distance`: registration, memory, derivatives, transforms, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import GramLoss
from rankloss.kernels import blocked, gram_distance, reference
from rankloss.kernels.gram_distance import NEGATIVES
from tests.helpers.distillation_loops import frobenius, gradient, random_features

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


@each_negatives
@pytest.mark.parametrize("tile", [1, 17, 1 << 22])
def test_gradcheck(tile: int, negatives: str, shrink: Callable[[int], None]) -> None:
    shrink(tile)
    student, teacher = features(2, 4)
    assert torch.autograd.gradcheck(
        lambda x: gram_distance(x, teacher, negatives, "blocked"), student.requires_grad_()
    )


@each_impl
def test_upstream_gradients_may_be_expanded(impl: str) -> None:
    """Stride 0, as sum() hands down, or as many numbers."""
    student, teacher = features()
    leaf = student.requires_grad_()
    value = gram_distance(leaf, teacher, impl=impl)
    (a,) = torch.autograd.grad(value, leaf, torch.tensor(2.0).double().expand(3), retain_graph=True)
    (b,) = torch.autograd.grad(value, leaf, torch.full((3,), 2.0).double(), retain_graph=True)
    (c,) = torch.autograd.grad((2 * value).sum(), leaf)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, c)


@each_impl
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_empty(shape: tuple[int, int], impl: str) -> None:
    student = torch.zeros(*shape, 4, requires_grad=True)
    value = gram_distance(student, torch.zeros(*shape, 5), impl=impl)
    assert torch.equal(value, torch.zeros(shape[0]))
    assert gradient(value.sum(), student).shape == student.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@each_impl
def test_dtypes(impl: str, dtype: torch.dtype) -> None:
    student, teacher = features(dtype=dtype)
    leaf = student.requires_grad_()
    value = gram_distance(leaf, teacher, impl=impl)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient(value.sum(), leaf).dtype == dtype


# ---------------------------------------------------------------- memory


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the storages that operations made, in elements; views of `given` make none."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.made: dict[int, int] = {}

    @property
    def largest(self) -> int:
        return max(self.made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.given:
                storage = x.untyped_storage()
                pointer, size = storage.data_ptr(), storage.nbytes() // x.element_size()
                self.made[pointer] = max(size, self.made.get(pointer, 0))
        return result


@each_negatives
@pytest.mark.parametrize("tile", [512, 4096, 40_000])
def test_blocked_never_holds_gram_matrices_of_the_batch(
    tile: int, negatives: str, shrink: Callable[[int], None]
) -> None:
    """Nor a copy of the features, but for the gradient."""
    b, p, width = 8, 96, 4
    student, teacher = torch.randn(b, p, width), torch.randn(b, p, 2 * width)
    shrink(tile)
    with Allocations(student, teacher) as recorder:
        blocked.gram_distance(student, teacher, negatives)
    assert recorder.largest <= max(tile, p, student.numel())
    assert recorder.largest < p * p * b / 1.8
    with Allocations() as plain:
        reference.gram_distance(student, teacher, negatives)
    assert plain.largest == b * p * p


def test_blocked_rows_are_normalised_a_few_images_at_a_time(shrink: Callable[[int], None]) -> None:
    """Features that are wider than there are patches."""
    student, teacher = torch.randn(16, 4, 64), torch.randn(16, 4, 512)
    shrink(2 * 4 * (64 + 512))
    with Allocations(student, teacher) as recorder:
        blocked.gram_distance(student, teacher, "keep")
    assert recorder.largest <= max(2 * teacher[0].numel(), student.numel())


@pytest.mark.parametrize("level", ["image", "batch"])
def test_the_loss_saves_one_gradient_for_backward(level: Any) -> None:
    student, teacher = torch.randn(4, 32, 8, requires_grad=True), torch.randn(4, 32, 64)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = GramLoss(level, impl="blocked")(student, teacher)
    assert sum(saved.values()) <= student.numel() * 4 + 64
    with Allocations() as recorder:
        value.backward()
    assert sum(recorder.made.values()) <= student.numel() + 64  # nothing else as large as it


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


@each_impl
def test_fake_and_meta_tensors(impl: str) -> None:
    student, teacher = features(dtype=torch.float32)
    with FakeTensorMode() as mode:
        leaf = mode.from_tensor(student).requires_grad_()
        value = gram_distance(leaf, mode.from_tensor(teacher), impl=impl)
        value.sum().backward()  # type: ignore[no-untyped-call]
    assert value.shape == (3,)
    assert leaf.grad is not None
    leaf = student.to("meta").requires_grad_()
    value = gram_distance(leaf, teacher.to("meta"), impl=impl)
    assert gradient(value.sum(), leaf).shape == student.shape


@each_impl
@each_negatives
def test_compile(negatives: str, impl: str) -> None:
    """One graph, the same bits; another number of images, too."""

    def f(s: Tensor, t: Tensor) -> Tensor:
        return gram_distance(s, t, negatives, impl)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for b in (3, 5):
        student, teacher = features(b, dtype=torch.float32)
        results = []
        for function in (f, compiled):
            leaf = student.detach().requires_grad_()
            value = function(leaf, teacher)
            results.append([value.detach(), gradient(value.square().sum(), leaf)])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@each_impl
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (2, 3)])
@pytest.mark.parametrize("what", ["value", "gradient"])
def test_vmap_equals_a_loop(what: str, in_dims: tuple[int | None, ...], impl: str) -> None:
    full = random_features(4, 2, 5, 3), random_features(4, 2, 5, 6, seed=1)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return gram_distance(s, t, "clamp_teacher", impl)

    def weighted(s: Tensor, t: Tensor) -> Tensor:
        return (loss(s, t) * torch.tensor([1.0, -3.0])).sum()

    f: Any = loss if what == "value" else torch.func.grad(weighted)
    args = [x[0] if d is None else x.movedim(0, d) for x, d in zip(full, in_dims, strict=True)]
    actual = torch.func.vmap(f, in_dims)(*args)
    loop = [
        f(*(x[0 if d is None else i] for x, d in zip(full, in_dims, strict=True))) for i in range(4)
    ]
    torch.testing.assert_close(actual, torch.stack(loop))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("loss", [GramLoss(), gram_distance], ids=["loss", "op"])
def test_double_backward_is_refused_with_the_remedy(loss: Callable[..., Tensor]) -> None:
    """Nowhere silently dropped: normalisation above or below it can be differentiated."""
    student, teacher = features()
    leaf = student.requires_grad_()
    for above in (torch.sum, lambda x: x.square().sum()):
        value = above(loss(leaf * 2, teacher))
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        assert first.requires_grad
        with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference'"):
            torch.autograd.grad(first.square().sum() + leaf.square().sum(), leaf)


def test_reference_can_be_differentiated_twice() -> None:
    student, teacher = features(2, 4)
    for negatives in NEGATIVES:
        assert torch.autograd.gradgradcheck(
            lambda x, n=negatives: gram_distance(x, teacher, n, "reference"),
            student.requires_grad_(),
        )


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::DeprecationWarning")
def test_forward_mode_is_refused_not_zero() -> None:
    student, teacher = features()
    with pytest.raises(NotImplementedError, match=r"forward mode|jvp"):
        torch.func.jvp(lambda x: gram_distance(x, teacher), (student,), (student,))


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

"""InfoNCE both ways from one set of scores: exact in every form, few products, little memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import ClipLoss, both_ways
from rankloss.clip import clip_loss
from tests.helpers.features import features
from tests.helpers.recorder import Peak, inside_ops

MIB = 1 << 20
FORMS: dict[str, Callable[..., both_ways.Found | None]] = {
    "one exponential": both_ways.in_one_exponential,
    "at once": both_ways.at_once,
    "log-sums": partial(both_ways.by_log_sums, step=4),
    "log-sums, one anchor": partial(both_ways.by_log_sums, step=1),
}


def expected(image: Tensor, text: Tensor, scale: float) -> list[Tensor]:
    """Value and gradients, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (image, text, torch.tensor(scale))]
    scores = leaves[2] * leaves[0] @ leaves[1].T
    value = clip_loss((scores, scores.T), torch.arange(len(image)))
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("scale", [1.0, 14.25, 100.0])
@pytest.mark.parametrize("n", [1, 9, 33])
def test_each_form_is_as_accurate_as_float_allows(
    n: int, scale: float, form: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are a few roundings of the scores, relative to what each gradient is a sum of."""
    monkeypatch.setattr(both_ways, "PART", 8 * 4 * n)  # eight rows of float32 at a time
    for dtype in (torch.float64, torch.float32):
        image, text = features(n, dtype=dtype, grad=False)
        given = image, text, torch.tensor(scale, dtype=dtype)
        found = form(*given, 0.5 / n, wanted=True)
        exact = expected(image, text, scale)
        eps = torch.finfo(dtype).eps
        for x, y, size in zip(found, exact, (1.0, scale / n, scale / n, 1.0), strict=True):
            assert x.dtype == dtype
            assert (x.double() - y).abs().max() <= 4 * eps * scale * size + 4 * eps
        assert torch.equal(form(*given, 0.5 / n, wanted=False).value, found[0])
        assert all(map(torch.equal, found, form(*given, 0.5 / n, wanted=True)))  # bit for bit


@pytest.mark.parametrize("overflow", [False, True], ids=["matches", "others"])
def test_scores_too_far_apart_for_one_exponential_take_another_form(overflow: bool) -> None:
    """Cosines of matches are 1 and -1; or 0, where those of others are 1."""
    image, text = torch.eye(8), torch.eye(8)
    if overflow:
        image = image.roll(1, 0)
    else:
        text[::2] *= -1
    scale = torch.tensor(100.0)
    assert both_ways.in_one_exponential(image, text, scale, 1.0, wanted=True) is None
    exact = expected(image, text, 100.0)
    leaves = image.requires_grad_(), text.requires_grad_(), scale.requires_grad_()
    value = ClipLoss(keep_stats=False)(*leaves)
    found = [value.detach(), *torch.autograd.grad(value, leaves)]
    assert exact[0] > 40
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_visible(number: float) -> None:
    image, text = features(5, dtype=torch.float32, grad=False)
    image[2, 3] = number
    assert not both_ways.info_nce_both_ways(image, text, torch.tensor(10.0), 1.0).isfinite()


def test_a_scale_of_zero_has_a_gradient() -> None:
    image, text = features(5, grad=False)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    ClipLoss(keep_stats=False)(image, text, scale).backward()
    torch.testing.assert_close(scale.grad, expected(image, text, 0.0)[3])


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts multiplications and exponentials of matrices, in multiples of N x N x D and N x N."""

    def __init__(self, n: int, d: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n, self.d, self.products, self.exponentials = n, d, 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1] / (self.n**2 * self.d)
        if name in ("exp", "exp_", "_log_softmax", "logsumexp"):
            self.exponentials += args[0].numel() / self.n**2
        return result


@pytest.mark.parametrize(
    ("kept", "products", "exponentials"), [(True, 3, 1.2), (False, 4, 4.1)], ids=["fits", "large"]
)
def test_work_of_a_step(
    kept: bool, products: int, exponentials: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three products where six are naive; a fourth only where the scores do not fit."""
    if not kept:
        for name in ("KEPT", "WHOLE", "LARGEST"):
            monkeypatch.setattr(both_ways, name, 0)
        monkeypatch.setattr(both_ways, "CHUNK", 1 << 13)
    image, text = features(64, 16, dtype=torch.float32)
    with inside_ops(), Products(64, 16) as work:
        ClipLoss(keep_stats=False)(image, text, 10.0).backward()
    assert work.products == products
    assert work.exponentials <= exponentials


@pytest.mark.parametrize(("n", "most"), [(1024, 20), (4096, 68), (16384, 204)])
def test_memory_of_a_step(n: int, most: int) -> None:
    """Peak of forward and backward besides the features themselves."""
    image, text = (torch.empty(n, 512, device="meta", requires_grad=True) for _ in range(2))
    scale = torch.empty((), device="meta", requires_grad=True)
    with inside_ops(), Peak() as peak:
        ClipLoss()(image, text, scale).backward()
    assert 4 * MIB < peak.bytes <= most * MIB, f"{peak.bytes / MIB:.0f} MiB"

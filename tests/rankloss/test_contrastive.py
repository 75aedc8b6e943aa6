"""The contrastive term: CLIP's, several positives, and the streamed form of large batches."""

import math

import pytest
import torch
from open_clip.loss import ClipLoss as OpenClipLoss
from torch import Tensor

from rankloss import ClipLoss, HighOrderPLLoss
from rankloss.clip import info_nce, positive_mask
from tests.helpers.features import features


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_clip_is_open_clips(n: int, bias: float | None, scale: float, dtype: torch.dtype) -> None:
    image, text = features(n, 16, dtype=dtype)
    s = torch.tensor(scale, dtype=dtype, requires_grad=True)
    b = None if bias is None else torch.tensor(bias, dtype=dtype, requires_grad=True)
    leaves = [image, text, s]
    results = []
    for loss in (ClipLoss(), OpenClipLoss()):
        value = loss(image, text, s) if b is None else loss(image, text, s, b)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    eps = torch.finfo(dtype).eps
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=8 * eps * scale)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_the_contrastive_part_of_every_order_is_clip(scale: float) -> None:
    image, text = features(9)
    clip = ClipLoss()(image, text, scale)
    for order in (0, 1, 3):
        loss = HighOrderPLLoss(8, order, contrastive_weight=1.0).double()
        parts = loss(image, text, scale, output_dict=True)
        assert torch.equal(parts["contrastive_loss"], clip)


# ---------------------------------------------------------------- several positives


def info_nce_by_hand(scores: list[list[float]], positives: list[list[bool]]) -> float:
    total = 0.0
    for row, is_positive in zip(scores, positives, strict=True):
        pairs = list(zip(row, is_positive, strict=True))
        negatives = sum(math.exp(x) for x, positive in pairs if not positive)
        terms = [math.log(math.exp(x) + negatives) - x for x, positive in pairs if positive]
        total += sum(terms) / len(terms)
    return total / len(scores)


@pytest.mark.parametrize("seed", range(5))
def test_several_positives_by_hand(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 7, generator=g, dtype=torch.float64) * 3
    own = torch.randint(7, (4,), generator=g)
    positives = torch.rand(4, 7, generator=g) < 0.4
    positives[torch.arange(4), own] = True
    value = info_nce(scores, own, positives)
    expected = info_nce_by_hand(scores.tolist(), positives.tolist())
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_one_positive_is_cross_entropy() -> None:
    scores, own = torch.randn(4, 7, dtype=torch.float64), torch.tensor([3, 0, 6, 3])
    alone = torch.nn.functional.one_hot(own, 7).bool()
    torch.testing.assert_close(info_nce(scores, own, alone), info_nce(scores, own))
    torch.testing.assert_close(
        info_nce(scores, own), torch.nn.functional.cross_entropy(scores, own)
    )


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_positives_are_never_pushed_down(scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    scores = (torch.randn(8, 9, generator=g) * scale).requires_grad_()
    positives = torch.rand(8, 9, generator=g) < 0.4
    positives[:, 0] = True
    positives[7] = True  # nothing to push away from
    value = info_nce(scores, torch.zeros(8, dtype=torch.long), positives)
    (gradient,) = torch.autograd.grad(value, scores)
    assert gradient.isfinite().all()
    assert (gradient[positives] <= 0).all()
    assert (gradient[~positives] >= 0).all()
    assert gradient[7].abs().max() == 0
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("positives", [None, torch.empty(0, 3, dtype=torch.bool)])
def test_empty_batch(positives: Tensor | None) -> None:
    scores = torch.empty(0, 3, requires_grad=True)
    value = info_nce(scores, torch.empty(0, dtype=torch.long), positives)
    value.backward()  # type: ignore[no-untyped-call]
    assert value == 0
    assert scores.grad is not None


def test_positive_mask() -> None:
    own = torch.tensor([2, 0])
    a, b = torch.tensor([1, 2, 1, 3]), torch.tensor([5, 6, 7, 5])
    assert positive_mask([], own) is None
    shared_a = [[True, False, True, False]] * 2
    shared_either = [[True, False, True, False], [True, False, True, True]]
    for ids, expected in (([a], shared_a), ([a, b], shared_either)):
        result = positive_mask(ids, own)
        assert result is not None
        assert result.tolist() == expected

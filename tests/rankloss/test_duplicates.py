"""Ids: what the same image or caption under two numbers does, and never does."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import HighOrderPLLoss, Transitions, kernels
from rankloss.clip import positive_mask
from rankloss.kernels import values_and_gradients
from tests.helpers.features import equal, features, randomize
from tests.helpers.problems import each_implementation
from tests.helpers.recorder import inside_ops

IMAGE_IDS = [4, 1, 4, 2, 3, 3, 4]
TEXT_IDS = [0, 0, 1, 2, 2, 3, 4]
NOTHING = 1e-12


def pair_gradients(loss: HighOrderPLLoss, scale: float, **ids: Tensor) -> tuple[Tensor, Tensor]:
    """(7, 7) gradients to the scores of image-text pairs, and of image-image pairs.

    Each is the sum of what a pair receives in both directions. Seven features of width 7 are a
    basis, so d L/d V = scale (G_cross T + G_in V) gives G_cross and G_in, one term at a time, once
    the transition tables are made constants.
    """
    gradients = []
    for head in loss.transition_heads:
        head.register_forward_hook(lambda _, __, out: Transitions(*(x.detach() for x in out)))
    weights = loss.contrastive_weight, loss.cross_modal_weight, loss.in_modal_weight
    for cross in (True, False):
        image, text = features(7, 7)
        loss.contrastive_weight, loss.cross_modal_weight, loss.in_modal_weight = (
            (*weights[:2], 0.0) if cross else (0.0, 0.0, weights[2])
        )
        value = loss(image, text, scale, **ids)
        (d_image,) = torch.autograd.grad(value, image)
        gradients.append(d_image @ torch.linalg.inv((text if cross else image).detach()) / scale)
    loss.contrastive_weight, loss.cross_modal_weight, loss.in_modal_weight = weights
    return gradients[0], gradients[1]


@each_implementation
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("scale", [5.0, 100.0])
@pytest.mark.parametrize("which", ["images", "texts", "both"])
def test_duplicates_are_never_pushed_down(which: str, scale: float, order: int, impl: str) -> None:
    ids, matches = {}, torch.eye(7, dtype=torch.bool)
    if which != "texts":
        ids["image_ids"] = torch.tensor(IMAGE_IDS)
        matches |= equal(IMAGE_IDS)
    if which != "images":
        ids["text_ids"] = torch.tensor(TEXT_IDS)
        matches |= equal(TEXT_IDS)
    loss = randomize(HighOrderPLLoss(7, order, transition_dim=2, impl=impl).double())
    cross, in_modal = pair_gradients(loss, scale, **ids)
    others = ~torch.eye(7, dtype=torch.bool)
    assert cross.abs().max() > 1e-3
    assert (cross[matches & others] < NOTHING).all()
    if order == 0:
        assert (cross[~matches] > -NOTHING).all()
    else:
        assert in_modal.abs().max() > 1e-3
        if which != "texts":
            assert in_modal[equal(IMAGE_IDS) & others].abs().max() < NOTHING


@pytest.mark.parametrize("order", [1, 3])
def test_without_ids_a_duplicate_is_pushed_down(order: int) -> None:
    """Ids are for this: the test above can fail."""
    cross, in_modal = pair_gradients(HighOrderPLLoss(7, order).double(), 5.0)
    others = ~torch.eye(7, dtype=torch.bool)
    assert cross[equal(IMAGE_IDS) & others].max() > 1e-3
    assert in_modal[equal(IMAGE_IDS) & others].abs().max() > 1e-3


@each_implementation
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16], ids=str)
def test_ids_are_names(dtype: torch.dtype, impl: str) -> None:
    """Renaming them, or storing them in fewer bits, changes nothing."""
    image, text = features(7)
    loss = randomize(HighOrderPLLoss(8, 2, transition_dim=4, impl=impl).double())
    a = loss(image, text, 14.3, image_ids=torch.tensor(IMAGE_IDS))
    renamed = torch.tensor([50 + 7 * x for x in IMAGE_IDS]).to(dtype)
    assert torch.equal(loss(image, text, 14.3, image_ids=renamed), a)


@each_implementation
@pytest.mark.parametrize("order", [0, 1, 3])
def test_all_the_same_item(order: int, impl: str) -> None:
    """No negatives and one candidate a list: nothing to learn, and nothing breaks."""
    image, text = features(5)
    same = torch.zeros(5, dtype=torch.long)
    loss = randomize(HighOrderPLLoss(8, order, transition_dim=4, impl=impl).double())
    for exclude_self in (False, True):
        loss.exclude_self = exclude_self
        value = loss(image, text, 100.0, image_ids=same, text_ids=same)
        assert value == 0
        for g in torch.autograd.grad(value, (image, text)):
            assert g.abs().max() == 0


@each_implementation
@pytest.mark.parametrize("ids", [{}, {"image_ids": torch.tensor(IMAGE_IDS)}], ids=["no ids", "ids"])
@pytest.mark.parametrize("exclude_self", [False, True], ids=["self in", "self out"])
def test_exclude_self_leaves_the_own_score_alone(
    exclude_self: bool, ids: dict[str, Tensor], impl: str
) -> None:
    loss = HighOrderPLLoss(order=1, exclude_self=exclude_self, impl=impl)
    _, in_modal = pair_gradients(loss, 5.0, **ids)
    assert (in_modal.diagonal().abs().max() < NOTHING) == exclude_self
    assert in_modal.abs().max() > 1e-3


# ---------------------------------------------------------------- unknown and distinct ids


@each_implementation
@pytest.mark.parametrize("order", [0, 1, 3])
def test_negative_ids_match_nothing(order: int, impl: str) -> None:
    """Unknown items are neither each other's repetitions, nor a known item's."""
    image, text = features(7)
    loss = randomize(HighOrderPLLoss(8, order, transition_dim=4, impl=impl).double())
    plain = loss(image, text, 14.3)
    unknown = torch.full((7,), -1)
    torch.testing.assert_close(loss(image, text, 14.3, image_ids=unknown, text_ids=unknown), plain)
    some = torch.tensor([4, -1, 4, -1, -2, 3, -2])
    named = torch.tensor([4, 10, 4, 11, 12, 3, 13])
    for name in ("image_ids", "text_ids"):
        actual = loss(image, text, 14.3, **{name: some})
        torch.testing.assert_close(actual, loss(image, text, 14.3, **{name: named}))
        assert actual != plain


def test_positive_mask_of_unknown_ids_of_any_dtype() -> None:
    labels = torch.tensor([1, 2, 3])
    for dtype in (torch.int8, torch.int64):
        mask = positive_mask([torch.tensor([5, 5, -1, -1], dtype=dtype)], labels)
        assert mask is not None
        assert mask.tolist() == [
            [True, True, False, False],
            [False, False, True, False],
            [False, False, False, True],
        ]


@pytest.mark.parametrize("order", [0, 3])
def test_distinct_ids_cost_nothing(order: int) -> None:
    """On the CPU no N x M mask is made of them, nor of anything else."""
    image, text = features(40, dtype=torch.float32)
    loss = HighOrderPLLoss(8, order)
    ids = {"image_ids": torch.arange(40), "text_ids": torch.full((40,), -1)}
    loss(image, text, 14.3)
    with inside_ops(), Masks() as without:
        plain = loss(image, text, 14.3)
    with inside_ops(), Masks() as masks:
        assert torch.equal(loss(image, text, 14.3, **ids), plain)
    assert masks.count == without.count
    with inside_ops(), Masks() as masks:
        loss(image, text, 14.3, image_ids=torch.arange(40) // 2)
    assert masks.count > without.count


class Masks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts boolean matrices of anchors against candidates."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.bool and result.dim() == 2:
            self.count += 1
        return result


def test_no_row_counts_more_places_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read `lengths` places of a row; with ids and `top_k`, more candidates stay."""
    image, text = features(7, dtype=torch.float32)
    found = []

    def noted(*args: Any, **options: Any) -> Any:
        found.append((args[0].ranking.shape[1], args[0].lengths.tolist()))
        return values_and_gradients(*args, **options)

    monkeypatch.setattr(kernels, "values_and_gradients", noted)
    HighOrderPLLoss(8, 3, top_k=2)(image, text, 14.3, image_ids=torch.tensor(IMAGE_IDS))
    assert found == [(2, [2] * 14)] * 2  # lists of texts, and of images

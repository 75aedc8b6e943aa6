"""The dual-branch student: shapes, either branch alone, what padding and sizes do."""

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from rankloss.fusion.student import DualBranchStudent, TextBranch

SMALL_IMAGE: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3}
SMALL_TEXT: dict[str, Any] = {"width": 24, "depth": 2, "heads": 3}


def small(**options: Any) -> DualBranchStudent:
    torch.manual_seed(0)
    defaults = {"image_size": 64, "image_options": SMALL_IMAGE, "text_options": SMALL_TEXT}
    return DualBranchStudent(**{**defaults, **options})


def tokenize(*texts: str) -> Tensor:
    ids: Tensor = open_clip.SimpleTokenizer(context_length=16)(list(texts))
    return ids


def given(tokens: Tensor | None) -> Tensor:
    assert tokens is not None
    return tokens


def parameters(module: torch.nn.Module | None) -> int:
    assert module is not None
    return sum(p.numel() for p in module.parameters())


def test_the_real_student() -> None:
    student = DualBranchStudent()
    assert student.image is not None
    trunk = student.image.trunk
    assert (trunk.embed_dim, len(trunk.blocks), trunk.blocks[0].attn.num_heads) == (192, 12, 3)
    assert parameters(trunk) == pytest.approx(5.5e6, rel=0.02)  # 5.7M with 1000 classes
    assert parameters(student.text) - 49408 * 192 < parameters(student.image)
    out = student(torch.randn(1, 3, 224, 224), tokenize("a red circle"))
    assert given(out.image).shape == (1, 196, 256)
    assert out.grid == (14, 14)
    assert given(out.text).shape == (1, 16, 256)


@pytest.mark.parametrize(("image", "text"), [(True, True), (True, False), (False, True)])
def test_either_branch_may_be_missing(image: bool, text: bool) -> None:
    student = small(image=image, text=text)
    pictures, ids = torch.randn(2, 3, 64, 64), tokenize("a circle", "two red squares")
    out = student(pictures if image else None, ids if text else None)
    assert (out.image is not None, out.grid is not None) == (image, image)
    assert (out.text is not None, out.text_mask is not None) == (text, text)
    torch.autograd.backward([x.sum() for x in (out.image, out.text) if x is not None])
    assert all(p.grad is not None for p in student.parameters())  # as DDP wants
    if not image:
        with pytest.raises(ValueError, match="got images, but has no branch"):
            student(pictures)
    if not text:
        with pytest.raises(ValueError, match="got text_ids, but has no branch"):
            student(pictures, ids)


def test_an_input_may_be_left_out() -> None:
    student = small()
    assert student() == (None, None, None, None)
    assert student(text_ids=tokenize("x")).image is None
    assert student(torch.randn(1, 3, 64, 64)).text is None


def test_some_branch_is_needed() -> None:
    with pytest.raises(ValueError, match="needs an image branch"):
        DualBranchStudent(image=False, text=False)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (32, 128), (16, 16)])
def test_any_patch_multiple(height: int, width: int) -> None:
    out = small(text=False)(torch.randn(2, 3, height, width))
    assert out.grid == (height // 16, width // 16)
    assert given(out.image).shape == (2, height * width // 256, 256)


def test_other_sizes_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"\(48 or 64\) x 64"):
        small(text=False)(torch.randn(1, 3, 60, 64))


def test_patch_tokens_are_in_row_major_order() -> None:
    """At the start each token depends most on the pixels at its own place."""
    student = small(text=False)
    picture = torch.randn(1, 3, 32, 48, requires_grad=True)
    tokens = given(student(picture).image)
    torch.autograd.backward(tokens[0, 4].square().sum())  # row 1, column 1 of 2 x 3
    assert picture.grad is not None
    influence = picture.grad.abs().sum((0, 1)).unfold(0, 16, 16).unfold(1, 16, 16).sum((2, 3))
    assert influence.argmax() == 4


def test_mask_ends_with_the_end_token() -> None:
    ids = tokenize("!%", "a red circle", "word " * 40, "")
    assert ids[0, :5].tolist() == [49406, 0, 260, 49407, 0]  # "!" is 0, and so is padding
    branch = small(image=False).text
    assert branch is not None
    assert branch.mask(ids).sum(1).tolist() == [4, 5, 16, 2]
    assert branch.mask(ids)[:, 0].all()
    no_end = torch.full((1, 5), 7)
    assert branch.mask(no_end).all()


def test_padding_changes_nothing_and_comes_out_as_zero() -> None:
    student = small(image=False).eval()
    ids = tokenize("a red circle", "a")
    out = student(text_ids=ids)
    mask, tokens = given(out.text_mask), given(out.text)
    assert (tokens[~mask] == 0).all()
    length = int(mask[0].sum())
    alone = given(student(text_ids=ids[:1, :length]).text)
    torch.testing.assert_close(tokens[:1, :length], alone)
    other = ids.masked_fill(~mask, 123)
    torch.testing.assert_close(given(student(text_ids=other).text), tokens)
    student.train()  # without dropout, and without the fast path of evaluation
    torch.testing.assert_close(given(student(text_ids=ids).text), tokens)


def test_tokens_see_what_follows_and_where_they_are() -> None:
    student = small(image=False)
    a, b = (given(student(text_ids=tokenize(t)).text) for t in ("red on blue", "blue on red"))
    assert not torch.allclose(a[:, 0], b[:, 0])  # the start token sees all the words
    assert not torch.allclose(a[:, 2], b[:, 2])


def test_a_given_mask_replaces_the_end_token() -> None:
    student = small(image=False)
    ids = tokenize("a red circle", "a")
    usual = student(text_ids=ids)
    mask = given(usual.text_mask)
    torch.testing.assert_close(given(student(None, ids, mask).text), given(usual.text))
    short = mask & (torch.arange(16) < 2)
    out = student(None, ids, short)
    assert torch.equal(given(out.text_mask), short)
    torch.testing.assert_close(given(out.text)[:, :2], given(student(None, ids[:, :2]).text))
    for wrong, error in ((mask.long(), TypeError), (mask[:, 1:], ValueError)):
        with pytest.raises(error, match="DualBranchStudent: text_mask must be"):
            student(None, ids, wrong)


def test_whole_numbers_are_no_images() -> None:
    with pytest.raises(TypeError, match=r"floating point and normalised, got torch.uint8; divide"):
        small(text=False)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(2, 17), (2, 0), (4,)])
def test_texts_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    student = small(image=False, context_length=16)
    with pytest.raises(ValueError, match=r"must be \(B, L\) with L at most 16"):
        student(text_ids=torch.zeros(shape, dtype=torch.int64))


def test_layers_of_the_text_branch_start_differently() -> None:
    """nn.TransformerEncoder deep-copies one layer."""
    first, second = TextBranch(**SMALL_TEXT).trunk.layers
    assert isinstance(first, torch.nn.TransformerEncoderLayer)
    assert isinstance(second, torch.nn.TransformerEncoderLayer)
    assert not torch.equal(first.linear1.weight, second.linear1.weight)

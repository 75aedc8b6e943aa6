"""ITO: both terms by hand, the fusion module, and that inference never sees it."""

import itertools
import math
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import ClipLoss, ITOFusion, ITOLoss
from rankloss.ito_fusion import sine_cosine_positions
from tests.helpers.features import features


def inputs(n: int, d: int = 8, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional features and those by name, of two views and one caption."""
    (view, text), (fused, other_fused) = (
        features(n, d, **options),
        features(n, d, seed=2, **options),
    )
    other = features(n, d, seed=1, **options)[1]
    named = {"other_view_features": other, "fused_features": fused}
    return [view, text], {**named, "other_fused_features": other_fused}


def nt_xent_by_hand(first: Tensor, second: Tensor, scale: float) -> float:
    """Mean over all 2N features of the cross-entropy of each one's other view."""
    both, n = torch.cat([first, second]).tolist(), len(first)
    total = 0.0
    for i, anchor in enumerate(both):
        scores = {
            j: scale * sum(a * b for a, b in zip(anchor, each, strict=True))
            for j, each in enumerate(both)
            if j != i
        }
        total += math.log(sum(map(math.exp, scores.values()))) - scores[(i + n) % (2 * n)]
    return total / (2 * n)


@pytest.mark.parametrize("weight", [2.0, 0.5])
def test_both_terms_by_hand(weight: float) -> None:
    (view, text), named = inputs(6, grad=False)
    parts = ITOLoss(weight)(view, text, 9.0, **named, output_dict=True)
    clip = [float(ClipLoss()(v, text, 9.0)) for v in (view, named["other_view_features"])]
    assert float(parts["contrastive_loss"]) == pytest.approx(sum(clip) / 2, rel=1e-12)
    expected = nt_xent_by_hand(named["fused_features"], named["other_fused_features"], 9.0)
    assert float(parts["fusion_loss"]) == pytest.approx(weight * expected, rel=1e-12)
    total = ITOLoss(weight)(view, text, 9.0, **named)
    torch.testing.assert_close(total, parts["contrastive_loss"] + parts["fusion_loss"])


def test_ids_make_positives() -> None:
    """By hand for fused features: others of the same image are pulled, never pushed."""
    (view, text), named = inputs(4, grad=False)
    ids = torch.tensor([5, 6, 5, 7])
    parts = ITOLoss(1.0)(view, text, 9.0, **named, image_ids=ids, output_dict=True)
    clip = [ClipLoss()(v, text, 9.0, image_ids=ids) for v in (view, named["other_view_features"])]
    torch.testing.assert_close(parts["contrastive_loss"], (clip[0] + clip[1]) / 2)
    both = torch.cat([named["fused_features"], named["other_fused_features"]])
    scores, total = (9.0 * both @ both.T).tolist(), 0.0
    for i in range(8):
        same = [j for j in range(8) if j != i and ids[j % 4] == ids[i % 4]]
        others = sum(math.exp(scores[i][j]) for j in range(8) if j != i and j not in same)
        terms = [math.log(math.exp(scores[i][j]) + others) - scores[i][j] for j in same]
        total += sum(terms) / len(terms) / 8
    assert float(parts["fusion_loss"]) == pytest.approx(total, rel=1e-12)


def test_two_captions_make_four_losses() -> None:
    (view, text), named = inputs(6, grad=False)
    other, other_text = named["other_view_features"], features(6, seed=5, grad=False)[1]
    value = ITOLoss(0.0)(
        view, text, 9.0, -1.0, other_view_features=other, other_text_features=other_text
    )
    pairs = itertools.product((view, other), (text, other_text))
    expected = sum(float(ClipLoss()(v, t, 9.0, -1.0)) for v, t in pairs) / 4
    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_bad_input() -> None:
    (view, text), named = inputs(4)
    fused = named["fused_features"]
    with pytest.raises(ValueError, match=r"give fused_features.*or set fusion_weight=0"):
        ITOLoss()(view, text, 9.0, other_view_features=view)
    for bad, message in (
        ({"other_view_features": view[:3]}, r"both be \(n, D\)"),
        ({"other_text_features": text[:3]}, r"both be \(n, D\)"),
        ({"fused_features": fused[:3]}, r"must both be \(4, D\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ITOLoss()(view, text, 9.0, **{**named, **bad})
    with pytest.raises(TypeError, match="fused features must be floating"):
        ITOLoss()(view, text, 9.0, **{**named, "fused_features": fused.long()})
    with pytest.raises(ValueError, match="fusion_weight must be 0 or more"):
        ITOLoss(-1.0)


# ---------------------------------------------------------------- fusion


def tokens(dim: int = 16, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(3, n, dim, generator=g) for n in (10, length))
    mask = torch.arange(length) < torch.tensor([2, 4, length])[:, None]
    return image, text, mask


@pytest.mark.parametrize("readout", ["cls", "image", "all"])
def test_padding_changes_nothing(readout: Any) -> None:
    image, text, mask = tokens()
    fusion = ITOFusion(16, heads=2, readout=readout)
    expected = fusion(image, text, mask)
    assert torch.equal(fusion(image, text.masked_fill(~mask[:, :, None], 7.0), mask), expected)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
    changed = text.clone()
    changed[:, 0] = text[:, 1]  # a token that is kept
    assert not torch.allclose(fusion(image, changed, mask), expected, atol=1e-4)


def test_places_of_patches_and_words_matter() -> None:
    """And a tower's own positions are trained through the fusion."""
    image, text, mask = tokens()
    fusion, order = ITOFusion(16), torch.tensor([0, 2, 1, *range(3, 10)])
    expected = fusion(image, text, mask)
    assert not torch.allclose(fusion(image[:, order], text, mask), expected, atol=1e-4)
    assert not torch.allclose(fusion(image, text[:, [1, 0, 2, 3, 4]], mask), expected, atol=1e-4)
    positions = torch.zeros(5, 16, requires_grad=True)
    fusion(image, text, mask, text_positions=positions)[:, 0].sum().backward()
    assert positions.grad is not None
    assert positions.grad.abs().amax(1).min() > 0


def test_positions_by_hand() -> None:
    dim, (height, width) = 8, (2, 3)
    table = sine_cosine_positions((height, width), dim)
    for row, column in itertools.product(range(height), range(width)):
        expected = [
            wave(place / 10000 ** (i / 2))
            for place in (column, row)
            for wave in (math.sin, math.cos)
            for i in range(2)
        ]
        assert table[row * width + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_layers_start_from_different_weights() -> None:
    first, second = ITOFusion(16).layers.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert not torch.equal(first.self_attn.in_proj_weight, second.self_attn.in_proj_weight)


def test_fusion_refuses() -> None:
    image, text, mask = tokens()
    fusion = ITOFusion(16)
    for arguments, message in (
        ((image[:2], text), "as many images as texts"),
        ((image, text[:, :, :8]), r"must be \(B, T, 16\)"),
        ((image, text, mask[:2]), r"text_mask must be \(3, 5\)"),
        ((image[:, :9], text), "8 patches after CLS do not fill"),
    ):
        with pytest.raises(ValueError, match=message):
            fusion(*arguments)
    with pytest.raises(ValueError, match=r"text_positions must be \(5, 16\)"):
        fusion(image, text, text_positions=torch.zeros(4, 16))
    with pytest.raises(TypeError, match="text_mask must be bool"):
        fusion(image, text, mask.long())
    for bad in ((6,), (16, 2, 3), (16, 0)):  # width; heads; depth
        with pytest.raises(ValueError, match="ITOFusion: embed_dim must be"):
            ITOFusion(*bad)


# ---------------------------------------------------------------- training alone


def build_clip() -> open_clip.CLIP:
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 64, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return open_clip.CLIP(64, {**vision, "output_tokens": True}, text, output_dict=True)


def image_and_tokens(model: open_clip.CLIP, images: Tensor) -> tuple[Tensor, Tensor]:
    pooled, patches = model.visual(images)
    patches = patches @ model.visual.proj
    return F.normalize(pooled, dim=1), torch.cat([pooled[:, None], patches], 1)


def text_tokens(model: open_clip.CLIP, texts: Tensor) -> tuple[Tensor, Tensor]:
    x = model.token_embedding(texts) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask)) @ model.text_projection
    return x, torch.arange(texts.shape[1]) <= texts.argmax(1)[:, None]


def inference(model: open_clip.CLIP, images: Tensor, texts: Tensor) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        image = model.visual(images)[0]
        return [F.normalize(image, dim=1), model.encode_text(texts, normalize=True)]


def test_inference_never_sees_the_fusion() -> None:
    """A model trained with fusion is a plain model: the same names, and the same outputs."""
    model, loss = build_clip(), ITOLoss()
    fusion = ITOFusion(64, depth=1)
    g = torch.Generator().manual_seed(0)
    views = torch.randn(2, 4, 3, 16, 16, generator=g)
    texts = torch.randint(1, 31, (4, 8), generator=g)
    texts[:, 5], texts[:, 6:] = 31, 0  # the end of the text, then padding
    before = inference(model, views[0], texts)
    assert all(map(torch.equal, before, inference(build_clip(), views[0], texts)))
    optimizer = torch.optim.AdamW([*model.parameters(), *fusion.parameters()], lr=1e-3)
    model.train()
    for _ in range(2):
        features_of_text = model.encode_text(texts, normalize=True)
        words, mask = text_tokens(model, texts)
        pairs = [image_and_tokens(model, x) for x in views]
        fused = [
            fusion(x, words, mask, text_positions=model.positional_embedding) for _, x in pairs
        ]
        value = loss(
            pairs[0][0],
            features_of_text,
            model.logit_scale.exp(),
            other_view_features=pairs[1][0],
            fused_features=fused[0],
            other_fused_features=fused[1],
        )
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fusion.parameters())
        optimizer.step()
    exported, plain = model.state_dict(), build_clip()
    assert list(exported) == list(plain.state_dict())
    plain.load_state_dict(exported)
    after = inference(model, views[0], texts)
    assert all(map(torch.equal, after, inference(plain, views[0], texts)))
    assert not torch.allclose(after[0], before[0])
    assert not loss.state_dict()

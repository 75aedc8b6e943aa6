"""The layers alone: pooling, attention, refiner, padding."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankloss.fusion import (
    ChannelSpatialAttention,
    FusionStages,
    MultiScaleFusion,
    SelfAttentionRefiner,
    SpatialPyramidPool1d,
)

sizes = st.integers(1, 12)


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(length=st.integers(1, 40), levels=st.lists(sizes, min_size=1, max_size=4), seed=sizes)
@pytest.mark.parametrize("mode", ["mean", "max"])
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pyramid_is_adaptive_pooling(mode: str, length: int, levels: list[int], seed: int) -> None:
    x = double(2, length, 3, seed=seed)
    oracle = F.adaptive_avg_pool1d if mode == "mean" else F.adaptive_max_pool1d
    expected = torch.cat([oracle(x.transpose(1, 2), m).transpose(1, 2) for m in levels], 1)
    pooled = SpatialPyramidPool1d(tuple(levels), mode)(x)  # type: ignore[arg-type]
    torch.testing.assert_close(pooled, expected)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "pyramid-mean": lambda: SpatialPyramidPool1d((1, 2, 4)),
    "pyramid-max": lambda: SpatialPyramidPool1d((3, 5), "max"),
    "attention": lambda: ChannelSpatialAttention(8, reduction=2, kernel_size=3).double(),
    "refiner": lambda: SelfAttentionRefiner(8, heads=2).double(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_padding_at_the_end_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    tokens = double(3, 9, 8)
    lengths = torch.tensor([9, 4, 1])
    mask = torch.arange(9) < lengths[:, None]
    out = layer(tokens + 100 * (~mask)[:, :, None], mask)
    for i, n in enumerate(lengths.tolist()):
        alone = layer(tokens[i : i + 1, :n])[0]
        kept = out[i] if name.startswith("pyramid") else out[i, :n]
        torch.testing.assert_close(kept, alone)
    if not name.startswith("pyramid"):
        assert (out[~mask] == 0).all()


def fusion_layer(stages: FusionStages) -> nn.Module:
    """A fusion block as a layer of tokens alone."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = MultiScaleFusion(6, 8, stages=stages).double()
            nn.init.normal_(self.block.to_residual.weight)

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            z = F.normalize(double(len(tokens), 6, seed=1), dim=1)
            embedding: Tensor = self.block(z, tokens, z.roll(1, 0), mask).embedding
            return embedding

    return Layer()


MASKED: dict[str, Callable[[], nn.Module]] = {
    **LAYERS,
    "fusion": lambda: fusion_layer(FusionStages()),
    "fusion without pyramid": lambda: fusion_layer(FusionStages(levels=None)),
    "fusion of means": lambda: fusion_layer(FusionStages(None, False, False, False)),
}


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", MASKED)
def test_masked_tokens_may_hold_anything(name: str, junk: float) -> None:
    """Forward and backward; one sample has no real token at all."""
    torch.manual_seed(0)
    layer = MASKED[name]()
    mask = torch.arange(9) < torch.tensor([9, 4, 0])[:, None]
    results = []
    for padding in (0.0, junk):
        tokens = double(3, 9, 8).masked_fill(~mask[:, :, None], padding).requires_grad_()
        out = layer(tokens, mask)
        wanted = [tokens, *layer.parameters()]
        results.append([out, *torch.autograd.grad(out.square().cumsum(0).sum(), wanted)])
        assert (results[-1][1][~mask] == 0).all()
    for clean, other in zip(*results, strict=True):
        torch.testing.assert_close(other, clean, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["pyramid-mean", "pyramid-max"])
def test_pyramid_takes_masks_with_holes(name: str) -> None:
    layer = LAYERS[name]()
    tokens = double(1, 7, 8)
    mask = torch.tensor([[True, False, True, True, False, False, True]])
    torch.testing.assert_close(layer(tokens, mask), layer(tokens[:, mask[0]]))


@pytest.mark.parametrize("name", LAYERS)
def test_a_sample_without_real_tokens_is_finite(name: str) -> None:
    layer = LAYERS[name]()
    tokens = double(2, 5, 8).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5])
    out = layer(tokens, mask)
    assert (out[1] == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), tokens)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


def test_attention_against_the_formula() -> None:
    torch.manual_seed(0)
    layer = ChannelSpatialAttention(4, reduction=2, kernel_size=3).double()
    x = double(2, 6, 4)
    gate = torch.sigmoid(layer.channel(x.mean(1)) + layer.channel(x.amax(1)))
    y = x * gate[:, None]
    maps = F.pad(torch.stack([y.amax(2), y.mean(2)], 1), (1, 1))  # (B, 2, L + 2)
    kernel = layer.spatial.weight[0]  # (2, 3)
    places = [(maps[:, :, i : i + 3] * kernel).sum((1, 2)) for i in range(6)]
    expected = y * torch.sigmoid(torch.stack(places, 1))[:, :, None]
    torch.testing.assert_close(layer(x), expected)


def test_small_widths_keep_a_hidden_unit() -> None:
    first = ChannelSpatialAttention(4, reduction=16).channel[0]
    assert isinstance(first, nn.Linear)
    assert first.out_features == 1


def test_refiner_against_multihead_attention() -> None:
    torch.manual_seed(0)
    layer = SelfAttentionRefiner(8, heads=2).double()
    twin = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        twin.in_proj_weight.copy_(layer.to_qkv.weight)
        twin.in_proj_bias.copy_(layer.to_qkv.bias)
        twin.out_proj.load_state_dict(layer.to_out.state_dict())
    x = double(2, 5, 8)
    normed = layer.norm_attention(x)
    y = x + twin(normed, normed, normed, need_weights=False)[0]
    torch.testing.assert_close(layer(x), y + layer.mlp(layer.norm_mlp(y)))


ERRORS = [
    (lambda: SpatialPyramidPool1d(()), "levels must be positive"),
    (lambda: SpatialPyramidPool1d((1, 0)), "levels must be positive"),
    (lambda: SpatialPyramidPool1d(mode="median"), "unknown mode 'median'"),  # type: ignore[arg-type]
    (lambda: ChannelSpatialAttention(8, kernel_size=4), "odd kernel_size"),
    (lambda: SelfAttentionRefiner(10, heads=4), "multiple of heads"),
    (lambda: SpatialPyramidPool1d()(torch.zeros(2, 3)), r"must be \(B, L, C\), got \(2, 3\)"),
    (lambda: SpatialPyramidPool1d()(torch.zeros(2, 0, 3)), "no tokens"),
    (lambda: ChannelSpatialAttention(8)(torch.zeros(2, 3, 4)), r"\(B, L, 8\), got \(2, 3, 4\)"),
    (
        lambda: SelfAttentionRefiner(8)(torch.zeros(2, 3, 8), torch.ones(2, 4, dtype=torch.bool)),
        r"mask must be \(B, L\) = \(2, 3\)",
    ),
    (
        lambda: MultiScaleFusion(6, 8)(torch.zeros(2, 5), torch.zeros(2, 3, 8)),
        r"embedding must be \(B, D\) = \(2, 6\)",
    ),
    (
        lambda: MultiScaleFusion(6, 8)(torch.zeros(2, 6), torch.zeros(2, 3, 8), torch.zeros(3, 6)),
        r"partner must be",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors_say_what_was_given(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


def test_other_dtypes_are_refused() -> None:
    tokens, z = torch.zeros(2, 3, 8), torch.zeros(2, 6)
    with pytest.raises(TypeError, match="mask must be bool"):
        SpatialPyramidPool1d()(tokens, torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"tokens must be floating point, got torch\.int64"):
        MultiScaleFusion(6, 8)(z, tokens.long())
    with pytest.raises(TypeError, match=r"partner must be floating point, got torch\.int64"):
        MultiScaleFusion(6, 8)(z, tokens, z.long())


@pytest.mark.parametrize(
    "stages",
    [FusionStages(), FusionStages(None, False, False, False), FusionStages(None, gate=False)],
    ids=["full", "nothing", "no pyramid, no gate"],
)
def test_fusion_exports(stages: FusionStages) -> None:
    torch.manual_seed(0)
    block = MultiScaleFusion(6, 8, stages=stages).eval()
    nn.init.normal_(block.to_residual.weight)
    z, features = F.normalize(torch.randn(3, 6), dim=1), torch.randn(3, 7, 8)
    program = torch.export.export(block, (z, features))
    torch.testing.assert_close(program.module()(z, features).embedding, block(z, features)[0])

"""ITO's fusion of image and text tokens, which exists in training only."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.checks import check_mask, check_option

Readout = Literal["cls", "image", "all"]


class ITOFusion(nn.Module):
    """Fuses the tokens of an image and of its text into one embedding; for training only.

    A small pre-norm Transformer over image tokens followed by text tokens, attending in both
    directions, read out at the first image token (CLS) or as a mean. Image tokens get fixed 2-D
    sine-cosine positions; text tokens those of the text tower, which thereby is trained too. Keys
    of padding are masked out. Source: ITO (2026), the released model: two layers, as wide as the
    embeddings.

    Nothing at inference uses it: keep it beside the model that is exported, not inside it.

    Args:
        embed_dim: D, width of the tokens, a multiple of 4 and of `heads`.
        depth: layers.
        heads: attention heads; None: one for every 64 dimensions, at least one.
        mlp_ratio: width of the hidden layers / D.
        readout: "cls", the first image token; "image", the mean of the image tokens; or "all",
            the mean of all that are not padding.

    Raises:
        ValueError: D does not fit, depth < 1, or an unknown readout.

    >>> import torch
    >>> from rankloss import ITOFusion
    >>> fusion = ITOFusion(64)
    >>> image, text = torch.randn(2, 1 + 9, 64), torch.randn(2, 5, 64)
    >>> fusion(image, text, torch.ones(2, 5, dtype=torch.bool)).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int = 2,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        readout: Readout = "cls",
    ) -> None:
        super().__init__()
        check_option("readout", readout, Readout)
        heads = max(1, embed_dim // 64) if heads is None else heads
        if embed_dim < 4 or embed_dim % 4 or heads < 1 or embed_dim % heads or depth < 1:
            raise ValueError(
                "ITOFusion: embed_dim must be a multiple of 4 and of heads, and depth at least 1, "
                f"got embed_dim={embed_dim}, heads={heads}, depth={depth}"
            )
        self.embed_dim, self.readout = embed_dim, readout
        layer = nn.TransformerEncoderLayer(
            embed_dim,
            heads,
            int(embed_dim * mlp_ratio),
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(embed_dim), enable_nested_tensor=False
        )
        for each in self.layers.layers:  # the encoder copies one layer's initial weights
            each.apply(_reset)

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        text_positions: Tensor | None = None,
    ) -> Tensor:
        """Fuse B images with their texts.

        Args:
            image_tokens: (B, 1 + h w, D) projected to the embeddings' space, CLS first, then
                patches in row-major order.
            text_tokens: (B, L, D) projected likewise, after the last LayerNorm.
            text_mask: (B, L) bool, False for padding; None keeps all.
            grid: (h, w); None: square.
            text_positions: (L, D), the text tower's positional embedding; None: fixed sine-cosine
                ones, for towers whose width is not D.

        Returns:
            (B, D) unit-norm.

        Raises:
            TypeError: tokens are not floating, or the mask is not bool.
            ValueError: shapes do not fit.
        """
        self._check(image_tokens, text_tokens, text_mask, text_positions)
        grid = _grid(image_tokens, grid)
        length = text_tokens.shape[1]
        image_positions = sine_cosine_positions(grid, self.embed_dim).to(image_tokens)
        if text_positions is None:
            text_positions = sine_cosine_positions((1, length), self.embed_dim).to(text_tokens)
        patches = image_tokens[:, 1:] + image_positions
        tokens = torch.cat([image_tokens[:, :1], patches, text_tokens + text_positions], 1)
        kept = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        if text_mask is not None:
            kept = torch.cat([kept[:, : image_tokens.shape[1]], text_mask], 1)
        fused = self.layers(tokens, src_key_padding_mask=~kept)
        return F.normalize(self._read(fused, kept, image_tokens.shape[1]), dim=1)

    def _read(self, fused: Tensor, kept: Tensor, images: int) -> Tensor:
        if self.readout == "cls":
            return fused[:, 0]
        if self.readout == "image":
            return fused[:, :images].mean(1)
        return (fused * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True)

    def _check(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor | None,
        text_positions: Tensor | None,
    ) -> None:
        dim, shapes = self.embed_dim, (tuple(image_tokens.shape), tuple(text_tokens.shape))
        if not (image_tokens.is_floating_point() and text_tokens.is_floating_point()):
            raise TypeError(
                "ITOFusion: tokens must be floating point, got "
                f"{image_tokens.dtype} and {text_tokens.dtype}"
            )
        if any(x.dim() != 3 or x.shape[2] != dim for x in (image_tokens, text_tokens)):
            raise ValueError(f"ITOFusion: tokens must be (B, T, {dim}), got {shapes}")
        if len(image_tokens) != len(text_tokens) or image_tokens.shape[1] < 1:
            raise ValueError(f"ITOFusion: need as many images as texts, CLS first; got {shapes}")
        if text_mask is not None:
            shape = {str(tuple(text_tokens.shape[:2])): text_tokens.shape[:2]}
            check_mask("ITOFusion", text_mask, shape, ("text_tokens", text_tokens), "text_mask")
        if text_positions is not None and text_positions.shape != text_tokens.shape[1:]:
            raise ValueError(
                f"ITOFusion: text_positions must be {tuple(text_tokens.shape[1:])}, got "
                f"{tuple(text_positions.shape)}"
            )


def sine_cosine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D positions, (h w, dim) float32 in row-major order, as in the Vision Transformer.

    The first half of the dimensions holds the column's sines and cosines, the second the row's;
    wavelengths grow geometrically from 2 pi to 10000 x 2 pi.
    """
    rates = 1e4 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    waves = [
        torch.cat([(x[:, None] * rates).sin(), (x[:, None] * rates).cos()], 1)
        for x in (columns, rows)
    ]
    across = waves[0][None].expand(grid[0], -1, -1)
    down = waves[1][:, None].expand(-1, grid[1], -1)
    return torch.cat([across, down], 2).flatten(0, 1).float()


def _grid(image_tokens: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
    patches = image_tokens.shape[1] - 1
    if grid is None:
        grid = (math.isqrt(patches), math.isqrt(patches))
    if grid[0] * grid[1] != patches:
        raise ValueError(
            f"ITOFusion: {patches} patches after CLS do not fill a grid of {grid}; give grid="
        )
    return grid


def _reset(module: nn.Module) -> None:
    reset: Callable[[], None] | None = getattr(module, "_reset_parameters", None)
    reset = reset or getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()

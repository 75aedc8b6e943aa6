"""A DINOv3 Vision Transformer that takes masked images, and the heads of self-distillation."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, BOTTLENECK = 256, 64
"""Widths of a head's MLP."""


class Tokens(NamedTuple):
    """Normalised tokens of the last layer: cls (B, D) and patches (B, h w, D)."""

    cls: Tensor
    patches: Tensor


class Backbone(nn.Module):
    """timm's DINOv3 with a learnt token in the place of masked patches.

    Args:
        name: timm's, for example "vit_small_patch16_dinov3".
        options: arguments of timm.create_model, for example depth and embed_dim.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
        self.model: nn.Module = model
        self.dim: int = model.num_features
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.prefix_tokens: int = model.num_prefix_tokens
        self.mask_token = nn.Parameter(torch.zeros(self.dim))
        self._mask: Tensor | None = None
        model.patch_embed.register_forward_hook(self._put_mask_token)

    def _put_mask_token(self, module: nn.Module, inputs: object, embedded: Tensor) -> Tensor:
        if self._mask is None:
            return embedded
        mask = self._mask.reshape(*embedded.shape[:-1], 1)
        return torch.where(mask, self.mask_token.to(embedded.dtype), embedded)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """Tokens of (B, 3, H, W) images, of which patches in `mask` (B, h, w) bool are hidden."""
        model: Any = self.model
        self._mask = mask
        try:
            tokens = model.forward_features(images)
        finally:
            self._mask = None
        return Tokens(tokens[:, 0], tokens[:, self.prefix_tokens :])


class Head(nn.Module):
    """Cosines of an MLP's output with learnt prototypes, as DINO's head with a normalised layer.

    Args:
        dim: width of the tokens.
        prototypes: K.
    """

    def __init__(self, dim: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, BOTTLENECK),
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, BOTTLENECK))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., K) in [-1, 1]."""
        prototypes = F.normalize(self.prototypes, dim=1)
        return F.linear(F.normalize(self.mlp(tokens), dim=-1), prototypes)


class Network(nn.Module):
    """A backbone, a head for CLS tokens and one for patches; arguments of both."""

    def __init__(self, name: str, options: dict[str, Any], prototypes: int) -> None:
        super().__init__()
        self.backbone = Backbone(name, options)
        self.cls_head = Head(self.backbone.dim, prototypes)
        self.patch_head = Head(self.backbone.dim, prototypes)

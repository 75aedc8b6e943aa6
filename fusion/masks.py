"""Padding masks: (B, L) bool, True for real tokens.

Masked tokens are replaced, never multiplied by 0, so that a NaN or an infinity in padding stays
there, in the forward and in the backward pass.
"""

import torch
from torch import Tensor

Mask = Tensor | None
"""Bool, False for what is left out; None leaves nothing out."""


def check_mask(operation: str, name: str, mask: Mask, beside: Tensor) -> None:
    """Raise unless the mask is None or (B, L) bool beside a tensor (B, L, ...).

    Raises:
        TypeError: the mask is not bool.
        ValueError: it has another shape or device.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{operation}: {name} must be bool (True for real tokens), got {mask.dtype}"
        )
    if mask.shape != beside.shape[:2] or mask.device != beside.device:
        raise ValueError(
            f"{operation}: {name} must be (B, L) = {tuple(beside.shape[:2])} on {beside.device}, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )


def check_tokens(operation: str, tokens: Tensor, dim: int | None, mask: Mask) -> None:
    """Raise unless tokens are (B, L, dim) floating and mask, if any, (B, L) bool beside them."""
    if tokens.dim() != 3 or (dim is not None and tokens.shape[2] != dim):
        width = "C" if dim is None else str(dim)
        raise ValueError(f"{operation}: tokens must be (B, L, {width}), got {tuple(tokens.shape)}")
    if not tokens.is_floating_point():
        raise TypeError(f"{operation}: tokens must be floating point, got {tokens.dtype}")
    if tokens.shape[1] == 0:
        raise ValueError(f"{operation}: there are no tokens, got {tuple(tokens.shape)}")
    check_mask(operation, "mask", mask, tokens)


def hide_masked(tokens: Tensor, mask: Mask) -> Tensor:
    """Replace masked tokens of (B, L, C) by 0; they get no gradient."""
    return tokens if mask is None else tokens.masked_fill(~mask[:, :, None], 0.0)


def masked_mean(tokens: Tensor, mask: Mask) -> Tensor:
    """Average (B, L, C) over real tokens to (B, C); 0 where there are none."""
    if mask is None:
        return tokens.mean(1)
    count = mask.sum(1, keepdim=True).clamp(min=1).to(tokens.dtype)
    return hide_masked(tokens, mask).sum(1) / count


def masked_max(tokens: Tensor, mask: Mask) -> Tensor:
    """Take the largest of (B, L, C) over real tokens, (B, C); 0 where there are none."""
    if mask is None:
        return tokens.amax(1)
    best = tokens.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
    return torch.where(mask.any(1, keepdim=True), best, 0.0)

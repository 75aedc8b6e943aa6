"""Padding masks: (B, L) bool, True for real tokens."""

import torch
from torch import Tensor


def check_tokens(operation: str, tokens: Tensor, dim: int | None, mask: Tensor | None) -> None:
    """Raise unless tokens are (B, L, dim) floating and mask, if any, (B, L) bool beside them."""
    if tokens.dim() != 3 or (dim is not None and tokens.shape[2] != dim):
        width = "C" if dim is None else str(dim)
        raise ValueError(f"{operation}: tokens must be (B, L, {width}), got {tuple(tokens.shape)}")
    if tokens.shape[1] == 0:
        raise ValueError(f"{operation}: there are no tokens, got {tuple(tokens.shape)}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{operation}: mask must be bool (True for real tokens), got {mask.dtype}")
    if mask.shape != tokens.shape[:2] or mask.device != tokens.device:
        raise ValueError(
            f"{operation}: mask must be (B, L) = {tuple(tokens.shape[:2])} on {tokens.device}, got "
            f"{tuple(mask.shape)} on {mask.device}"
        )


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, C) -> (B, C), over real tokens; 0 where there are none."""
    if mask is None:
        return tokens.mean(1)
    weights = mask.to(tokens.dtype)
    return (tokens * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


def masked_max(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, C) -> (B, C), over real tokens; 0 where there are none."""
    if mask is None:
        return tokens.amax(1)
    best = tokens.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
    return torch.where(mask.any(1, keepdim=True), best, 0.0)

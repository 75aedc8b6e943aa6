"""One-dimensional spatial pyramid pooling of a token sequence."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rankloss.fusion.masks import Mask, check_tokens, masked_max, masked_mean

PoolMode = Literal["mean", "max"]


class SpatialPyramidPool1d(nn.Module):
    """Pool a token sequence into a few adaptive bins at several levels.

    Bin i of a level with m bins covers tokens floor(i L / m) to ceil((i + 1) L / m) - 1, so that
    bins cover the sequence, overlap where m does not divide L, and repeat tokens where m > L.
    Sources: He et al. 2015, with adaptive bins since the paper's windows give a wrong number of
    bins for short sequences; the one-dimensional form and the levels are this project's choice.

    Args:
        levels: bins of each level, in the order of the output.
        mode: "mean" or "max" within a bin.

    Raises:
        ValueError: no levels, a level < 1, or an unknown mode.

    Example:
        >>> tokens = torch.arange(4.0).reshape(1, 4, 1)
        >>> SpatialPyramidPool1d((1, 2))(tokens).flatten()  # of all, of each half
        tensor([1.5000, 0.5000, 2.5000])
    """

    def __init__(self, levels: tuple[int, ...] = (1, 2, 4), mode: PoolMode = "mean") -> None:
        super().__init__()
        if not levels or min(levels) < 1:
            raise ValueError(f"SpatialPyramidPool1d: levels must be positive, got {levels}")
        if mode not in get_args(PoolMode):
            raise ValueError(f"unknown mode {mode!r}; choose one of {list(get_args(PoolMode))}")
        self.levels, self.mode = tuple(levels), mode

    def forward(self, tokens: Tensor, mask: Mask = None) -> Tensor:
        """Pool tokens (B, L, C) into (B, sum(levels), C), same dtype.

        With a mask (B, L) bool, bins divide each sample's real tokens only, as if the others were
        not in the sequence; a sample without real tokens pools to 0.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit.
        """
        check_tokens("SpatialPyramidPool1d", tokens, None, mask)
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        position = mask.cumsum(1) - 1  # (B, L), among the real tokens
        length = mask.sum(1, keepdim=True)  # (B, 1)
        pool = masked_mean if self.mode == "mean" else masked_max
        bins = [
            pool(tokens, mask & (position >= i * length // m) & (position * m < (i + 1) * length))
            for m in self.levels
            for i in range(m)
        ]
        return torch.stack(bins, dim=1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, mode={self.mode!r}"

"""Channel and spatial attention over a token sequence."""

import torch
from torch import Tensor, nn

from rankloss.fusion.masks import Mask, check_tokens, hide_masked, masked_max, masked_mean


class ChannelSpatialAttention(nn.Module):
    """Scale channels by a gate over all tokens, then tokens by a gate over their neighbours.

        x <- x * sigmoid(MLP(mean_tokens x) + MLP(max_tokens x))
        x <- x * sigmoid(Conv1d([max_channels x; mean_channels x]))

    Source: CBAM (Woo et al. 2018), its maps taken over a sequence; without the batch
    normalisation of its code (the paper has none), which depends on the rest of the batch.

    Args:
        dim: C, channels.
        reduction: the shared MLP has max(1, dim // reduction) hidden units.
        kernel_size: odd number of tokens the spatial gate sees.

    Raises:
        ValueError: a size is not positive, or kernel_size is even.

    Example:
        >>> layer = ChannelSpatialAttention(256)
        >>> layer(torch.randn(2, 7, 256)).shape
        torch.Size([2, 7, 256])
    """

    def __init__(self, dim: int, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        if dim < 1 or reduction < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            need, got = "dim, reduction >= 1 and an odd kernel_size", (dim, reduction, kernel_size)
            raise ValueError(f"ChannelSpatialAttention: need {need}, got {got}")
        self.dim = dim
        hidden = max(1, dim // reduction)
        self.channel = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.spatial = nn.Conv1d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, tokens: Tensor, mask: Mask = None) -> Tensor:
        """Gate tokens (B, L, C); masked ones count for no gate and come out as 0.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit.
        """
        check_tokens("ChannelSpatialAttention", tokens, self.dim, mask)
        tokens = hide_masked(tokens, mask)
        pooled = masked_mean(tokens, mask), masked_max(tokens, mask)
        tokens = tokens * torch.sigmoid(sum(map(self.channel, pooled)))[:, None, :]
        maps = torch.stack([tokens.amax(2), tokens.mean(2)], 1)  # (B, 2, L)
        return tokens * torch.sigmoid(self.spatial(maps)).transpose(1, 2)

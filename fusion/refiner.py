"""A pre-norm Transformer block that lets pooled tokens see each other."""

import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.fusion.masks import Mask, check_tokens, hide_masked


class SelfAttentionRefiner(nn.Module):
    """A pre-norm Transformer block: x <- x + Attention(LayerNorm(x)); x <- x + MLP(LayerNorm(x)).

    Source: the pre-norm Transformer (Xiong et al. 2020); sizes are this project's choice.

    Args:
        dim: C, channels, a multiple of `heads`.
        heads: attention heads.
        mlp_ratio: hidden units of the MLP, in multiples of dim.

    Raises:
        ValueError: dim is not a multiple of heads, or a size is not positive.

    Example:
        >>> tokens = torch.randn(2, 7, 256)
        >>> SelfAttentionRefiner(256, heads=8)(tokens).shape == tokens.shape
        True
    """

    def __init__(self, dim: int, heads: int = 4, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        sizes = f"{dim=}, {heads=}, {mlp_ratio=}"
        if heads < 1 or dim < 1 or dim % heads or mlp_ratio <= 0:
            rule = "dim must be a multiple of heads and sizes positive"
            raise ValueError(f"SelfAttentionRefiner: {rule}, got {sizes}")
        self.dim, self.heads = dim, heads
        self.norm_attention = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        hidden = max(1, round(mlp_ratio * dim))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor, mask: Mask = None) -> Tensor:
        """Refine tokens (B, L, C); masked ones are attended by none, and come out as 0.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit.
        """
        check_tokens("SelfAttentionRefiner", tokens, self.dim, mask)
        tokens = hide_masked(tokens, mask)
        tokens = tokens + self._attend(self.norm_attention(tokens), mask)
        tokens = tokens + self.mlp(self.norm_mlp(tokens))
        return hide_masked(tokens, mask)

    def _attend(self, tokens: Tensor, mask: Mask) -> Tensor:
        from einops import rearrange  # here, so that `import rankloss` does without it

        q, k, v = rearrange(
            self.to_qkv(tokens), "b l (three h d) -> three b h l d", three=3, h=self.heads
        )
        visible = None
        if mask is not None:  # a sample with no real token attends to all: its output is masked
            visible = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        out: Tensor = self.to_out(rearrange(mixed, "b h l d -> b l (h d)"))
        return out

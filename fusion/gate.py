"""The conflict-aware gate: the share of a residual that an embedding lets in, and its direction."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.fusion.precision import full_dtype, without_autocast


class ConflictAwareGate(nn.Module):
    """g = sigmoid(MLP(z, r, z * r, <z, r>)) in (0, 1)^D, from one modality's own features.

    It never sees the partner, so a tower works alone at inference. Source: DINORANKCLIP's
    conflict gate, in this project's definition.

    Args:
        dim: D, width of embedding and residual.
        hidden: units of the MLP's hidden layer; None: dim // 4.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> gate = ConflictAwareGate(512)
        >>> z, r = F.normalize(torch.randn(4, 512), dim=1), torch.randn(4, 512)
        >>> bool(((gate(z, r) > 0) & (gate(z, r) < 1)).all())
        True
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = max(1, dim // 4) if hidden is None else hidden
        if dim < 1 or hidden < 1:
            raise ValueError(f"ConflictAwareGate: sizes must be positive, got {dim}, {hidden}")
        self.mlp = nn.Sequential(nn.Linear(3 * dim + 1, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, embedding: Tensor, residual: Tensor) -> Tensor:
        """Compute the gate (B, D) of embeddings and residuals, both (B, D), in float32 at least.

        Also in half precision and under autocast: there, steps would lower the match.
        """
        dtype = full_dtype(embedding, residual)
        with without_autocast(embedding):
            embedding, residual = embedding.to(dtype), residual.to(dtype)
            product = embedding * residual
            inputs = [embedding, residual, product, product.sum(1, keepdim=True)]
            hidden = F.gelu(_linear(self.mlp[0], torch.cat(inputs, 1)))
            return torch.sigmoid(_linear(self.mlp[2], hidden))


def _linear(layer: Any, x: Tensor) -> Tensor:
    """Apply a linear layer in the dtype of x, whatever its weights are stored in."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def tangent(x: Tensor, z: Tensor) -> Tensor:
    """Project x (B, D) to what moves the unit vectors z (B, D): P_z x = x - <x, z> z."""
    return x - (x * z).sum(1, keepdim=True) * z


def without_conflict(v: Tensor, z: Tensor, partner: Tensor) -> Tensor:
    """Remove from a tangent step v what would move z away from its partner.

        v - min(0, <v, t'>) t' / |t'|^2,   t' = P_z t

    so that the matched similarity does not fall to first order. The correction carries no gradient
    (this project's choice): v is trained as if alone. With its gradient, networks learn to conflict
    on purpose, for then the correction writes the partner into the embedding; the training loss
    falls to nothing, and a tower alone retrieves at chance. Where z and its partner coincide, v is
    left as it is.

    Args:
        v: (B, D) tangent at z.
        z, partner: (B, D) unit-norm.
    """
    with torch.no_grad():
        towards = tangent(partner, z)
        length = towards.norm(dim=1, keepdim=True)
        tiny = 16 * torch.finfo(length.dtype).eps  # below it, t' is the rounding of t and z
        towards = torch.where(length > tiny, towards, 0.0) / length.clamp(min=tiny)
        conflict = (v * towards).sum(1, keepdim=True).clamp(max=0) * towards
    rest: Tensor = v - conflict
    return rest

"""Multi-scale fusion: bring teacher-like token features into a tower's embedding."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.fusion.attention import ChannelSpatialAttention
from rankloss.fusion.gate import ConflictAwareGate, tangent, without_conflict
from rankloss.fusion.masks import Mask, check_tokens, masked_mean
from rankloss.fusion.precision import can_read, full_dtype, without_autocast
from rankloss.fusion.pyramid import SpatialPyramidPool1d
from rankloss.fusion.refiner import SelfAttentionRefiner

Tokens = Tensor | None
"""(B, L, feature_dim) floating, or None where a tower has none."""


class FusionOutput(NamedTuple):
    """Embeddings after an injection, and the gate that let it in.

    Attributes:
        embedding: (B, D) unit-norm, float32 at least.
        gate: (B, D) in (0, 1), whose mean absolute value is the gate penalty; None without gate,
            and then there is no penalty.

    Example:
        >>> z = F.normalize(torch.randn(2, 4), dim=1)
        >>> output = MultiScaleFusion(4, 8)(z, torch.randn(2, 5, 8))
        >>> output.embedding.shape, output.gate.shape
        (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    embedding: Tensor
    gate: Tensor | None


@dataclass(frozen=True)
class FusionStages:
    """Choice of the stages of a fusion block; the study's variants are values of this.

    Attributes:
        levels: bins of the pyramid, (1, 2, 4) by default, or None to keep all tokens.
        attention: include channel-spatial attention.
        refiner: include the self-attention refiner.
        gate: include the conflict-aware gate and the conflict projection; False adds a plain
            residual.

    Example:
        >>> stages = FusionStages(levels=(1, 4), refiner=False)
        >>> MultiScaleFusion(512, 256, stages=stages).refiner is None
        True
    """

    levels: tuple[int, ...] | None = (1, 2, 4)
    attention: bool = True
    refiner: bool = True
    gate: bool = True


class MultiScaleFusion(nn.Module):
    """Tokens -> pyramid -> channel-spatial attention -> refiner -> residual r -> gated step.

        v  = P_z(g * r);  with the partner given, v loses what would move z away from it
        z+ = normalise(z + v)

    The last linear map of r is zero at the start, so z+ = z and every gradient of the trunk is
    what it would be without the block, also with a penalty on the gate: it reads the embedding
    without gradient (this project's choice). Source: DINORANKCLIP's injection, in this project's
    definition.

    Args:
        embed_dim: D, width of the embedding.
        feature_dim: C, width of the token features, a multiple of 4 with the refiner.
        stages: stages to include; by default all.

    Raises:
        ValueError: a size does not fit a stage.

    Example:
        >>> block = MultiScaleFusion(embed_dim=512, feature_dim=256)
        >>> image, text = F.normalize(torch.randn(2, 4, 512), dim=2)
        >>> tokens = torch.randn(4, 49, 256)
        >>> training = block(image, tokens, partner=text)
        >>> alone = block(image, tokens)
        >>> torch.allclose(alone.embedding, image, atol=1e-6)  # nothing moves at the start
        True
    """

    def __init__(
        self, embed_dim: int, feature_dim: int = 256, *, stages: FusionStages = FusionStages()
    ) -> None:
        super().__init__()
        self.embed_dim, self.feature_dim, self.stages = embed_dim, feature_dim, stages
        self.pyramid = SpatialPyramidPool1d(stages.levels) if stages.levels else None
        self.attention = ChannelSpatialAttention(feature_dim) if stages.attention else None
        self.refiner = SelfAttentionRefiner(feature_dim) if stages.refiner else None
        self.norm = nn.LayerNorm(feature_dim)
        self.to_residual = nn.Linear(feature_dim, embed_dim)
        self.gate = ConflictAwareGate(embed_dim) if stages.gate else None
        self._norms_seen = False
        nn.init.zeros_(self.to_residual.weight)
        nn.init.zeros_(self.to_residual.bias)

    def forward(
        self, embedding: Tensor, features: Tensor, partner: Tensor | None = None, mask: Mask = None
    ) -> FusionOutput:
        """Inject features into embeddings.

        The layers compute in the dtype of the features or autocast's; gate, step and conflict
        projection in float32 at least. A sample without a real token keeps its embedding.

        Args:
            embedding: z, (B, D) floating, unit-norm; other rows are normalised, with a warning at
                the first call.
            features: (B, L, feature_dim) floating tokens.
            partner: (B, D) floating, unit-norm embeddings of the matches, in training; None at
                inference.
            mask: (B, L) bool, False for padding; None: all tokens are real.

        Returns:
            Embedding and gate, (B, D) in float32, or float64 if given so.

        Raises:
            ValueError: shapes or devices do not fit.
            TypeError: an input is not floating point, or the mask is not bool.
        """
        check_tokens("MultiScaleFusion", features, self.feature_dim, mask)
        _check_embeddings(embedding, features, partner, self.embed_dim)
        self._warn_once_unless_normalized(embedding=embedding, partner=partner)
        residual = self.residual(features, mask)
        dtype = full_dtype(embedding, residual)
        with without_autocast(embedding):
            z = F.normalize(embedding.to(dtype), dim=1)  # half-precision rows are not unit-norm
            step, gate = self._step(z, residual.to(dtype), partner)
            fused = F.normalize(z + step, dim=1)
        if mask is not None:
            fused = torch.where(mask.any(1, keepdim=True), fused, embedding.to(dtype))
        return FusionOutput(fused, gate)

    def _step(
        self, z: Tensor, residual: Tensor, partner: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute v, (B, D) tangent at z, and the gate if there is one."""
        if self.gate is None:
            return tangent(residual, z), None
        gate = self.gate(z.detach(), residual)  # a penalty on it spares the trunk
        step = tangent(gate * residual, z)
        if partner is not None:
            step = without_conflict(step, z, F.normalize(partner.to(z.dtype), dim=1))
        return step, gate

    def _warn_once_unless_normalized(self, **embeddings: Tensor | None) -> None:
        """Read the norms on the first call only, so that later steps never synchronise."""
        given = {name: x for name, x in embeddings.items() if x is not None and len(x)}
        if self._norms_seen or not can_read(*given.values()):
            return
        self._norms_seen = True
        for name, x in given.items():
            off = (x.detach().float().norm(dim=1) - 1).abs().max()
            if off > 0.02:
                warnings.warn(
                    f"MultiScaleFusion: {name} is not unit-norm (a norm is off by {off:.3g}) and "
                    "is normalised here; pass torch.nn.functional.normalize(x, dim=1)",
                    stacklevel=3,
                )

    def residual(self, features: Tensor, mask: Mask = None) -> Tensor:
        """Compute the residual r, (B, embed_dim), from tokens (B, L, feature_dim)."""
        tokens = features
        if self.pyramid is not None:
            tokens, mask = self.pyramid(tokens, mask), None
        if self.attention is not None:
            tokens = self.attention(tokens, mask)
        if self.refiner is not None:
            tokens = self.refiner(tokens, mask)
        residual: Tensor = self.to_residual(self.norm(masked_mean(tokens, mask)))
        return residual


class DualFusion(NamedTuple):
    """Outputs of both towers' fusion blocks.

    Attributes:
        image, text: `FusionOutput`, or None where there is no block or were no features.

    Example:
        >>> z = F.normalize(torch.randn(2, 4), dim=1)
        >>> Injection(4, 8, text=False)(z, z, torch.randn(2, 5, 8)).text is None
        True
    """

    image: FusionOutput | None
    text: FusionOutput | None


class Injection(nn.Module):
    """A fusion block for each tower, either optional, each the other's partner in training.

    Args:
        embed_dim, feature_dim: as in `MultiScaleFusion`.
        stages: stages of both blocks.
        image, text: give that tower a block; image only is a supported configuration.

    Example:
        >>> injection = Injection(embed_dim=512, feature_dim=256)
        >>> image, text = F.normalize(torch.randn(2, 4, 512), dim=2)
        >>> patches, words = torch.randn(4, 49, 256), torch.randn(4, 12, 256)
        >>> fused = injection(image, text, patches, words)
        >>> fused.image.embedding.shape
        torch.Size([4, 512])
        >>> injection.text(text, words).embedding.shape  # a tower alone
        torch.Size([4, 512])
    """

    def __init__(
        self,
        embed_dim: int,
        feature_dim: int = 256,
        *,
        stages: FusionStages = FusionStages(),
        image: bool = True,
        text: bool = True,
    ) -> None:
        super().__init__()
        self.image = MultiScaleFusion(embed_dim, feature_dim, stages=stages) if image else None
        self.text = MultiScaleFusion(embed_dim, feature_dim, stages=stages) if text else None

    def forward(
        self,
        image_embedding: Tensor,
        text_embedding: Tensor,
        image_features: Tokens = None,
        text_features: Tokens = None,
        text_mask: Mask = None,
    ) -> DualFusion:
        """Inject each tower's features, with the other tower's embedding as partner.

        At inference, call `image` or `text` alone.

        Args:
            image_embedding, text_embedding: (B, D) unit-norm.
            image_features, text_features: (B, L, feature_dim) tokens; None leaves that tower out.
            text_mask: (B, L) bool, False for padding.

        Raises:
            ValueError, TypeError: as `MultiScaleFusion`.
        """
        image = text = None
        if self.image is not None and image_features is not None:
            image = self.image(image_embedding, image_features, text_embedding)
        if self.text is not None and text_features is not None:
            text = self.text(text_embedding, text_features, image_embedding, text_mask)
        return DualFusion(image, text)


@dataclass(frozen=True)
class FusionVariant:
    """A configuration of `Injection`: the stages of its blocks, and the towers that have one.

    Attributes:
        stages: stages of both blocks.
        image, text: give that tower a block.

    Example:
        >>> injection = FusionVariant(FusionStages(gate=False), text=False).build(512, 256)
        >>> injection.text is None
        True
        >>> list(FUSION_VARIANTS)
        ['none', 'pyramid', 'pyramid-attention', 'image-only', 'plain-residual', 'full']
    """

    stages: FusionStages = FusionStages()
    image: bool = True
    text: bool = True

    def build(self, embed_dim: int, feature_dim: int = 256) -> Injection:
        """Build the modules of this variant."""
        return Injection(
            embed_dim, feature_dim, stages=self.stages, image=self.image, text=self.text
        )


FUSION_VARIANTS = {
    "none": FusionVariant(image=False, text=False),
    "pyramid": FusionVariant(FusionStages(attention=False, refiner=False, gate=False)),
    "pyramid-attention": FusionVariant(FusionStages(refiner=False, gate=False)),
    "image-only": FusionVariant(text=False),
    "plain-residual": FusionVariant(FusionStages(gate=False)),
    "full": FusionVariant(),
}
"""The six variants of the study, by name."""


def _check_embeddings(
    embedding: Tensor, features: Tensor, partner: Tensor | None, embed_dim: int
) -> None:
    expected = (features.shape[0], embed_dim)
    for name, x in (("embedding", embedding), ("partner", partner)):
        if x is None:
            continue
        if x.shape != expected:
            raise ValueError(
                f"MultiScaleFusion: {name} must be (B, D) = {expected} for features "
                f"{tuple(features.shape)}, got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"MultiScaleFusion: {name} must be floating point, got {x.dtype}")
        if x.device != features.device:
            raise ValueError(
                f"MultiScaleFusion: features are on {features.device} but {name} on {x.device}; "
                "move them to one device"
            )

"""ITO: two views of an image against its text, and fused views against each other."""

import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankloss.checks import as_scalar, check_features
from rankloss.clip import clip_loss, info_nce
from rankloss.distributed import (
    ALONE,
    GlobalBatch,
    HoldsProcessGroup,
    Processes,
    gather_with_gradient,
    rank_and_world_size,
)
from rankloss.scores import cross_modal_scores, scaled_cosines


class ITOLoss(HoldsProcessGroup, nn.Module):
    """ITO: two views of every image against its text, and fused views against each other.

        L = 1/2 [CLIP(v1, t) + CLIP(v2, t)]  +  w NT-Xent(f1, f2)

    v1, v2 are embeddings of two augmented views, f1, f2 what `ITOFusion` makes of each view and
    the text together. NT-Xent compares each f with the same sample's other view, against all
    others of both views, at CLIP's scale. With second captions t2 the first term is the mean of
    the four CLIP losses. Source: ITO (2026) and its published code; nothing is detached there or
    here, and gradients reach encoders and scale through both terms. A sample's similarity with
    itself is left out exactly (the published code subtracts 1e9, which overflows half precision).

    Each process scores its own anchors against all candidates, gathered with gradient: under DDP's
    averaging the gradient is the global batch's at any world size.

    Args:
        fusion_weight: w; 2 in the paper. With 0 no fused features are needed.
        process_group, rank, world_size: see `rankloss.global_batch.GlobalBatchLoss`.

    Raises:
        ValueError: fusion_weight is negative.

    >>> import torch
    >>> from rankloss import ITOLoss
    >>> view, other, text = torch.eye(3, 8), torch.eye(3, 8), torch.eye(3, 8)
    >>> loss = ITOLoss(fusion_weight=0.0)
    >>> round(loss(view, text, 10.0, other_view_features=other).item(), 6)
    9.1e-05
    """

    def __init__(
        self,
        fusion_weight: float = 2.0,
        *,
        process_group: dist.ProcessGroup | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if fusion_weight < 0:
            raise ValueError(f"ITOLoss: fusion_weight must be 0 or more, got {fusion_weight}")
        self.fusion_weight = fusion_weight
        self.process_group = process_group
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        other_view_features: Tensor,
        other_text_features: Tensor | None = None,
        fused_features: Tensor | None = None,
        other_fused_features: Tensor | None = None,
        local: bool = False,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this process's pairs.

        Args:
            image_features, text_features, logit_scale: as in `SigLipLoss.forward`.
            logit_bias: added to the logits of images against texts.
            other_view_features: (n, D) unit-norm, of another view of the same images.
            other_text_features: (n, D) unit-norm, of other captions of the same images.
            fused_features, other_fused_features: (n, D') unit-norm, from `ITOFusion`, of the first
                and of the other view; not used if fusion_weight is 0.
            local: leave other processes out: the loss of these n samples alone.
            output_dict: return {"contrastive_loss", "fusion_loss"}, already weighted, whose sum is
                the loss; without the second if fusion_weight is 0.

        Raises:
            TypeError: features are not floating.
            ValueError: shapes or devices do not fit, fused features are missing, processes hold
                different numbers of pairs, or rank/world_size contradict the process group.
        """
        scale = as_scalar("logit_scale", logit_scale, image_features)
        bias = None if logit_bias is None else as_scalar("logit_bias", logit_bias, image_features)
        views = [image_features, other_view_features]
        texts = (
            [text_features] if other_text_features is None else [text_features, other_text_features]
        )
        for features in (*views[1:], *texts):
            check_features(image_features, features, None)
        group = (
            ALONE if local else rank_and_world_size(self.rank, self.world_size, self.process_group)
        )
        gathered = [_gathered(x, group) for x in (*views, *texts)]
        clip = [
            _clip(view, text, scale, bias)
            for view, text in itertools.product(gathered[:2], gathered[2:])
        ]
        parts = {"contrastive_loss": torch.stack(clip).mean()}
        if self.fusion_weight:
            first, second = _checked_fusion(image_features, fused_features, other_fused_features)
            fusion = _nt_xent(_gathered(first, group), _gathered(second, group), scale)
            parts["fusion_loss"] = self.fusion_weight * fusion
        return parts if output_dict else torch.stack(list(parts.values())).sum()

    def extra_repr(self) -> str:
        return f"fusion_weight={self.fusion_weight:g}"


class _Gathered(NamedTuple):
    """One kind of features: this process's (n, D), all (M, D), and where its rows are in them."""

    local: Tensor
    all: Tensor
    labels: Tensor


def _gathered(features: Tensor, group: Processes) -> _Gathered:
    n = len(features)
    dtype = torch.promote_types(features.dtype, torch.float32)
    everywhere = gather_with_gradient(features, group).to(dtype)
    local = everywhere if group.world_size == 1 else features.to(dtype)
    start = group.rank * n
    return _Gathered(local, everywhere, torch.arange(start, start + n, device=features.device))


def _clip(image: _Gathered, text: _Gathered, scale: Tensor, bias: Tensor | None) -> Tensor:
    """CLIP's loss, as `ClipLoss`."""
    dtype = torch.promote_types(image.all.dtype, text.all.dtype)
    (v, images, labels), (t, texts) = image, text[:2]
    batch = GlobalBatch(v.to(dtype), t.to(dtype), images.to(dtype), texts.to(dtype), labels)
    return clip_loss(cross_modal_scores(batch, scale), labels, bias=bias)


def _nt_xent(first: _Gathered, second: _Gathered, scale: Tensor) -> Tensor:
    """Cross-entropy of each anchor's other view against all features of both views but itself."""
    terms = []
    for own, other in ((first, second), (second, first)):
        across = scaled_cosines(own.local, other.all, scale)
        within = scaled_cosines(own.local, own.all, scale)
        within = within.scatter(1, own.labels[:, None], -torch.inf)
        terms.append(info_nce(torch.cat([across, within], 1), own.labels))
    return 0.5 * (terms[0] + terms[1])


def _checked_fusion(
    image: Tensor, first: Tensor | None, second: Tensor | None
) -> tuple[Tensor, Tensor]:
    if first is None or second is None:
        raise ValueError(
            "ITOLoss: give fused_features and other_fused_features, what ITOFusion makes of each "
            "view and the text, or set fusion_weight=0"
        )
    if not (first.is_floating_point() and second.is_floating_point()):
        raise TypeError(
            f"ITOLoss: fused features must be floating point, got {first.dtype} and {second.dtype}"
        )
    if first.dim() != 2 or first.shape != second.shape or len(first) != len(image):
        raise ValueError(
            f"ITOLoss: fused_features and other_fused_features must both be ({len(image)}, D), "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if {first.device, second.device} != {image.device}:
        raise ValueError(
            f"ITOLoss: image_features are on {image.device} but fused features on {first.device} "
            f"and {second.device}; move them to one device"
        )
    return first, second

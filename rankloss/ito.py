"""ITO: two views of an image against its text, and fused views against each other."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from rankloss.checks import check_further
from rankloss.clip import clip_loss, info_nce, positive_mask
from rankloss.distributed import GlobalBatch, Processes, gather_features
from rankloss.global_batch import GatherOptions, Inputs
from rankloss.pair_loss import PairLoss
from rankloss.scores import cross_modal_scores, scaled_cosines

VIEW, TEXTS = "other_view_features", ["other_text_features"]
FUSED = ["fused_features", "other_fused_features"]


class _Side(NamedTuple):
    """One kind of features: anchors (N, D) that this process scores, and all (M, D)."""

    anchors: Tensor
    all: Tensor


class ITOLoss(PairLoss):
    """ITO: two views of every image against its text, and fused views against each other.

        L = 1/2 [CLIP(v1, t) + CLIP(v2, t)]  +  w NT-Xent(f1, f2)

    v1, v2 are embeddings of two augmented views, f1, f2 what `ITOFusion` makes of each view and
    the text together. NT-Xent compares each f with the same sample's other view, against all
    others of both views, at CLIP's scale. With second captions t2 the first term is the mean of
    the four CLIP losses. Source: ITO (2026) and its published code; nothing is detached there or
    here, and gradients reach encoders and scale through both terms. A sample's similarity with
    itself is left out exactly (the published code subtracts 1e9, which overflows half precision).

    With the default `local_loss` and `gather_with_grad` each process scores its own anchors against
    all candidates: under DDP's averaging the gradient is the global batch's at any world size.

    Args:
        fusion_weight: w; 2 in the paper. With 0 no fused features are needed.
        local_loss, gather_with_grad, accum_freq, process_group, rank, world_size: see
            `rankloss.global_batch.GlobalBatchLoss`.

    Called as any `PairLoss`, and with
        other_view_features: (n, D) unit-norm, of another view of the same images.
        other_text_features: (n, D) unit-norm, of other captions of the same images, or None.
        fused_features, other_fused_features: (n, D') unit-norm, from `ITOFusion`, of the first and
            of the other view; not used if fusion_weight is 0.

    Samples that share an id are positives of each other in both terms (this project's choice).

    Raises:
        ValueError: fusion_weight is negative.

    >>> import torch
    >>> from rankloss import ITOLoss
    >>> view, other, text = torch.eye(3, 8), torch.eye(3, 8), torch.eye(3, 8)
    >>> loss = ITOLoss(fusion_weight=0.0)
    >>> round(loss(view, text, 10.0, other_view_features=other).item(), 6)
    9.1e-05
    """

    def __init__(self, fusion_weight: float = 2.0, **gathering: Unpack[GatherOptions]) -> None:
        super().__init__(**gathering)
        if fusion_weight < 0:
            raise ValueError(f"ITOLoss: fusion_weight must be 0 or more, got {fusion_weight}")
        self.fusion_weight = fusion_weight

    def further(self, images: Tensor, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Check views, captions, and fused features if they count."""
        views = {name: x for name, x in given.items() if name not in FUSED}
        found = check_further("ITOLoss", images, views, [VIEW], TEXTS)
        if self.fusion_weight:
            fused = _checked_fusion(images, *(given.get(name) for name in FUSED))
            found |= zip(FUSED, fused, strict=True)
        return found

    def terms(self, images: Tensor, texts: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Compute "contrastive_loss" and, unless fusion_weight is 0, "fusion_loss"."""
        names = (name for name in (*TEXTS, *FUSED) if name in inputs.further)
        features = [images, inputs.further[VIEW], texts, *(inputs.further[x] for x in names)]
        sides = [self._side(x, inputs.processes) for x in features]
        labels = torch.arange(len(sides[0].anchors), device=images.device)
        if sides[0].anchors is not sides[0].all:  # this process's samples alone
            labels = labels + inputs.processes.rank * len(labels)
        positives = positive_mask(inputs.ids, labels)
        fused = sides[-2:] if self.fusion_weight else []
        pairs = itertools.product(sides[:2], sides[2 : len(sides) - len(fused)])
        clip = [_clip(view, text, labels, positives, inputs) for view, text in pairs]
        parts = {"contrastive_loss": torch.stack(clip).mean()}
        if fused:
            fusion = _nt_xent(fused, labels, positives, inputs.scale)
            parts["fusion_loss"] = self.fusion_weight * fusion
        return parts

    def _side(self, features: Tensor, processes: Processes) -> _Side:
        """Gather one kind of features, in float32 or float64."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        gathered = gather_features(
            features,
            processes,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
        ).to(dtype)
        own = self.local_loss and processes.world_size > 1
        return _Side(features.to(dtype) if own else gathered, gathered)

    def extra_repr(self) -> str:
        return f"fusion_weight={self.fusion_weight:g}"


def _clip(
    image: _Side, text: _Side, labels: Tensor, positives: Tensor | None, inputs: Inputs
) -> Tensor:
    """CLIP's loss of one view and one caption."""
    dtype = torch.promote_types(image.all.dtype, text.all.dtype)
    anchors = image.anchors.to(dtype), text.anchors.to(dtype)
    if image.anchors is image.all:  # one tensor, of which `cross_modal_scores` makes use
        batch = GlobalBatch(*anchors, *anchors, labels)
    else:
        batch = GlobalBatch(*anchors, image.all.to(dtype), text.all.to(dtype), labels)
    return clip_loss(cross_modal_scores(batch, inputs.scale), labels, positives, inputs.bias)


def _nt_xent(
    views: Sequence[_Side], labels: Tensor, positives: Tensor | None, scale: Tensor
) -> Tensor:
    """Cross-entropy of each anchor's other view against all features of both views but itself."""
    terms, itself = [], labels[:, None]
    if positives is not None:
        positives = torch.cat([positives, positives.scatter(1, itself, False)], 1)
    for own, other in (views, views[::-1]):
        across = scaled_cosines(own.anchors, other.all, scale)
        within = scaled_cosines(own.anchors, own.all, scale).scatter(1, itself, -torch.inf)
        terms.append(info_nce(torch.cat([across, within], 1), labels, positives))
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

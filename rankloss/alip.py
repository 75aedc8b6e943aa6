"""ALIP: CLIP on raw and on synthetic captions, each pair weighted by how well it fits."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from rankloss.checks import check_further
from rankloss.clip import clip_loss, positive_mask
from rankloss.distributed import GlobalBatch, gather_features
from rankloss.global_batch import GatherOptions, Inputs
from rankloss.pair_loss import PairLoss
from rankloss.scores import cross_modal_scores


class ALIPLoss(PairLoss):
    """ALIP: images against their raw texts and against synthetic captions, good pairs first.

    Of sample i with image x, raw text t and synthetic caption c, three similarities S_tc, S_xt and
    S_xc are compared with their running means H over the data so far:

        W_s = min(1, exp(g_s (S_tc - H_tc)))          sample: do both texts say the same?
        W_t = exp(g_p (S_xt - H_xt)) if W_s < 1 else 1      pair: which text fits the image?
        W_c = exp(g_p (S_xc - H_xc)) if W_s < 1 else 1
        L   = mean_i W_s W_t CLIP_i(x, t)  +  mean_i W_s W_c CLIP_i(x, c)

    CLIP_i is the mean of the cross-entropies image to text and text to image of pair i. The means
    move before they are used, H <- m H + (1 - m) mean(S) with the mean over the global batch, and
    start at 1, so that nearly every sample counts little in the first 1 / (1 - m) steps. Weights
    carry no gradient and may exceed 1. Source: Yang et al. 2023, equations 1 to 6, in the
    published code's form: means over samples and half of both directions, where the paper sums.
    The running means are in `state_dict` (the published code forgets them when training resumes),
    and weights belong to this process's own samples.

    With the default `local_loss` and `gather_with_grad` each process scores its own pairs against
    all candidates: under DDP's averaging the gradient is the global batch's at any world size.

    Args:
        sample_gamma, pair_gamma: g_s and g_p, sharpness of the two weights; 2 in the paper.
        momentum: m, in [0, 1).
        accum_freq: forwards to an optimizer step. The means move once a step, by the mean over its
            forwards in training mode; gradients as in `rankloss.global_batch.GlobalBatchLoss`.
        local_loss, gather_with_grad, process_group, rank, world_size: see there.

    Called as any `PairLoss`, with raw texts, and with
        caption_features: (n, D) unit-norm, synthetic captions by the same text encoder. They have
            their images' ids alone. With local=True the means stay.

    Attributes:
        means: (3,) float32, the running means H of S_tc, S_xt and S_xc.

    Raises:
        ValueError: a gamma is negative, momentum is outside [0, 1), or accum_freq < 1.

    >>> import torch
    >>> from rankloss import ALIPLoss
    >>> image, text, caption = torch.eye(3, 8), torch.eye(3, 8), torch.eye(3, 8)
    >>> loss = ALIPLoss()
    >>> parts = loss(image, text, 10.0, caption_features=caption, output_dict=True)
    >>> sorted(parts), loss.means.tolist()  # matches are perfect: the means stay at 1
    (['caption_loss', 'contrastive_loss'], [1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        *,
        sample_gamma: float = 2.0,
        pair_gamma: float = 2.0,
        momentum: float = 0.99,
        **gathering: Unpack[GatherOptions],
    ) -> None:
        super().__init__(**gathering)
        if sample_gamma < 0 or pair_gamma < 0 or not 0 <= momentum < 1:
            raise ValueError(
                "ALIPLoss: need sample_gamma and pair_gamma >= 0 and momentum in [0, 1), got "
                f"{sample_gamma}, {pair_gamma} and {momentum}"
            )
        self.sample_gamma, self.pair_gamma, self.momentum = sample_gamma, pair_gamma, momentum
        self.means: Tensor
        self.pending: Tensor
        self.forwards: Tensor
        self.register_buffer("means", torch.ones(3))
        self.register_buffer("pending", torch.zeros(3))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Put the running means at their start."""
        self.means.fill_(1.0)
        self.pending.zero_()
        self.forwards.zero_()

    def further(self, images: Tensor, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Check `caption_features`."""
        return check_further("ALIPLoss", images, given, needed=["caption_features"])

    def terms(self, images: Tensor, texts: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Compute "contrastive_loss" and "caption_loss", of raw texts and of captions."""
        caption_features = inputs.further["caption_features"]
        how = {"local_loss": self.local_loss, "gather_with_grad": self.gather_with_grad}
        raw = self.gathered(images, texts, inputs)
        everywhere = gather_features(caption_features, inputs.processes, **how)
        raw = raw.in_full_precision()
        everywhere = everywhere.to(raw.images.dtype)
        own = raw.image_anchors is not raw.images  # anchors are this process's samples alone
        anchors = caption_features.to(everywhere.dtype) if own else everywhere
        captions = raw._replace(text_anchors=anchors, texts=everywhere)
        moving = self.training and not inputs.local
        raw_weights, caption_weights = self._weights(raw, captions, moving)
        caption_ids = [] if inputs.image_ids is None else [inputs.image_ids]
        return {
            "contrastive_loss": _weighted_clip(raw, inputs, inputs.ids, raw_weights),
            "caption_loss": _weighted_clip(captions, inputs, caption_ids, caption_weights),
        }

    @torch.no_grad()
    def _weights(
        self, texts: GlobalBatch, captions: GlobalBatch, moving: bool
    ) -> tuple[Tensor, Tensor]:
        """(n,) weights W_s W_t and W_s W_c of this process's samples; moves the means if wanted."""
        x, t, c = texts.images, texts.texts, captions.texts
        similarities = torch.stack([(a * b).sum(1) for a, b in ((t, c), (x, t), (x, c))])  # (3, M)
        moving = moving and similarities.shape[1] > 0
        means = self._moved_means(similarities.mean(1)) if moving else self.means
        similarities = similarities[:, texts.labels] - means[:, None].to(similarities.dtype)
        sample = (self.sample_gamma * similarities[0]).exp().clamp(max=1.0)
        pair = (self.pair_gamma * similarities[1:]).exp()
        weights = sample * torch.where(sample < 1, pair, 1.0)
        return weights[0], weights[1]

    def _moved_means(self, similarities: Tensor) -> Tensor:
        """Means to use with a batch of mean similarities (3,); `means` moves at a step's end."""
        pending = self.pending + similarities.to(self.pending.dtype)
        forwards = self.forwards + 1
        moved = self.momentum * self.means + (1 - self.momentum) * pending / forwards
        done = forwards == self.accum_freq
        self.means.copy_(torch.where(done, moved, self.means))
        self.pending.copy_(torch.where(done, 0.0, pending))
        self.forwards.copy_(torch.where(done, 0, forwards))
        return moved

    def extra_repr(self) -> str:
        return (
            f"sample_gamma={self.sample_gamma:g}, pair_gamma={self.pair_gamma:g}, "
            f"momentum={self.momentum:g}, accum_freq={self.accum_freq}"
        )


def _weighted_clip(
    batch: GlobalBatch, inputs: Inputs, ids: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """Mean over anchors of weight x CLIP's loss of the pair; 0 for an empty batch."""
    scores = cross_modal_scores(batch, inputs.scale)
    positives = positive_mask(ids, batch.labels)
    return clip_loss(scores, batch.labels, positives, inputs.bias, weights)

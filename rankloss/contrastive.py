"""Contrastive losses that are no member of the ranking family: SigLIP and CyCLIP."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from rankloss.distributed import GlobalBatch, Processes, gather_features
from rankloss.global_batch import GatherOptions, Inputs
from rankloss.kernels import check_impl
from rankloss.pair_loss import PairLoss
from rankloss.pair_terms import Pairs, Terms
from rankloss.streaming import loss_of_pairs


class SigLipLoss(PairLoss):
    """SigLIP: every image-text pair of the global batch is a binary classification of its own.

        L = 1/N sum over i, j of softplus(-y_ij (scale <v_i, t_j> + bias))

    with y_ij = 1 for i = j and -1 otherwise, divided by N, not by N^2. With ids, pairs that share
    one have y_ij = 1 too (this project's choice). SigLIP starts from scale 10 and bias -10.
    Source: Zhai et al. 2023, as in open_clip. With the default `local_loss` and `gather_with_grad`
    each process scores its own images against all texts: under DDP's averaging the gradient is the
    global batch's at any world size.

    Args:
        impl: "reference" is plain PyTorch, which holds all logits and is differentiable twice;
            any other implementation streams: logits exist a chunk of anchors at a time.
        local_loss, gather_with_grad, accum_freq, process_group, rank, world_size: see
            `rankloss.global_batch.GlobalBatchLoss`.

    >>> features = torch.eye(3)
    >>> round(float(SigLipLoss()(features, features, 10.0, -5.0)), 4)
    0.0201
    """

    def __init__(self, *, impl: str = "auto", **gathering: Unpack[GatherOptions]) -> None:
        super().__init__(**gathering)
        check_impl(impl)
        self.impl = impl

    def terms(self, images: Tensor, texts: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Compute "contrastive_loss", all there is."""
        images, texts, labels = self._sides(images, texts, inputs.processes)
        batch = GlobalBatch(images, texts, images[:0], texts, labels)  # no image is a candidate
        ids = inputs.image_ids, inputs.text_ids
        pairs = Pairs.of(batch, inputs.scale, inputs.bias, ids=ids)._replace(text_anchors=None)
        return {"contrastive_loss": loss_of_pairs(pairs, Terms(sigmoid=1.0, impl=self.impl))}

    def _sides(
        self, images: Tensor, texts: Tensor, processes: Processes
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image anchors, text candidates, and the label of each anchor.

        There is one direction only, so that own texts keep their gradient whatever the options.
        """

        def everywhere(x: Tensor) -> Tensor:
            with_grad = self.gather_with_grad
            return gather_features(x, processes, local_loss=False, gather_with_grad=with_grad)

        all_texts = everywhere(texts)
        start = processes.rank * len(images) if self.local_loss else 0
        images = images if self.local_loss else everywhere(images)
        labels = torch.arange(start, start + len(images), device=images.device)
        return images, all_texts, labels


class CyCLIPLoss(PairLoss):
    """CyCLIP: CLIP's loss plus two penalties on inconsistent similarities.

        L = L_CLIP + w_in/N sum over j, k of (<v_j, v_k> - <t_j, t_k>)^2
                   + w_cross/N sum over j, k of (<v_j, t_k> - <v_k, t_j>)^2

    of cosines, divided by N, not by N^2; both sides receive gradient, the scale does not. Source:
    Goel et al. 2022 and its published code. With the default `local_loss` and `gather_with_grad`
    each process scores its own anchors against all candidates: under DDP's averaging the gradient
    is the global batch's at any world size (the published code's is 1/world_size of it). With ids,
    pairs that share one are positives of the contrastive term; the penalties do not change.

    Args:
        in_modal_weight, cross_modal_weight: w_in, w_cross; the published command has 0.25 for both.
        impl: as in `SigLipLoss`.
        local_loss, gather_with_grad, accum_freq, process_group, rank, world_size: see
            `rankloss.global_batch.GlobalBatchLoss`.

    >>> features = torch.eye(3)
    >>> parts = CyCLIPLoss()(features, features, 10.0, output_dict=True)
    >>> float(parts["cyclic_loss"])  # the similarities are consistent
    0.0
    """

    def __init__(
        self,
        *,
        in_modal_weight: float = 0.25,
        cross_modal_weight: float = 0.25,
        impl: str = "auto",
        **gathering: Unpack[GatherOptions],
    ) -> None:
        super().__init__(**gathering)
        check_impl(impl)
        self.in_modal_weight, self.cross_modal_weight = in_modal_weight, cross_modal_weight
        self.impl = impl

    def terms(self, images: Tensor, texts: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Compute "contrastive_loss" and "cyclic_loss"."""
        batch = self.gathered(images, texts, inputs)
        ids, one = (inputs.image_ids, inputs.text_ids), torch.ones_like(inputs.scale)
        contrastive = Terms(contrastive=1.0, impl=self.impl)
        cyclic = Terms(
            cyclic_across=self.cross_modal_weight,
            cyclic_within=self.in_modal_weight,
            impl=self.impl,
        )
        pairs = Pairs.of(batch, inputs.scale, inputs.bias, ids=ids)
        return {
            "contrastive_loss": loss_of_pairs(pairs, contrastive),
            "cyclic_loss": loss_of_pairs(Pairs.of(batch, one), cyclic),
        }

    def extra_repr(self) -> str:
        return (
            f"in_modal_weight={self.in_modal_weight:g}, "
            f"cross_modal_weight={self.cross_modal_weight:g}"
        )

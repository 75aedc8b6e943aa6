"""Scores of anchors against candidates, in full precision whatever surrounds them."""

from typing import Any

import torch
from torch import Tensor

from rankloss.distributed import GlobalBatch
from rankloss.kernels.launch import outside_autocast


class _Dot(torch.autograd.Function):
    """anchors @ candidates.T whose gradients are computed outside autocast too.

    A compiled backward pass inherits the forward's autocast, and would multiply in half precision.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(anchors: Tensor, candidates: Tensor) -> Tensor:
        with outside_autocast(anchors):
            return anchors @ candidates.T

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        anchors, candidates = ctx.saved_tensors
        to_anchors, to_candidates = ctx.needs_input_grad
        with outside_autocast(anchors):
            return (
                grad @ candidates if to_anchors else None,
                grad.T @ anchors if to_candidates else None,
            )


def scaled_cosines(anchors: Tensor, candidates: Tensor, scale: Tensor) -> Tensor:
    """Return scale * <anchor, candidate> (N, M) of float32 or float64 features."""
    # two tensors: torch.compile refuses one tensor given twice to an autograd.Function
    cosines: Tensor = _Dot.apply(anchors, candidates.view_as(candidates))
    return scale.to(cosines.dtype) * cosines


def cross_modal_scores(batch: GlobalBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N, M) scores of images against texts, and of texts against images."""
    image_to_text = scaled_cosines(batch.image_anchors, batch.texts, scale)
    if batch.image_anchors is batch.images:  # every candidate is an anchor
        return image_to_text, image_to_text.T
    return image_to_text, scaled_cosines(batch.text_anchors, batch.images, scale)

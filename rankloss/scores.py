"""Scores of anchors against candidates, in full precision whatever surrounds them."""

from typing import Any

import torch
from torch import Tensor

from rankloss.distributed import GlobalBatch
from rankloss.kernels.launch import outside_autocast

LOW_BITS = 0x1FFF  # of a float32, those that TF32 does not have


def rounds_to_tf32(x: Tensor) -> bool:
    """Tell if `torch.set_float32_matmul_precision` lets products of x round their factors."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cuda"
        and torch.get_float32_matmul_precision() != "highest"
    )


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b accurate to float32, (N, D) by (D, M), whatever the setting for TF32 is.

    At a logit scale of 100, TF32 is off by 0.05 in a score and makes ties of different ones. Where
    it is on, each factor is the sum of two parts that it can hold, and the product three products.
    """
    if not rounds_to_tf32(a):
        return a @ b
    (a, a_rest), (b, b_rest) = _split(a), _split(b)
    return a @ b + (a @ b_rest + a_rest @ b)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in TF32, cut off, and what that leaves out."""
    high = (x.contiguous().view(torch.int32) & ~LOW_BITS).view(torch.float32)
    return high, x - high


class _Dot(torch.autograd.Function):
    """anchors @ candidates.T whose gradients are computed outside autocast too.

    A compiled backward pass inherits the forward's autocast, and would multiply in half precision.
    Products of the backward pass follow the setting for TF32; their results are not multiplied by
    a logit scale.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(anchors: Tensor, candidates: Tensor) -> Tensor:
        with outside_autocast(anchors):
            return exact_product(anchors, candidates.T)

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

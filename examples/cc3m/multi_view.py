"""CLIP trained on several views and captions of each sample: ALIP's and ITO's towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankloss import DinoRankCLIP, ITOFusion
from rankloss.two_towers import OUTPUTS, encode_pairs


class Needs(NamedTuple):
    """Inputs of a loss beside one view and one caption of each sample.

    Attributes:
        views, captions: how many it takes.
        second_text: the loss's name for the features of second captions.
        fusion: it takes what `ITOFusion` makes of each view and its caption.
    """

    views: int = 1
    captions: tuple[int, ...] = (1,)
    second_text: str = ""
    fusion: bool = False


NEEDS = {
    "ALIPLoss": Needs(captions=(2,), second_text="caption_features"),
    "ITOLoss": Needs(2, (1, 2), "other_text_features", fusion=True),
}
"""Losses that take more than one view and one caption."""


def check_inputs(
    loss: Mapping[str, Any], views: int, captions: int, fusion: Mapping[str, Any] | None
) -> None:
    """See that a loss gets what it takes.

    Args:
        loss: {"class name": {arguments}}.
        views, captions: how many each sample has.
        fusion: arguments of `ITOFusion`, if there is one.

    Raises:
        ValueError: it does not; says what it takes.
    """
    ((name, arguments),) = loss.items()
    needs = NEEDS.get(name, Needs())
    if views != needs.views or captions not in needs.captions:
        taken = " or ".join(map(str, needs.captions))
        raise ValueError(
            f"{name} takes {needs.views} views and {taken} captions of a sample, got {views} views "
            f"and {captions} captions"
        )
    wanted = needs.fusion and (arguments or {}).get("fusion_weight", 1) > 0
    if wanted != (fusion is not None):
        raise ValueError(
            f"{name} {'needs' if wanted else 'does not use'} fusion, {{}} or arguments of ITOFusion"
        )


class MultiViewCLIP(DinoRankCLIP):
    """Two towers whose loss compares several views and captions of each sample.

    Images and texts have one more dimension, views (B, V, 3, H, W) and captions (B, C, L), unless
    there is but one. Views and captions of the same number belong together where the fusion joins
    them; a single caption is every view's (with two captions, this project's choice). Nothing of
    it is left at inference, where `encode_image` and `encode_text` are the towers' own.

    Args:
        fusion: arguments of `rankloss.ITOFusion`, a part for training only; None has none.
        options: arguments of `DinoRankCLIP`, with variant="none".

    Raises:
        ValueError: the fusion needs tokens that the model does not have.
    """

    def __init__(self, fusion: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(variant="none", **options)
        ((name, _),) = self.settings["loss"].items()
        self.second_text = NEEDS[name].second_text
        self.loss_inputs = (
            *(*OUTPUTS, self.second_text, "other_view_features"),
            *("fused_features", "other_fused_features"),
        )
        self.fusion: ITOFusion | None = None
        if fusion is not None:
            model: Any = self.model
            if not isinstance(getattr(getattr(model, "visual", None), "proj", None), Tensor):
                raise ValueError(
                    "ITOFusion joins tokens of a Vision Transformer of open_clip, which this model "
                    "has not; choose another --model, such as ViT-B-16, or fusion_weight: 0"
                )
            self.fusion = ITOFusion(model.text_projection.shape[1], **fusion)

    def encode(
        self, images: Tensor, texts: Tensor, *, text_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute what the loss needs of each sample, by the loss's names of its arguments."""
        images = images if images.dim() == 5 else images[:, None]
        texts = texts if texts.dim() == 3 else texts[:, None]
        flat = images.flatten(0, 1), texts.flatten(0, 1)
        if self.fusion is None:
            outputs = encode_pairs(self.model, *flat)
        else:
            outputs, tokens = self._encode_with_tokens(*flat)
            fused = self._fuse(*tokens, texts, images.shape[1])
            outputs["fused_features"], outputs["other_fused_features"] = fused.unbind(1)
        names = {
            "image_features": ("image_features", "other_view_features"),
            "text_features": ("text_features", self.second_text),
        }
        for (name, split), given in zip(names.items(), (images, texts), strict=True):
            rows = outputs.pop(name)
            parts = rows.view(*given.shape[:2], rows.shape[1]).unbind(1)
            outputs |= dict(zip(split, parts, strict=False))
        return outputs

    def _encode_with_tokens(
        self, images: Tensor, texts: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Return the model's outputs, and tokens of images and texts projected as these are."""
        model: Any = self.model
        outputs = model.forward_intermediates(
            images,
            texts,
            image_indices=1,
            text_indices=1,
            normalize_intermediates=True,
            image_output_fmt="NLC",
            image_output_extra_tokens=True,
            output_logit_scale_bias=True,
        )
        (prefix,) = outputs.pop("image_intermediates_prefix")
        (patches,) = outputs.pop("image_intermediates")
        (words,) = outputs.pop("text_intermediates")
        image_tokens = torch.cat([prefix, patches], 1) @ model.visual.proj
        projection = model.text_projection
        return outputs, (image_tokens, words @ projection)

    def _fuse(self, image_tokens: Tensor, text_tokens: Tensor, texts: Tensor, views: int) -> Tensor:
        """Return (B, V, D), what the fusion makes of each view and its caption."""
        assert self.fusion is not None
        model: Any = self.model
        captions = texts.shape[1]
        chosen = [min(view, captions - 1) for view in range(views)]
        ids = texts[:, chosen].flatten(0, 1)
        words = text_tokens.view(*texts.shape, -1)[:, chosen].flatten(0, 1)
        places = torch.arange(texts.shape[2], device=texts.device)
        kept = places <= ids.argmax(1, keepdim=True)  # the end token has the largest id
        positions = model.positional_embedding
        fused: Tensor = self.fusion(
            image_tokens,
            words,
            kept,
            grid=model.visual.grid_size,
            text_positions=positions if positions.shape[1] == words.shape[2] else None,
        )
        return fused.view(len(texts), views, -1)

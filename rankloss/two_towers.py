"""Two-tower models of open_clip and transformers by one set of functions.

A model is told by what it has: `get_image_features` and a `config` make it one of transformers
(CLIPModel, SiglipModel, ...), `encode_image` and `encode_text` one of open_clip or of your own.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankloss.fusion.optional import require

SCALARS = ("logit_scale", "logit_bias")
"""Outputs of a model that are not one row for each sample."""
OUTPUTS = ("image_features", "text_features", *SCALARS)

Architecture = Mapping[str, Mapping[str, Any]]
"""{"open_clip": {"model_name": ...}}, {"open_clip": {"embed_dim", "vision_cfg", "text_cfg", ...}},
or {"transformers": {"model_type": ..., ...}}: what a model is built from, without its weights."""


class Sizes(NamedTuple):
    """Sizes of a model and its inputs; None where the model does not say.

    Attributes:
        embed_dim: D, width of the embeddings.
        image_size: pixels of an image's side.
        context_length: tokens of a text at most.
        vocabulary: number of token ids.
    """

    embed_dim: int | None
    image_size: int | None
    context_length: int | None
    vocabulary: int | None


def encode_pairs(
    model: nn.Module, images: Tensor, texts: Tensor, text_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Call the model on B pairs, through its own forward.

    Args:
        model: with open_clip's or transformers' interface.
        images: (B, 3, H, W).
        texts: (B, L) int64 token ids.
        text_mask: (B, L) bool, True for real tokens, for models of transformers.

    Returns:
        "image_features" and "text_features" (B, D) unit-norm, "logit_scale" (exponentiated), and
        "logit_bias" if the model has one.

    Raises:
        ValueError: the model returns something else.
    """
    _check_images(images)
    if not _of_transformers(model):
        return _named(model, model(images, texts))
    hugging: Any = model
    output = hugging(input_ids=texts, pixel_values=images, **_masked(text_mask))
    outputs = {
        "image_features": output.image_embeds,
        "text_features": output.text_embeds,
        "logit_scale": hugging.logit_scale.exp(),
    }
    if getattr(hugging, "logit_bias", None) is not None:
        outputs["logit_bias"] = hugging.logit_bias
    return outputs


def encode_images(model: nn.Module, images: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) as (B, D), not normalised."""
    _check_images(images)
    tower: Any = model
    if _of_transformers(model):
        return _pooled(tower.get_image_features(pixel_values=images))
    return tower.encode_image(images)  # type: ignore[no-any-return]


def encode_texts(model: nn.Module, texts: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """Encode token ids (B, L) as (B, D), not normalised."""
    tower: Any = model
    if _of_transformers(model):
        return _pooled(tower.get_text_features(input_ids=texts, **_masked(text_mask)))
    return tower.encode_text(texts)  # type: ignore[no-any-return]


def sizes_of(model: nn.Module) -> Sizes:
    """Read a model's sizes from its configuration (transformers) or its attributes (open_clip)."""
    known: Any = model
    if _of_transformers(model):
        text, vision = known.config.text_config, known.config.vision_config
        projected = getattr(known.config, "projection_dim", None)
        return Sizes(
            getattr(text, "projection_size", projected),
            vision.image_size,
            text.max_position_embeddings,
            text.vocab_size,
        )
    image_size = getattr(getattr(known, "visual", None), "image_size", None)
    if isinstance(image_size, (tuple, list)):
        image_size = image_size[0]
    return Sizes(
        _open_clip_width(known),
        image_size,
        getattr(known, "context_length", None),
        getattr(known, "vocab_size", None),
    )


def architecture_of(model: nn.Module) -> Architecture | None:
    """Return what `build_model` rebuilds a model of transformers from; None for other models."""
    if not _of_transformers(model):
        return None
    known: Any = model
    return {"transformers": json.loads(known.config.to_json_string(use_diff=False))}


def build_model(architecture: Architecture) -> nn.Module:
    """Build a model with weights at their start.

    Raises:
        ImportError: the library is missing.
        ValueError: the architecture names another library.
    """
    if len(architecture) != 1 or not architecture.keys() <= {"open_clip", "transformers"}:
        raise ValueError(
            "architecture must be {'open_clip': {...}} or {'transformers': {...}}, got keys "
            f"{list(architecture)}"
        )
    ((library, options),) = architecture.items()
    settings = json.loads(json.dumps(options))  # a copy: open_clip changes what it is given
    model: nn.Module
    if library == "transformers":
        transformers = require("transformers")
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = transformers.AutoModel.from_config(config)
    elif "model_name" in settings:
        model = require("open_clip").create_model(**{"pretrained_text": False, **settings})
    else:
        model = require("open_clip").CLIP(**settings)
    return model


def _check_images(images: Tensor) -> None:
    if images.dtype == torch.uint8:
        raise TypeError(
            "DinoRankCLIP: images must be floating point, normalised as the model wants them, got "
            "torch.uint8; divide by 255, subtract the mean, divide by the standard deviation"
        )


def _of_transformers(model: nn.Module) -> bool:
    return hasattr(model, "get_image_features") and hasattr(model, "config")


def _masked(text_mask: Tensor | None) -> dict[str, Tensor]:
    return {} if text_mask is None else {"attention_mask": text_mask.long()}


def _pooled(features: Any) -> Tensor:
    """Return the projected features; transformers 5 puts them into an output object."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _named(model: nn.Module, output: Any) -> dict[str, Tensor]:
    """Name the outputs of open_clip, which are a tuple without output_dict."""
    if not isinstance(output, Mapping):
        output = dict(zip(OUTPUTS, output, strict=False)) if isinstance(output, tuple) else {}
    if not output.keys() >= {"image_features", "text_features", "logit_scale"}:
        raise ValueError(
            f"DinoRankCLIP: {type(model).__name__}(images, texts) must return image_features, "
            "text_features and logit_scale in a dict or a tuple, as models of open_clip do; got "
            f"{sorted(output) or 'something else'}"
        )
    return {name: output[name] for name in OUTPUTS if output.get(name) is not None}


def _open_clip_width(model: Any) -> int | None:
    """Return the width of open_clip's embeddings, from its last linear map of texts."""
    text = getattr(model, "text", model)  # CustomTextCLIP has a text tower of its own
    projection = getattr(text, "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if isinstance(projection, Tensor):
        return projection.shape[1]
    width: int | None = getattr(getattr(model, "visual", None), "output_dim", None)
    return width

"""open_clip models, transforms and tokenizer for small images and short captions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from examples.cc3m.files import UserError

CONTEXT_LENGTH = 32
SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 64},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 2, "layers": 2},
}
"""In the format of open_clip's model_configs: a residual network and a small text Transformer."""

SMALL_STUDENT: dict[str, Any] = {
    "token_dim": 64,
    "image_size": 64,
    "context_length": CONTEXT_LENGTH,
    "image_options": {"embed_dim": 64, "depth": 2, "num_heads": 2},
    "text_options": {"width": 64, "depth": 1, "heads": 2},
}
"""Arguments of `DualBranchStudent`: ViT-Tiny cut down in the same way."""

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 32},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 32, "heads": 1, "layers": 1},
}
"""For tests: learns nothing worth mentioning."""

TINY_STUDENT: dict[str, Any] = {
    "token_dim": 16,
    "image_size": 32,
    "context_length": CONTEXT_LENGTH,
    "image_options": {"embed_dim": 24, "depth": 1, "num_heads": 2},
    "text_options": {"width": 16, "depth": 1, "heads": 1},
}


def model_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of a model by name, or of "tiny".

    Raises:
        UserError: there is no such model.
    """
    config = SMALL_CLIP if name == "tiny" else open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"open_clip has no model {name!r}; open_clip.list_models() names them")
    return {k: config[k] for k in ("embed_dim", "vision_cfg", "text_cfg")}


def student_options(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `DualBranchStudent` beside a model: ViT-Tiny, or less beside "tiny"."""
    if name == "tiny":
        return SMALL_STUDENT
    return {
        "image_size": config["vision_cfg"]["image_size"],
        "context_length": config["text_cfg"]["context_length"],
    }


def build_clip(config: dict[str, Any]) -> open_clip.CLIP:
    """A freshly initialised open_clip.CLIP that returns a dict, as `Towers` wants."""
    model = open_clip.CLIP(**copy.deepcopy(config), output_dict=True)
    model.visual.to(memory_format=torch.channels_last)  # convolutions are faster that way
    return model


def build_transform(config: dict[str, Any], *, train: bool) -> Callable[[Image.Image], Tensor]:
    """open_clip's transform: PIL RGB -> (3, H, W) float32, normalised."""
    size = config["vision_cfg"]["image_size"]
    transform: Callable[[Image.Image], Tensor] = open_clip.image_transform(size, is_train=train)
    return transform


def build_tokenizer(config: dict[str, Any]) -> Callable[[list[str]], Tensor]:
    """open_clip's byte-pair tokenizer: B captions -> (B, L) int64, cut at the context length."""
    tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(
        context_length=config["text_cfg"]["context_length"]
    )
    return tokenizer

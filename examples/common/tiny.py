"""Sizes of a model and of its student that learn nothing worth mentioning, in no time."""

from typing import Any

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 32},
    "text_cfg": {"context_length": 32, "width": 32, "heads": 1, "layers": 1},
}

TINY_STUDENT: dict[str, Any] = {
    "token_dim": 16,
    "image_size": 32,
    "context_length": 32,
    "image_options": {"embed_dim": 24, "depth": 1, "num_heads": 2},
    "text_options": {"width": 16, "depth": 1, "heads": 1},
}

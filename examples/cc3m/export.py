"""Trained weights as open_clip reads them.

open_clip.create_model("ViT-B-16", pretrained="<folder>/open_clip_model.safetensors")
open_clip.create_model("local-dir:<folder>")             # any model, also "tiny"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from examples.cc3m.checkpoint import strip
from examples.cc3m.files import write_atomically, write_json

WEIGHTS = "open_clip_model.safetensors"
PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""open_clip's own for these models, which training used."""


def export(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    """Write the model alone; what a recipe put around it goes to towers.safetensors.

    Args:
        folder: made if missing.
        config: the model's, in the format of open_clip's model_configs.
        state: of `Towers`, by name, whole.

    Returns:
        The file with the model's weights.
    """
    model = {k: _as_saved(k, v) for k, v in strip(state, "model.").items()}
    others = {k: v.contiguous() for k, v in state.items() if not k.startswith("model.")}
    preprocessing = {**PREPROCESSING, "size": config["vision_cfg"]["image_size"]}
    write_json(
        folder / "open_clip_config.json",
        {"model_cfg": config, "preprocess_cfg": preprocessing},
    )
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(model, temporary))
    if others:
        write_atomically(folder / "towers.safetensors", lambda path: save_file(others, path))
    return folder / WEIGHTS


def _as_saved(name: str, value: Tensor) -> Tensor:
    """FSDP2 makes tensors of one element of scalars."""
    return value.reshape(()) if name in ("logit_scale", "logit_bias") else value.contiguous()

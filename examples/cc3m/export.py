"""Files that a run leaves: the whole model for rankloss, and the model inside it for open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.common.files import write_atomically, write_json
from rankloss import DinoRankCLIP

WEIGHTS = "open_clip_model.safetensors"
PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""open_clip's own for these models, which training used."""


def load_whole(towers: DinoRankCLIP, state: dict[str, Tensor]) -> DinoRankCLIP:
    """Load the part of a state that a model has; FSDP2 makes scalars tensors of one element."""
    there = towers.state_dict()
    towers.load_state_dict({k: v.reshape(there[k].shape) for k, v in state.items() if k in there})
    return towers.eval()


def export(folder: Path, towers: DinoRankCLIP, config: dict[str, Any]) -> Path:
    """Write the model, and everything that a recipe put around it.

        open_clip.create_model("ViT-B-16", pretrained="<folder>/open_clip_model.safetensors")
        open_clip.create_model("local-dir:<folder>")             # any model, also "tiny"
        rankloss.DinoRankCLIP.from_pretrained("<folder>")        # with student and injection

    Args:
        folder: made if missing.
        towers: on any device; their memory layout becomes the plain one.
        config: the model's, in the format of open_clip's model_configs.

    Returns:
        The file with the model's weights.
    """
    towers.cpu().to(memory_format=torch.contiguous_format)
    preprocessing = {**PREPROCESSING, "size": config["vision_cfg"]["image_size"]}
    settings = {"model_cfg": config, "preprocess_cfg": preprocessing}
    write_json(folder / "open_clip_config.json", settings)
    weights = towers.model.state_dict()
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(weights, temporary))
    towers.save_pretrained(folder)
    return folder / WEIGHTS

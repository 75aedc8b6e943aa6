"""Model of a run: prepared for training as the settings say, and exported when it is trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from examples.cc3m.settings import RunSettings
from examples.common.files import UserError, write_atomically, write_json
from examples.common.parallel import Parallel
from rankloss import DinoRankCLIP

LOG = logging.getLogger(__name__)
WEIGHTS = "open_clip_model.safetensors"
PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""open_clip's own for these models, which training used."""


def prepare(towers: DinoRankCLIP, settings: RunSettings, parallel: Parallel) -> DinoRankCLIP:
    """Make a built model one that is trained as the settings say; return what is to be trained.

    Raises:
        UserError: weights cannot be loaded, or batch normalisation cannot be synchronised here.
    """
    model: Any = towers.model
    if settings.pretrained is not None:
        load_pretrained(model, settings.model, settings.pretrained)
    if settings.lock_image:
        model.lock_image_tower()
    if settings.lock_text:
        model.lock_text_tower()
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True)
    synchronised = settings.sync_batchnorm and parallel.world_size > 1
    if settings.sync_batchnorm and parallel.device.type == "cpu":
        raise UserError(
            "--sync-batchnorm needs GPUs, on which alone torch's SyncBatchNorm computes; leave it "
            "out, or choose a --model without batch normalisation"
        )
    if synchronised:
        towers = convert_sync_batchnorm(towers)  # type: ignore[no-untyped-call]
    if settings.compile is not None:
        towers.model.compile(backend=settings.compile)
    parts = settings.train.accumulate * (1 if synchronised else parallel.world_size)
    if parts > 1 and parallel.first and any(isinstance(x, _BatchNorm) for x in towers.modules()):
        LOG.warning(
            "batch normalisation sees one of %d parts of a batch at a time: gradients are not "
            "exactly those of the whole batch (--sync-batchnorm joins processes, not the parts of "
            "--train.accumulate)",
            parts,
        )
    return towers


def load_pretrained(model: nn.Module, name: str, pretrained: str) -> None:
    """Load open_clip's weights of that tag, or a file of weights, into a model.

    Raises:
        UserError: there are none, or of another model.
    """
    try:
        source = open_clip.create_model(name, pretrained=pretrained, output_dict=True)
        model.load_state_dict(source.state_dict())
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"cannot load --pretrained {pretrained} into {name}: {error}") from error


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

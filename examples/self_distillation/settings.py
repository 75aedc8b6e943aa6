"""All that determines a self-distilled teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.common.ranges import check_least
from examples.demo.scene_shards import SceneSettings

MODEL = "vit_small_patch16_dinov3"
OPTIONS: dict[str, Any] = {"depth": 4, "embed_dim": 96, "num_heads": 3, "init_values": 0.1}
"""DINOv3's architecture at a size whose weights in float16 fit in a mebibyte."""
TEACHER = Path(__file__).resolve().parent / "teacher.safetensors"
"""Weights that `python -m examples.self_distillation` made, its recipe beside them."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """Weights and schedules, as shares of the training steps.

    Args:
        koleo_weight: weight of the sum over global crops, within groups of `koleo_group` samples.
        momentum: that of the teacher's moving average at the start; it ends at 1.
        prototypes: number of them in both heads.
        teacher_temperatures: before and after the warm-up, which lasts `temperature_warmup`.
        gram_weight: weight of the mean-form Gram loss, from `gram_start` on; no anchor before.
        gram_start, gram_every, gram_refreshes: when the anchor is first taken from the
            moving-average teacher, how often it is taken again, and how many times in all.
    """

    koleo_weight: float = 0.1
    koleo_group: int = 16
    momentum: float = 0.99
    prototypes: int = 512
    teacher_temperatures: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: float = 0.3
    gram_weight: float = 2.0
    gram_start: float = 0.6
    gram_every: float = 0.1
    gram_refreshes: int = 3


@dataclass(frozen=True)
class Settings:
    """The recipe.

    Args:
        scenes: whose training split is seen, images only.
        local_size, locals_: side of the local crops in pixels, and how many of each image.
        model, options: arguments of timm.create_model.
        steps: number of them; every schedule is a share of them.
        batch_size: images of a step, a multiple of `objective.koleo_group`.
        learning_rate: at its peak, after `warmup` (a share of the steps); then a cosine to 0.
        weight_decay: weight decay of matrices.
        objective: weights and schedules of the loss.
        clip_norm: largest gradient norm.
        checkpoint_steps: steps between checkpoints.
        seed: decides initialisation, order and crops.
    """

    scenes: SceneSettings = field(default_factory=lambda: SceneSettings(train=10240))
    local_size: int = 48
    locals_: int = 3
    model: str = MODEL
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    clip_norm: float = 1.0
    checkpoint_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "batch_size", "local_size", "checkpoint_steps")
        group = self.objective.koleo_group
        if self.batch_size % group:
            raise ValueError(f"batch_size must be a multiple of {group}, got {self.batch_size}")

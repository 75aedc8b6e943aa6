"""What the demo compares, and at which sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from examples.cc3m.models import SMALL_CLIP, SMALL_STUDENT, TINY_CLIP, TINY_STUDENT
from examples.cc3m.settings import TrainSettings
from examples.demo.scene_shards import SceneSettings
from examples.demo.teacher import TeacherSettings

RECIPES = ("clip", "rankclip", "highorder_r3", "dinorankclip")
"""Rows of the comparison: files in examples/recipes."""


@dataclass(frozen=True)
class DemoSettings:
    """All that determines the results, but the recipe and the seed."""

    scenes: SceneSettings = field(default_factory=SceneSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    model: dict[str, Any] = field(default_factory=lambda: SMALL_CLIP)
    student: dict[str, Any] = field(default_factory=lambda: SMALL_STUDENT)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    timing_rounds: int = 10


FAST = DemoSettings(
    SceneSettings(image_size=32, train=96, heldout=32, probe=16, per_shard=48),
    TrainSettings(epochs=2, batch_size=16, warmup_steps=2, checkpoint_steps=3),
    TINY_CLIP,
    TINY_STUDENT,
    TeacherSettings(options={"depth": 1, "embed_dim": 24, "num_heads": 2}, dim=8),
    timing_rounds=2,
)

"""Distillation of a frozen teacher's relations: Gram matrices, distances, angles; KoLeo's spread.

All losses compare relations within a batch, so student and teacher may differ in width. The
teacher never receives gradient. Everything is computed in float32 (float64 if given so).
"""

from rankloss.distillation.anchor import GramAnchor
from rankloss.distillation.gram import GramLoss, Level, Negatives, resize_features
from rankloss.distillation.koleo import KoLeoLoss
from rankloss.distillation.patches import PatchDistillation, Relations
from rankloss.distillation.relational import RelationalAngleLoss, RelationalDistanceLoss

__all__ = [
    "GramAnchor",
    "GramLoss",
    "KoLeoLoss",
    "Level",
    "Negatives",
    "PatchDistillation",
    "RelationalAngleLoss",
    "RelationalDistanceLoss",
    "Relations",
    "resize_features",
]

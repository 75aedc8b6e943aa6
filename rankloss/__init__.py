"""Plackett-Luce ranking losses for CLIP-style pretraining."""

from rankloss.alip import ALIPLoss
from rankloss.attachment import attach, export
from rankloss.contrastive import CyCLIPLoss, SigLipLoss
from rankloss.distillation import (
    GramAnchor,
    GramLoss,
    KoLeoLoss,
    RelationalAngleLoss,
    RelationalDistanceLoss,
)
from rankloss.ito import ITOLoss
from rankloss.ito_fusion import ITOFusion
from rankloss.plackett_luce import plackett_luce_nll, rankings
from rankloss.ranking import ClipLoss, HighOrderPLLoss, RankCLIPLoss
from rankloss.transitions import TransitionHeads, Transitions

__version__ = "0.1.0"

__all__ = [
    "ALIPLoss",
    "ClipLoss",
    "CyCLIPLoss",
    "GramAnchor",
    "GramLoss",
    "HighOrderPLLoss",
    "ITOFusion",
    "ITOLoss",
    "KoLeoLoss",
    "RankCLIPLoss",
    "RelationalAngleLoss",
    "RelationalDistanceLoss",
    "SigLipLoss",
    "TransitionHeads",
    "Transitions",
    "attach",
    "export",
    "plackett_luce_nll",
    "rankings",
]

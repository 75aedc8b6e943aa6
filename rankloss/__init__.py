"""Plackett-Luce ranking losses for CLIP-style pretraining."""

from typing import TYPE_CHECKING, Any

from rankloss.alip import ALIPLoss
from rankloss.attachment import attach, export
from rankloss.contrastive import CyCLIPLoss, SigLipLoss
from rankloss.distillation import (
    GramAnchor,
    GramLoss,
    KoLeoLoss,
    PatchDistillation,
    RelationalAngleLoss,
    RelationalDistanceLoss,
)
from rankloss.grad_cache import GradCache
from rankloss.ito import ITOLoss
from rankloss.ito_fusion import ITOFusion
from rankloss.plackett_luce import plackett_luce_nll, rankings
from rankloss.ranking import ClipLoss, HighOrderPLLoss, RankCLIPLoss
from rankloss.reranking import PlackettLuceLoss
from rankloss.transitions import TransitionHeads, Transitions

if TYPE_CHECKING:
    from rankloss.dinorankclip import DinoRankCLIP

__version__ = "0.1.0"

__all__ = [
    "ALIPLoss",
    "ClipLoss",
    "CyCLIPLoss",
    "DinoRankCLIP",
    "GradCache",
    "GramAnchor",
    "GramLoss",
    "HighOrderPLLoss",
    "ITOFusion",
    "ITOLoss",
    "KoLeoLoss",
    "PatchDistillation",
    "PlackettLuceLoss",
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


def __getattr__(name: str) -> Any:
    """Import DinoRankCLIP when it is asked for: it imports huggingface_hub, which takes a while."""
    if name == "DinoRankCLIP":
        from rankloss.dinorankclip import DinoRankCLIP

        return DinoRankCLIP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Teacher, student, and the layers that bring features into an embedding; they know no loss."""

from rankloss.fusion.attention import ChannelSpatialAttention
from rankloss.fusion.gate import ConflictAwareGate
from rankloss.fusion.injection import (
    FUSION_VARIANTS,
    DualFusion,
    FusionOutput,
    FusionStages,
    FusionVariant,
    Injection,
    MultiScaleFusion,
)
from rankloss.fusion.pca import TokenPCA
from rankloss.fusion.pyramid import SpatialPyramidPool1d
from rankloss.fusion.refiner import SelfAttentionRefiner
from rankloss.fusion.student import DualBranchStudent, ImageBranch, StudentTokens, TextBranch
from rankloss.fusion.teacher import Dinov3Teacher, TeacherFeatures

__all__ = [
    "FUSION_VARIANTS",
    "ChannelSpatialAttention",
    "ConflictAwareGate",
    "Dinov3Teacher",
    "DualBranchStudent",
    "DualFusion",
    "FusionOutput",
    "FusionStages",
    "FusionVariant",
    "ImageBranch",
    "Injection",
    "MultiScaleFusion",
    "SelfAttentionRefiner",
    "SpatialPyramidPool1d",
    "StudentTokens",
    "TeacherFeatures",
    "TextBranch",
    "TokenPCA",
]

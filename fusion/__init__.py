"""Layers that bring teacher features into a tower's embedding; they know no loss."""

if __name__ != "rankloss.fusion":
    raise ImportError(
        "this folder is installed and imported as `rankloss.fusion`; "
        "importing it by another name would load a second copy of its layers"
    )

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
from rankloss.fusion.pyramid import SpatialPyramidPool1d
from rankloss.fusion.refiner import SelfAttentionRefiner

__all__ = [
    "FUSION_VARIANTS",
    "ChannelSpatialAttention",
    "ConflictAwareGate",
    "DualFusion",
    "FusionOutput",
    "FusionStages",
    "FusionVariant",
    "Injection",
    "MultiScaleFusion",
    "SelfAttentionRefiner",
    "SpatialPyramidPool1d",
]

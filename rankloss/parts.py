"""The parts of DinoRankCLIP, from modules or from plain data."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from rankloss.alip import ALIPLoss
from rankloss.contrastive import CyCLIPLoss, SigLipLoss
from rankloss.fusion import DualBranchStudent
from rankloss.ito import ITOLoss
from rankloss.ranking import ClipLoss, HighOrderPLLoss, RankCLIPLoss
from rankloss.specs import Spec, build
from rankloss.two_towers import Architecture, build_model, sizes_of

LOSSES = (HighOrderPLLoss, RankCLIPLoss, ClipLoss, SigLipLoss, CyCLIPLoss, ALIPLoss, ITOLoss)
"""Losses that may be given by name."""


def given_or_built(model: nn.Module | None, architecture: Architecture | None) -> nn.Module:
    """Return the model if there is one, else build it with weights at their start.

    Raises:
        ValueError: neither is given.
    """
    if model is not None:
        return model
    if architecture is None:
        raise ValueError(
            "DinoRankCLIP needs a model or an architecture; a model that was saved without "
            "architecture is given again: from_pretrained(folder, model=...)"
        )
    return build_model(architecture)


def width_of(model: nn.Module, given: int | None) -> int:
    """Return the width of the embeddings: the one given, or the model's.

    Raises:
        ValueError: nothing is given, and the model does not say.
    """
    width = sizes_of(model).embed_dim if given is None else given
    if width is None:
        raise ValueError(
            f"DinoRankCLIP: {type(model).__name__} does not say how wide its embeddings are; "
            "give embed_dim="
        )
    return width


def build_loss(loss: nn.Module | Spec, embed_dim: int) -> nn.Module:
    """Build the loss of the embeddings, or take the one given.

    Raises:
        ValueError, TypeError: as `rankloss.specs.build`.
    """
    if isinstance(loss, Mapping) and loss.get("HighOrderPLLoss") is not None:
        loss = {"HighOrderPLLoss": {"embed_dim": embed_dim, **(loss["HighOrderPLLoss"] or {})}}
    return build("loss", loss, LOSSES)


def build_student(
    model: nn.Module,
    given: DualBranchStudent | Mapping[str, Any] | None,
    *,
    image: bool,
    text: bool,
) -> DualBranchStudent:
    """Build the student with the model's sizes, or take the one given."""
    if isinstance(given, nn.Module):
        return given
    sizes, options = sizes_of(model), dict(given or {})
    if "DualBranchStudent" in options:
        build("student", options, (DualBranchStudent,))  # raises: it was saved as a module
    for name in ("image_size", "context_length"):
        if getattr(sizes, name) is not None:
            options.setdefault(name, getattr(sizes, name))
    if text and sizes.vocabulary is not None:  # the end token of CLIP's tokenizer is its last
        words = {"vocabulary": sizes.vocabulary, "end_token": sizes.vocabulary - 1}
        options["text_options"] = {**words, **options.get("text_options", {})}
    return DualBranchStudent(image, text, **options)

"""Recipes: what is minimised, with every weight, in plain files (examples/recipes/*.yaml).

A recipe names a loss of `rankloss` with its arguments, and the parts of `rankloss.DinoRankCLIP`
around it. This module reads recipes and builds models and their inputs' transforms from them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
import yaml
from torch import Tensor

from examples.cc3m.distilled import AnchorSettings, DistilledCLIP
from examples.cc3m.multi_view import MultiViewCLIP, check_inputs
from examples.common.files import UserError
from examples.common.images import CentreCrop
from rankloss import DinoRankCLIP
from rankloss.distillation import PatchDistillation
from rankloss.fusion import FUSION_VARIANTS
from rankloss.parts import build_loss
from rankloss.specs import build

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Arguments of `DinoRankCLIP`, apart from the model.

    Args:
        label: name in tables and figures.
        loss: loss of the embeddings, {"class name": {arguments}}.
        model: further arguments of open_clip.CLIP that the loss wants.
        variant: key of `rankloss.fusion.FUSION_VARIANTS`; "none" has no student.
        distillation: the student's, {"PatchDistillation": {arguments}}, or None.
        gate_weight: weight of mean |gate|.
        teacher_scale: resolution of the teacher's features, at least, as a multiple of the model's
            image size. Finer features are averaged to the student's grid before the Gram loss
            normalises them (DINOv3's high-resolution Gram).
        text_teacher: distil the student's text branch, too, as `DistilledCLIP` does.
        anchor: arguments of `AnchorSettings`, or None.
        views: random crops of each image.
        captions: where each caption of a sample comes from, as in `decode_caption`.
        fusion: arguments of `ITOFusion`, for training only, or None.
    """

    label: str
    loss: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    variant: str = "none"
    distillation: dict[str, Any] | None = None
    gate_weight: float = 1e-3
    teacher_scale: float = 1.0
    text_teacher: bool = False
    anchor: dict[str, Any] | None = None
    views: int = 1
    captions: Sequence[str] = ("txt",)
    fusion: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.loss, dict):
            raise ValueError(f"loss must be {{'class name': {{arguments}}}}, got {self.loss!r}")
        with torch.random.fork_rng(devices=[]):  # a trial draws weights
            build_loss({name: arguments or {} for name, arguments in self.loss.items()}, 8)
        check_inputs(self.loss, self.views, len(self.captions), self.fusion)
        if self.variant not in FUSION_VARIANTS:
            known = ", ".join(FUSION_VARIANTS)
            raise ValueError(f"there is no variant {self.variant!r}; there are {known}")
        if self.multi_view and self.variant != "none":
            raise ValueError(
                "an injection into several views or captions is not defined; choose variant: none"
            )
        if not self.gate_weight >= 0:
            raise ValueError(f"gate_weight must not be negative, got {self.gate_weight}")
        self._check_distillation()

    def _check_distillation(self) -> None:
        if not self.teacher_scale >= 1:
            raise ValueError(f"teacher_scale must be at least 1, got {self.teacher_scale}")
        asked = {"text_teacher": self.text_teacher, "anchor": self.anchor is not None}
        asked["teacher_scale"] = self.teacher_scale > 1
        if self.distillation is None:
            if any(asked.values()):
                names = " and ".join(name for name, there in asked.items() if there)
                raise ValueError(f"{names} belong to a distillation; there is none")
            return
        distils: Any = build("distillation", self.distillation, (PatchDistillation,))
        if not FUSION_VARIANTS[self.variant].image:
            raise ValueError(
                "distillation trains a student that only an injection into the image tower "
                "uses; choose another variant, or leave distillation out"
            )
        if self.text_teacher and not FUSION_VARIANTS[self.variant].text:
            raise ValueError(
                f"text_teacher distils a text branch, which variant {self.variant!r} has not"
            )
        if self.text_teacher and distils.relational_weight == 0:
            raise ValueError("text_teacher is a relational loss; relational_weight must not be 0")
        if self.anchor is not None:
            AnchorSettings(**self.anchor)
            if not distils.needs_teacher:
                raise ValueError("anchor needs a student that is distilled; all its weights are 0")

    @property
    def of_training(self) -> dict[str, Any]:
        """Return what `DistilledCLIP` takes beside the arguments of `DinoRankCLIP`, if anything."""
        if not self.text_teacher and self.anchor is None:
            return {}
        anchor = None if self.anchor is None else AnchorSettings(**self.anchor)
        return {"text_teacher": self.text_teacher, "anchor": anchor}

    @property
    def multi_view(self) -> bool:
        """Say if samples have more than one view or caption."""
        return self.views > 1 or len(self.captions) > 1


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its name in `recipe_names()`, or from a file ending in .yaml or .yml.

    Args:
        name_or_path: which one.
        overrides: changes such as "loss.HighOrderPLLoss.order=2"; values are YAML.

    Raises:
        UserError: there is no such recipe, it is not YAML, it has an unknown or missing key, or
            arguments that its classes refuse; says which.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"there is no recipe {str(name_or_path)!r}; give a .yaml file, or one of "
            f"{', '.join(recipe_names())}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    known = [each.name for each in fields(Recipe)]
    if not isinstance(data, dict) or not {"label", "loss"} <= data.keys():
        raise UserError(f"{path}: a recipe has a label, and a loss")
    for change in overrides:
        _override(data, change)
    if data.keys() - set(known):
        unknown = ", ".join(sorted(map(str, data.keys() - set(known))))
        raise UserError(f"{path}: unknown {unknown}; there are {', '.join(known)}")
    try:
        return Recipe(**data)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error


def _override(data: dict[str, Any], change: str) -> None:
    place, equals, value = change.partition("=")
    *sections, last = place.split(".")
    for name in sections:
        data = data.setdefault(name, {}) if isinstance(data, dict) else {}
    if not equals or not isinstance(data, dict):
        raise UserError(
            f"cannot override {change!r}; write for example loss.HighOrderPLLoss.order=2"
        )
    data[last] = yaml.safe_load(value)


# ---------------------------------------------------------------- models and their inputs

CONTEXT_LENGTH = 32
SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 64},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 2, "layers": 2},
}
"""In the format of open_clip's model_configs: a residual network and a small text Transformer."""

SMALL_STUDENT: dict[str, Any] = {
    "token_dim": 64,
    "image_size": 64,
    "context_length": CONTEXT_LENGTH,
    "image_options": {"embed_dim": 64, "depth": 2, "num_heads": 2},
    "text_options": {"width": 64, "depth": 1, "heads": 2},
}
"""Arguments of `DualBranchStudent`: ViT-Tiny cut down in the same way."""


def model_config(name: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model by name, or of "tiny".

    Raises:
        UserError: there is no such model.
    """
    config = SMALL_CLIP if name == "tiny" else open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"open_clip has no model {name!r}; open_clip.list_models() names them")
    return {k: config[k] for k in ("embed_dim", "vision_cfg", "text_cfg")}


def student_options(name: str) -> dict[str, Any] | None:
    """Return arguments of `DualBranchStudent` beside a model: ViT-Tiny, or less beside "tiny"."""
    return SMALL_STUDENT if name == "tiny" else None


def build_towers(
    recipe: Recipe,
    config: dict[str, Any],
    student: dict[str, Any] | None = None,
    *,
    inference: bool = False,
) -> DinoRankCLIP:
    """Build a model and everything a recipe puts around it, freshly initialised.

    Args:
        recipe: what to train with.
        config: the model's, which is built first: every recipe starts from the same one.
        student: arguments of `DualBranchStudent`; None: ViT-Tiny of the model's sizes.
        inference: leave out what only training has.

    Raises:
        UserError: the model cannot be built from its configuration.
    """
    architecture = {"open_clip": {**copy.deepcopy(config), **recipe.model, "output_dict": True}}
    common: dict[str, Any] = {"architecture": architecture, "loss": recipe.loss}
    injected: dict[str, Any] = {
        "variant": recipe.variant,
        "student": student,
        "distillation": recipe.distillation,
        "gate_weight": recipe.gate_weight,
    }
    try:
        if recipe.multi_view and not inference:
            towers: DinoRankCLIP = MultiViewCLIP(recipe.fusion, **common)
        elif recipe.of_training and not inference:
            towers = DistilledCLIP(**recipe.of_training, **common, **injected)
        else:
            towers = DinoRankCLIP(**common, **injected)
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe {recipe.label!r} does not fit the model: {error}") from error
    visual: Any = towers.model.visual
    visual.to(memory_format=torch.channels_last)  # convolutions are faster that way
    return towers


def build_transform(config: dict[str, Any]) -> CentreCrop:
    """Return open_clip's transform for evaluation: PIL RGB -> (3, H, W) float32, normalised."""
    return CentreCrop(config["vision_cfg"]["image_size"])


def build_tokenizer(config: dict[str, Any]) -> Callable[[list[str]], Tensor]:
    """Return open_clip's byte-pair tokenizer: B captions -> (B, L) int64, cut at the context."""
    tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(
        context_length=config["text_cfg"]["context_length"]
    )
    return tokenizer

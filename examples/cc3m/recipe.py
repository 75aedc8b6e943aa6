"""Recipes: what is minimised, with every weight, in plain files (examples/recipes/*.yaml)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import dacite
import yaml
from torch import nn

from examples.cc3m.files import UserError
from rankloss import ClipLoss, CyCLIPLoss, HighOrderPLLoss, SigLipLoss
from rankloss.fusion import FUSION_VARIANTS, FusionVariant

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

Section = TypeVar("Section")


@dataclass(frozen=True)
class ClipSettings:
    """`rankloss.ClipLoss`."""

    name: Literal["clip"] = "clip"
    contrastive_weight: float = 1.0

    def build(self, embed_dim: int) -> nn.Module:
        return ClipLoss(contrastive_weight=self.contrastive_weight)


@dataclass(frozen=True)
class SigLipSettings:
    """`rankloss.SigLipLoss`, and where the model's scale (not its logarithm) and bias start."""

    name: Literal["siglip"] = "siglip"
    initial_scale: float = 10.0
    initial_bias: float = -10.0

    def __post_init__(self) -> None:
        if self.initial_scale <= 0:
            raise ValueError(f"initial_scale must be positive, got {self.initial_scale}")

    def build(self, embed_dim: int) -> nn.Module:
        return SigLipLoss()


@dataclass(frozen=True)
class CyClipSettings:
    """`rankloss.CyCLIPLoss`, with its arguments."""

    name: Literal["cyclip"] = "cyclip"
    in_modal_weight: float = 0.25
    cross_modal_weight: float = 0.25

    def build(self, embed_dim: int) -> nn.Module:
        return CyCLIPLoss(
            in_modal_weight=self.in_modal_weight, cross_modal_weight=self.cross_modal_weight
        )


@dataclass(frozen=True)
class HighOrderSettings:
    """`rankloss.HighOrderPLLoss`, with its arguments; order 1 is RankCLIP.

    Training multiplies the ranking terms by RankCLIP's ramp, see its `set_progress`.
    """

    name: Literal["high_order"] = "high_order"
    order: int = 3
    transition_dim: int = 32
    top_k: int | None = None
    contrastive_weight: float = 1.0
    cross_modal_weight: float = 1 / 16
    in_modal_weight: float = 1 / 16
    discount: Literal["none", "log"] = "none"
    exclude_self: bool = False
    share_transitions: bool = True

    def build(self, embed_dim: int) -> nn.Module:
        options = {each.name: getattr(self, each.name) for each in fields(self)}
        del options["name"]
        return HighOrderPLLoss(embed_dim, **options)


LossSettings = ClipSettings | SigLipSettings | CyClipSettings | HighOrderSettings
LOSSES: dict[str, type[Any]] = {each.name: each for each in get_args(LossSettings)}
"""By the name that a recipe calls a loss."""


@dataclass(frozen=True)
class DistillationSettings:
    """Of the student's image branch from the teacher's patches; see `towers.PatchDistillation`.

    There is no warm-up: these terms train the student alone, and what it adds to the embeddings
    starts at zero. The weights are this project's choice.

    Args:
        gram_weight: of the mean-form Gram loss.
        gram_level, gram_negatives, gram_max_tokens: `rankloss.GramLoss`'s level, negatives and
            max_tokens.
        relational_weight: of the relational distance and of the relational angle loss each.
        relations: what stands for an image there: the teacher's mean patch, or its CLS token.
    """

    gram_weight: float = 1.0
    gram_level: Literal["image", "batch"] = "image"
    gram_negatives: Literal["keep", "clamp", "clamp_teacher"] = "keep"
    gram_max_tokens: int | None = None
    relational_weight: float = 1.0
    relations: Literal["patches", "cls"] = "patches"


@dataclass(frozen=True)
class InjectionSettings:
    """Of the student's tokens into the embeddings.

    Args:
        variant: a key of `rankloss.fusion.FUSION_VARIANTS`.
        gate_weight: of mean |gate|; without a gate there is no such term.
    """

    variant: str = "full"
    gate_weight: float = 1e-3

    def __post_init__(self) -> None:
        if self.variant not in FUSION_VARIANTS:
            there = ", ".join(FUSION_VARIANTS)
            raise ValueError(f"there is no fusion variant {self.variant!r}; there are {there}")


@dataclass(frozen=True)
class Recipe:
    """What is minimised, apart from the model, the data and the schedule.

    Args:
        label: how tables and figures call it.
        loss: on the embeddings.
        injection: None: the embeddings are the model's own, and there is no student.
        distillation: of the student; None: it is trained by the loss on the embeddings alone.

    Raises:
        ValueError: a weight is negative, or a student is distilled that nothing would use.
    """

    label: str
    loss: LossSettings
    injection: InjectionSettings | None = None
    distillation: DistillationSettings | None = None

    def __post_init__(self) -> None:
        for section in (self.loss, self.injection, self.distillation):
            for each in fields(section) if section is not None else ():
                if each.name.endswith("_weight") and getattr(section, each.name) < 0:
                    raise ValueError(
                        f"{each.name} must not be negative, got {getattr(section, each.name)}"
                    )
        if self.distillation is not None and not self.variant.image:
            raise ValueError(
                "distillation trains a student that only an injection into the image tower uses; "
                "choose another injection.variant, or leave distillation out"
            )

    @property
    def variant(self) -> FusionVariant:
        """The injection's; "none" without one."""
        return FUSION_VARIANTS["none" if self.injection is None else self.injection.variant]

    @property
    def model_options(self) -> dict[str, float]:
        """Further arguments of open_clip.CLIP or open_clip.create_model that the loss wants."""
        if not isinstance(self.loss, SigLipSettings):
            return {}
        return {
            "init_logit_scale": math.log(self.loss.initial_scale),
            "init_logit_bias": self.loss.initial_bias,
        }

    def build_loss(self, embed_dim: int) -> nn.Module:
        """The loss of embeddings, freshly initialised.

        Args:
            embed_dim: width of the embeddings.

        Raises:
            UserError: the settings contradict each other.
        """
        try:
            return self.loss.build(embed_dim)
        except ValueError as error:
            raise UserError(f"recipe {self.label!r}: {error}") from error


def recipe_names() -> list[str]:
    """Of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by its name in `recipe_names()`, or from a file ending in .yaml or .yml.

    Raises:
        UserError: there is no such recipe, it is not YAML, or it has an unknown or missing key, a
            value of the wrong type, or impossible settings; says which, and what there is.
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
    return _recipe(data, str(path))


def _recipe(data: object, where: str) -> Recipe:
    if not isinstance(data, dict) or not isinstance(data.get("loss"), dict):
        raise UserError(f"{where}: a recipe has a label, and a loss with a name")
    loss = data["loss"]
    if loss.get("name") not in LOSSES:
        raise UserError(
            f"{where}: loss.name is {loss.get('name')!r}, but must be one of {', '.join(LOSSES)}"
        )
    sections = {
        "loss": LOSSES[loss["name"]],
        "injection": InjectionSettings,
        "distillation": DistillationSettings,
    }
    built: dict[str, Any] = {
        name: _section(section, data[name], f"{where}: {name}")
        for name, section in sections.items()
        if data.get(name) is not None
    }
    return _section(Recipe, {**data, **built}, where)


def _section(kind: type[Section], data: object, where: str) -> Section:
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a mapping of settings, got {data!r}")
    config = dacite.Config(strict=True, type_hooks={float: _number, int: _whole})
    try:
        return dacite.from_dict(kind, data, config)
    except dacite.UnexpectedDataError as error:
        known = ", ".join(each.name for each in fields(kind))  # type: ignore[arg-type]
        unknown = ", ".join(sorted(map(str, error.keys)))
        raise UserError(f"{where}: unknown {unknown}; there are {known}") from error
    except dacite.WrongTypeError as error:
        choices = get_args(error.field_type) if get_origin(error.field_type) is Literal else ()
        remedy = f"; choose one of {', '.join(choices)}" if choices else ""
        raise UserError(f"{where}: {error}{remedy}") from error
    except (dacite.DaciteError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def _number(value: object) -> object:
    """YAML has whole numbers too."""
    return float(value) if type(value) is int else _whole(value)


def _whole(value: object) -> object:
    """To Python, true is a number; as a string it is refused."""
    return str(value) if isinstance(value, bool) else value

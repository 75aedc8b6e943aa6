"""Recipe files: what comes with the project, and what is wrong with a bad one."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples.cc3m.files import UserError
from examples.cc3m.recipe import (
    RECIPES,
    DistillationSettings,
    HighOrderSettings,
    InjectionSettings,
    Recipe,
    load_recipe,
    recipe_names,
)
from rankloss import ClipLoss, CyCLIPLoss, HighOrderPLLoss, RankCLIPLoss, SigLipLoss
from rankloss.fusion import FUSION_VARIANTS
from tests.helpers.features import features

HIGH_ORDER: dict[str, Any] = {"name": "high_order", "order": 3}


def test_the_methods_recipes_are_there() -> None:
    named = {"clip", "siglip", "cyclip", "rankclip", "highorder_r2", "highorder_r3"}
    named |= {"dinorankclip", "image_only", *(f"fusion_{name}" for name in FUSION_VARIANTS)}
    assert set(recipe_names()) == named
    labels = [load_recipe(name).label for name in recipe_names()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_spells_out_every_setting_it_has(name: str) -> None:
    """A file says all its weights: reading it needs no look at defaults."""
    said = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    recipe = load_recipe(name)
    without_effect = {
        "injection": set()
        if recipe.variant.stages.gate and name != "fusion_none"
        else {"gate_weight"},
        "loss": {"transition_dim", "share_transitions"}
        if said["loss"].get("order") == 1
        else set(),
        "distillation": set(),
    }
    for section, unsaid in without_effect.items():
        if section in said:
            there = asdict(getattr(recipe, section))
            assert set(there) - set(said[section]) == unsaid, section
            assert {key: there[key] for key in said[section]} == said[section]


def test_weights_are_the_methods() -> None:
    full = load_recipe("dinorankclip")
    assert isinstance(full.loss, HighOrderSettings)
    assert (full.loss.cross_modal_weight, full.loss.in_modal_weight) == (1 / 16, 1 / 16)
    assert full.distillation == DistillationSettings()
    assert (full.distillation.gram_weight, full.distillation.relational_weight) == (1.0, 1.0)
    assert full.injection == InjectionSettings("full", 1e-3)
    assert replace(load_recipe("fusion_full"), label=full.label) == full
    image_only = load_recipe("image_only")
    assert replace(load_recipe("fusion_image-only"), label=image_only.label) == image_only
    third = load_recipe("highorder_r3")
    assert full == replace(
        third, label=full.label, injection=full.injection, distillation=full.distillation
    )
    for name in FUSION_VARIANTS:
        recipe = load_recipe(f"fusion_{name}")
        assert recipe.variant is FUSION_VARIANTS[name]
        assert recipe.loss == third.loss
        assert recipe.distillation == (None if name == "none" else DistillationSettings())


@pytest.mark.parametrize(
    ("name", "kind", "reference"),
    [
        ("clip", ClipLoss, ClipLoss()),
        ("siglip", SigLipLoss, SigLipLoss()),
        ("cyclip", CyCLIPLoss, CyCLIPLoss()),
        ("rankclip", HighOrderPLLoss, RankCLIPLoss()),
        ("highorder_r2", HighOrderPLLoss, HighOrderPLLoss(8, 2)),
        ("highorder_r3", HighOrderPLLoss, HighOrderPLLoss(8, 3)),
    ],
)
def test_losses_are_those_of_the_library(
    name: str, kind: type[torch.nn.Module], reference: torch.nn.Module
) -> None:
    loss = load_recipe(name).build_loss(8)
    assert isinstance(loss, kind)
    assert {n: p.shape for n, p in loss.named_parameters()} == {
        n: p.shape for n, p in reference.named_parameters()
    }
    image, text = features(6)
    assert torch.equal(loss(image, text, 5.0, -1.0), reference(image, text, 5.0, -1.0))


def test_settings_reach_the_loss() -> None:
    settings = HighOrderSettings(
        order=2,
        transition_dim=4,
        top_k=3,
        contrastive_weight=0.5,
        cross_modal_weight=0.1,
        in_modal_weight=0.2,
        discount="log",
        exclude_self=True,
        share_transitions=False,
    )
    loss = Recipe("x", settings).build_loss(8)
    expected = HighOrderPLLoss(
        8,
        2,
        transition_dim=4,
        top_k=3,
        contrastive_weight=0.5,
        cross_modal_weight=0.1,
        in_modal_weight=0.2,
        discount="log",
        exclude_self=True,
        share_transitions=False,
    )
    assert repr(loss) == repr(expected)
    image, text = features(6)
    assert torch.equal(loss(image, text, 5.0), expected(image, text, 5.0))


def test_siglip_starts_from_its_own_scale_and_bias() -> None:
    options = load_recipe("siglip").model_options
    assert options == {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    assert load_recipe("dinorankclip").model_options == {}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    data = {"label": "mine", "loss": {**HIGH_ORDER, "order": 5, "contrastive_weight": 1}}
    path.write_text(yaml.safe_dump(data))
    assert load_recipe(path) == load_recipe(str(path)) == Recipe("mine", HighOrderSettings(order=5))


def wrong(**changes: Any) -> dict[str, Any]:
    return {"label": "x", "loss": HIGH_ORDER, **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "a recipe has a label, and a loss with a name"),
        ({"label": "x"}, "a recipe has a label, and a loss with a name"),
        (wrong(loss={"name": "moco"}), "'moco', but must be one of clip, siglip, cyclip, high_ord"),
        (wrong(loss={**HIGH_ORDER, "lambda": 1}), "loss: unknown lambda; there are name, order"),
        (wrong(loss={"name": "clip", "order": 1}), "loss: unknown order; there are name, contras"),
        (wrong(schedule={}), "unknown schedule; there are label, loss, injection, distillation"),
        ({"loss": HIGH_ORDER}, 'missing value for field "label"'),
        (wrong(loss={**HIGH_ORDER, "order": "3"}), 'loss: wrong value type for field "order"'),
        (wrong(loss={**HIGH_ORDER, "order": True}), 'loss: wrong value type for field "order"'),
        (wrong(loss={**HIGH_ORDER, "top_k": 2.5}), 'loss: wrong value type for field "top_k"'),
        (wrong(loss={**HIGH_ORDER, "discount": "l"}), "discount.*choose one of none, log"),
        (wrong(loss={**HIGH_ORDER, "in_modal_weight": True}), 'field "in_modal_weight"'),
        (wrong(loss={**HIGH_ORDER, "in_modal_weight": -1}), "in_modal_weight must not be negative"),
        (wrong(loss={"name": "siglip", "initial_scale": 0}), "initial_scale must be positive"),
        (wrong(injection="full"), "injection must be a mapping of settings, got 'full'"),
        (wrong(injection={"variant": "fulll"}), "no fusion variant 'fulll'; there are none, pyr"),
        (wrong(distillation={}), "only an injection into the image tower uses"),
        (wrong(distillation={}, injection={"variant": "none"}), "choose another injection.variant"),
        (
            wrong(injection={}, distillation={"relations": "mean"}),
            "distillation: .*choose one of patches, cls",
        ),
    ],
)
def test_bad_files_are_refused_with_the_remedy(tmp_path: Path, data: Any, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path)
    assert "mine.yaml" in str(error.value)


def test_unknown_names_are_listed() -> None:
    with pytest.raises(UserError, match=r"no recipe 'clap'; give a \.yaml file, or one of clip, "):
        load_recipe("clap")


@pytest.mark.parametrize("content", [b"label: [", b"\xff\xfe"], ids=["syntax", "bytes"])
def test_what_is_not_yaml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.yaml is not YAML"):
        load_recipe(path)


def test_contradictions_show_when_the_loss_is_built() -> None:
    settings = HighOrderSettings(order=2, cross_modal_weight=0.0, in_modal_weight=0.0)
    with pytest.raises(UserError, match="recipe 'mine': "):
        Recipe("mine", settings).build_loss(8)

"""Recipe files: what comes with the project, and what is wrong with a bad one."""

import inspect
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from examples.cc3m.distilled import AnchorSettings
from examples.cc3m.recipe import (
    RECIPES,
    SMALL_CLIP,
    build_towers,
    load_recipe,
    recipe_names,
)
from examples.common.files import UserError
from examples.common.tiny import TINY_CLIP, TINY_STUDENT
from rankloss import ClipLoss, CyCLIPLoss, HighOrderPLLoss, RankCLIPLoss, SigLipLoss
from rankloss.distillation import PatchDistillation
from rankloss.fusion import FUSION_VARIANTS
from rankloss.parts import LOSSES
from tests.helpers.features import features

THIRD = {"HighOrderPLLoss": {"order": 3}}


def test_the_methods_recipes_are_there() -> None:
    named = {"alip", "ito", "clip", "siglip", "cyclip", "rankclip", "highorder_r2", "highorder_r3"}
    named |= {"dinorankclip", "image_only", *(f"fusion_{name}" for name in FUSION_VARIANTS)}
    assert set(recipe_names()) == named
    labels = [load_recipe(name).label for name in recipe_names()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_spells_out_every_weight_it_has(name: str) -> None:
    """Reading the file needs no look at defaults: every number of the objective is in it."""
    said = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    classes = {c.__name__: c for c in LOSSES}
    ((loss, arguments),) = said["loss"].items()
    ends = ("_weight", "_gamma", "momentum")
    weights = {x for x in inspect.signature(classes[loss]).parameters if x.endswith(ends)}
    assert weights <= arguments.keys()
    if said.get("distillation"):
        known = set(inspect.signature(PatchDistillation).parameters)
        assert known - set(said["distillation"]["PatchDistillation"]) == {"distance", "angle"}
    if said.get("anchor"):
        assert said["anchor"].keys() == inspect.signature(AnchorSettings).parameters.keys()
    gated = FUSION_VARIANTS[said.get("variant", "none")].stages.gate
    assert ("gate_weight" in said) == (gated and said.get("variant", "none") != "none")


def test_weights_are_the_methods() -> None:
    full, third = load_recipe("fusion_full"), load_recipe("highorder_r3")
    assert full.loss["HighOrderPLLoss"]["cross_modal_weight"] == 1 / 16
    assert full.loss["HighOrderPLLoss"]["in_modal_weight"] == 1 / 16
    assert full.distillation is not None
    distillation = full.distillation["PatchDistillation"]
    assert (distillation["gram_weight"], distillation["relational_weight"]) == (1.0, 1.0)
    assert (full.variant, full.gate_weight) == ("full", 1e-3)
    image_only, method = load_recipe("image_only"), load_recipe("dinorankclip")
    assert replace(load_recipe("fusion_image-only"), label=image_only.label) == image_only
    more: dict[str, Any] = {"teacher_scale": 2.0, "text_teacher": True, "anchor": method.anchor}
    loss = {"HighOrderPLLoss": {**full.loss["HighOrderPLLoss"], "top_k": 256}}
    assert replace(full, label=method.label, loss=loss, **more) == method
    assert method.anchor == asdict(AnchorSettings(1.0, 0.999, first=0.3, every=0.1, most=3))
    for name in FUSION_VARIANTS:
        recipe = load_recipe(f"fusion_{name}")
        assert recipe.variant == name
        assert recipe.loss == third.loss
        assert recipe.distillation == (None if name == "none" else full.distillation)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("clip", ClipLoss()),
        ("siglip", SigLipLoss()),
        ("cyclip", CyCLIPLoss()),
        ("rankclip", RankCLIPLoss()),
        ("highorder_r2", HighOrderPLLoss(32, 2)),
        ("highorder_r3", HighOrderPLLoss(32, 3)),
    ],
)
def test_losses_are_those_of_the_library(name: str, reference: nn.Module) -> None:
    towers = build_towers(load_recipe(name), TINY_CLIP)
    loss = towers.loss
    assert {n: p.shape for n, p in loss.named_parameters()} == {
        n: p.shape for n, p in reference.named_parameters()
    }
    image, text = features(6, 32)
    loss.load_state_dict(reference.state_dict())
    assert torch.equal(loss(image, text, 5.0, -1.0), reference(image, text, 5.0, -1.0))


def test_models_start_from_the_same_weights_and_siglip_from_its_own_scale() -> None:
    built = {}
    for name in ("clip", "siglip", "dinorankclip"):
        torch.manual_seed(0)
        built[name] = build_towers(load_recipe(name), TINY_CLIP, TINY_STUDENT)
    states = {name: towers.model.state_dict() for name, towers in built.items()}
    for key, value in states["clip"].items():
        assert torch.equal(value, states["dinorankclip"][key]), key
        assert torch.equal(value, states["siglip"][key]) == (key != "logit_scale"), key
    assert float(states["siglip"]["logit_scale"]) == pytest.approx(math.log(10))
    assert float(states["siglip"]["logit_bias"]) == -10
    assert built["dinorankclip"].student is not None
    assert built["clip"].student is None


def test_reading_a_recipe_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_recipe("highorder_r3")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_recipe_that_does_not_fit_the_model_is_refused() -> None:
    recipe = load_recipe("dinorankclip")
    with pytest.raises(UserError, match=r"third order .* does not fit the model: "):
        build_towers(recipe, SMALL_CLIP, {"image_options": {"width": 3}})


def test_a_file_of_ones_own_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"label": "mine", "loss": {"HighOrderPLLoss": {"order": 5}}}))
    assert load_recipe(path) == load_recipe(str(path))
    changes = ["loss.HighOrderPLLoss.order=2", "loss.HighOrderPLLoss.top_k=8", "variant=pyramid"]
    changed = load_recipe(path, changes)
    assert changed.loss == {"HighOrderPLLoss": {"order": 2, "top_k": 8}}
    assert changed.variant == "pyramid"
    for bad in ("loss.order", "label.x=3"):
        with pytest.raises(UserError, match="write for example"):
            load_recipe(path, [bad])


def wrong(**changes: Any) -> dict[str, Any]:
    return {"label": "x", "loss": THIRD, **changes}


def high(**arguments: Any) -> dict[str, Any]:
    return wrong(loss={"HighOrderPLLoss": {"order": 3, **arguments}})


ANCHOR: dict[str, Any] = {"weight": 1.0, "decay": 0.9, "first": 0.0, "every": 0.5}


def distilled(arguments: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    distillation = {"PatchDistillation": arguments or {}}
    return wrong(**{"variant": "full", "distillation": distillation, **changes})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "a recipe has a label, and a loss"),
        ({"label": "x"}, "a recipe has a label, and a loss"),
        ({"loss": THIRD}, "a recipe has a label, and a loss"),
        (wrong(loss={"MoCo": {}}), "there is no 'MoCo'; choose one of HighOrderPLLoss, "),
        (wrong(loss="clip"), "loss must be .*got 'clip'"),
        (wrong(loss={"ClipLoss": {}, "SigLipLoss": {}}), "one class name with its arguments"),
        (wrong(loss={"ClipLoss": {"order": 1}}), "unexpected keyword argument 'order'|order"),
        (high(**{"lambda": 1}), "unexpected keyword argument 'lambda'|lambda"),
        (high(discount="l"), "discount"),
        (high(in_modal_weight=-1), "in_modal_weight|negative"),
        (high(cross_modal_weight=0.0, in_modal_weight=0.0), "weight"),
        (wrong(schedule={}), "unknown schedule; there are label, loss, model, variant"),
        (wrong(views=2), "takes 1 views and 1 captions of a sample, got 2 views"),
        (wrong(loss={"ALIPLoss": {}}), "ALIPLoss takes 1 views and 2 captions"),
        (wrong(loss={"ITOLoss": {}}, views=2), "ITOLoss needs fusion"),
        (
            wrong(loss={"ITOLoss": {"fusion_weight": 0}}, views=2, fusion={}),
            "ITOLoss does not use fusion",
        ),
        (wrong(fusion={}), "does not use fusion"),
        (
            wrong(loss={"ALIPLoss": {}}, captions=["txt", "json.x"], variant="image-only"),
            "several views or captions",
        ),
        (wrong(variant="fulll"), "no variant 'fulll'; there are none, pyr"),
        (wrong(gate_weight=-1), "gate_weight must not be negative"),
        (
            wrong(distillation={"PatchDistillation": {}}),
            "only an injection into the image tower uses; choose another variant",
        ),
        (
            wrong(variant="full", distillation={"PatchDistillation": {"relations": "mean"}}),
            "relations",
        ),
        (wrong(anchor=ANCHOR, text_teacher=True), "text_teacher and anchor belong to a disti"),
        (wrong(teacher_scale=2.0), "teacher_scale belong to a distillation"),
        (distilled(teacher_scale=0.5), "teacher_scale must be at least 1, got 0.5"),
        (
            distilled(text_teacher=True, variant="image-only"),
            "a text branch, which variant 'image-only' has not",
        ),
        (distilled({"relational_weight": 0}, text_teacher=True), "relational_weight must not be 0"),
        (
            distilled({"relational_weight": 0, "gram_weight": 0}, anchor=ANCHOR),
            "all its weights are 0",
        ),
        (distilled(anchor={**ANCHOR, "weight": 0}), "weight must be above 0 .* got 0 and 0.9"),
        (distilled(anchor={**ANCHOR, "decay": 1}), r"decay in \[0, 1\), got 1.0 and 1"),
        (distilled(anchor={**ANCHOR, "first": 1}), "first must be in .*got 1 and 0.5"),
        (distilled(anchor={**ANCHOR, "every": 0}), "every in .*got 0.0 and 0"),
        (distilled(anchor={**ANCHOR, "most": 0}), "most must be at least 1, or null; got 0"),
        (distilled(anchor={"weight": 1}), "missing 3 required .*'decay', 'first', and 'every'"),
    ],
)
def test_bad_files_are_refused_with_the_remedy(tmp_path: Path, data: Any, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path)
    assert "mine.yaml" in str(error.value)


def test_unknown_names_are_listed() -> None:
    with pytest.raises(UserError, match=r"no recipe 'clap'; give a \.yaml file, or one of alip, "):
        load_recipe("clap")


@pytest.mark.parametrize("content", [b"label: [", b"\xff\xfe"], ids=["syntax", "bytes"])
def test_what_is_not_yaml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.yaml is not YAML"):
        load_recipe(path)

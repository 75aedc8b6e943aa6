"""Model, loss, student and injection together: what is minimised, and what a tower does alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.cc3m.batches import Batch
from examples.cc3m.features import Features
from examples.cc3m.files import UserError
from examples.cc3m.recipe import DistillationSettings, Recipe, load_recipe, recipe_names
from examples.cc3m.towers import SCALARS, Towers, build_towers
from rankloss import GramLoss, RelationalAngleLoss, RelationalDistanceLoss
from rankloss.distillation import resize_features
from rankloss.fusion import FUSION_VARIANTS, DualBranchStudent

WIDTH, COUNT, GRID = 16, 6, (2, 2)
STUDENT: dict[str, Any] = {
    "token_dim": 8,
    "image_size": 16,
    "context_length": 8,
    "image_options": {"depth": 1, "embed_dim": 12, "num_heads": 2, "patch_size": 8},
    "text_options": {"vocabulary": 50, "end_token": 49, "width": 12, "depth": 1, "heads": 2},
}
FULL = load_recipe("dinorankclip")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def clip(**options: float) -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=WIDTH,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        output_dict=True,
        **options,
    ).double()


def towers(recipe: Recipe = FULL, *, moved: bool = False) -> Towers:
    """In float64; `moved`: with blocks and heads that no longer are zero."""
    model = clip(**recipe.model_options)
    made = build_towers(recipe, model, WIDTH, student=STUDENT, teacher_grid=GRID).double()
    if moved:
        torch.manual_seed(1)
        for name, parameter in made.named_parameters():
            if name.startswith(("loss.", "injection.")) and not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return made


def trunk(made: Towers) -> Any:
    """The open_clip model, whose methods mypy does not know."""
    return made.model


def batch(seed: int = 0, teacher_grid: tuple[int, int] = GRID) -> Batch:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(COUNT, 3, 16, 16, generator=g, dtype=torch.float64)
    texts = torch.randint(1, 49, (COUNT, 8), generator=g)
    texts[:, -1] = 49
    texts[2, 4:] = torch.tensor([49, 0, 0, 0])
    patches = torch.randn(COUNT, teacher_grid[0] * teacher_grid[1], 5, generator=g)
    teacher = Features(patches.half(), torch.randn(COUNT, 7, generator=g).half())
    keys = [str(i) for i in range(COUNT)]
    return Batch(images, texts, [], 0, COUNT, keys=keys, teacher=teacher)


def part(whole: Batch, rows: slice) -> Batch:
    return replace(whole, images=whole.images[rows], texts=whole.texts[rows])


OF_EMBEDDINGS = ("contrastive_loss", "ranking_loss", "cyclic_loss")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_starts_from_the_same_loss_and_trunk_gradients(name: str) -> None:
    recipe = load_recipe(name)
    results = []
    for used in (recipe, replace(recipe, injection=None, distillation=None)):
        made = towers(used)
        terms = made(batch())
        assert all(term.dim() == 0 and key.endswith("_loss") for key, term in terms.items())
        total = torch.stack(list(terms.values())).sum()
        spared = [*made.model.parameters(), *made.loss.parameters()]
        gradients = torch.autograd.grad(total, spared, allow_unused=True, materialize_grads=True)
        values = [terms[k] for k in OF_EMBEDDINGS if k in terms]
        results.append([*values, *gradients])
    assert sum(x.detach().abs().sum().item() for x in results[0]) > 1
    for ours, without in zip(*results, strict=True):
        torch.testing.assert_close(ours, without, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["siglip", "highorder_r3", "dinorankclip", "image_only"])
def test_parts_of_a_batch_encode_to_the_whole(name: str) -> None:
    """What exact gradients from cached features need."""
    made, whole = towers(load_recipe(name), moved=True), batch()
    outputs = made.encode(whole)
    parts = [made.encode(part(whole, slice(i, i + 2))) for i in range(0, COUNT, 2)]
    for key, value in outputs.items():
        if key in SCALARS:
            assert value.numel() == 1
            continue
        assert len(value) == COUNT
        torch.testing.assert_close(torch.cat([each[key] for each in parts]), value)
    # the objective sees the outputs, and nothing else of the model
    joined = {k: torch.cat([each[k] for each in parts]) for k in outputs if k not in SCALARS}
    scalars = {k: outputs[k] for k in outputs if k in SCALARS}
    for key, term in made.objective({**joined, **scalars}, whole).items():
        torch.testing.assert_close(term, made(whole)[key])


@pytest.mark.parametrize("teacher_grid", [GRID, (3, 4)], ids=["same grid", "resized"])
@pytest.mark.parametrize("relations", ["patches", "cls"])
def test_distillation_terms_are_the_losses_times_their_weights(
    teacher_grid: tuple[int, int], relations: Any
) -> None:
    settings = DistillationSettings(
        gram_weight=2.0, gram_level="batch", relational_weight=3.0, relations=relations
    )
    recipe, data = replace(FULL, distillation=settings), batch(teacher_grid=teacher_grid)
    made = build_towers(recipe, clip(), WIDTH, student=STUDENT, teacher_grid=teacher_grid).double()
    outputs = made.encode(data)
    terms = made.objective(outputs, data)
    tokens, teacher = outputs["student_patches"], data.teacher
    assert teacher is not None
    assert tokens.shape == (COUNT, 4, 8)
    resized = resize_features(teacher.patches.double(), teacher_grid, GRID)
    of_images = teacher.cls.double() if relations == "cls" else teacher.patches.double().mean(1)
    expected = {
        "gram_loss": 2 * GramLoss("batch")(tokens, resized),
        "distance_loss": 3 * RelationalDistanceLoss()(tokens.mean(1), of_images),
        "angle_loss": 3 * RelationalAngleLoss()(tokens.mean(1), of_images),
    }
    for key, value in expected.items():
        assert value > 0
        torch.testing.assert_close(terms[key], value, rtol=1e-5, atol=1e-7)


def test_the_gate_penalty_is_the_mean_over_both_towers() -> None:
    made, data = towers(moved=True), batch()
    outputs = made.encode(data)
    gates = [outputs["image_gate"], outputs["text_gate"]]
    expected = 1e-3 * (gates[0].mean() + gates[1].mean()) / 2
    torch.testing.assert_close(made(data)["gate_loss"], expected, rtol=1e-6, atol=0.0)
    assert gates[0].std() > 0


@pytest.mark.parametrize("name", FUSION_VARIANTS)
def test_a_variant_has_the_terms_of_its_stages(name: str) -> None:
    terms = set(towers(load_recipe(f"fusion_{name}"))(batch())) - set(OF_EMBEDDINGS)
    distilled = {"gram_loss", "distance_loss", "angle_loss"}
    gated = {"gate_loss"} if FUSION_VARIANTS[name].stages.gate else set()
    assert terms == (set() if name == "none" else distilled | gated)


def test_training_has_the_partner_and_inference_works_alone() -> None:
    made, data = towers(moved=True).eval(), batch()
    outputs = made.encode(data)
    alone = made.encode_image(data.images), made.encode_text(data.texts)
    image, text = (
        trunk(made).encode_image(data.images, True),
        trunk(made).encode_text(data.texts, True),
    )
    assert made.student is not None
    assert made.injection is not None
    tokens = made.student(data.images, data.texts)
    assert made.injection.image is not None
    assert made.injection.text is not None
    with_partner = (
        made.injection.image(image, tokens.image, text).embedding,
        made.injection.text(text, tokens.text, image, tokens.text_mask).embedding,
    )
    without = (
        made.injection.image(image, tokens.image).embedding,
        made.injection.text(text, tokens.text, mask=tokens.text_mask).embedding,
    )
    for i, name in enumerate(("image_features", "text_features")):
        torch.testing.assert_close(outputs[name], with_partner[i])
        torch.testing.assert_close(alone[i], without[i])
        assert not torch.allclose(alone[i], with_partner[i]), "the conflict projection did nothing"
        assert not torch.allclose(alone[i], (image, text)[i]), "nothing was injected"
        torch.testing.assert_close(alone[i].norm(dim=1), torch.ones(COUNT).double())
    # a tower does not see the other samples, nor the other modality
    torch.testing.assert_close(made.encode_image(data.images[1:2]), alone[0][1:2])
    torch.testing.assert_close(made.encode_text(data.texts[2:3, :]), alone[1][2:3])


@pytest.mark.parametrize("normalize", [True, False])
def test_without_injection_towers_encode_as_the_model(normalize: bool) -> None:
    made, data = towers(load_recipe("highorder_r3")), batch()
    image = trunk(made).encode_image(data.images, normalize=normalize)
    torch.testing.assert_close(made.encode_image(data.images, normalize), image)
    text = trunk(made).encode_text(data.texts, normalize=normalize)
    torch.testing.assert_close(made.encode_text(data.texts, normalize), text)


def test_an_image_only_recipe_leaves_texts_alone() -> None:
    made, data = towers(load_recipe("image_only"), moved=True), batch()
    assert made.student is not None
    assert made.student.text is None
    text = trunk(made).encode_text(data.texts, normalize=True)
    torch.testing.assert_close(made.encode(data)["text_features"], text)
    torch.testing.assert_close(made.encode_text(data.texts), text)
    assert "text_gate" not in made.encode(data)


@pytest.mark.parametrize("name", ["highorder_r3", "dinorankclip", "image_only"])
def test_every_parameter_learns_once_the_blocks_have_moved(name: str) -> None:
    made = towers(load_recipe(name), moved=True)
    torch.autograd.backward(torch.stack(list(made(batch()).values())).sum())
    still = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


def test_the_teacher_only_reaches_the_student() -> None:
    made, data = towers(), batch()
    terms = made(data)
    distilled = terms["gram_loss"] + terms["distance_loss"] + terms["angle_loss"]
    distilled.backward()
    moved = {n.split(".")[0] for n, p in made.named_parameters() if p.grad is not None}
    assert moved == {"student"}


def test_the_loss_is_told_the_progress() -> None:
    made, data = towers(load_recipe("rankclip")), batch()
    values = []
    for progress in (0.0, 1 / 3, 1.0):
        made.set_progress(progress)
        values.append(made(data)["ranking_loss"].item())
    assert values == pytest.approx([0.0, values[1], 2 * values[1]])
    assert values[1] > 0
    towers(load_recipe("clip")).set_progress(0.5)


def test_spared_parameters_exist_and_are_of_every_part() -> None:
    made = towers()
    spared = made.no_weight_decay()
    assert spared <= {name for name, _ in made.named_parameters()} | {
        f"model.{name}" for name in trunk(made).no_weight_decay()
    }
    assert {name.split(".")[0] for name in spared} >= {"loss", "student"}


def test_missing_teachers_are_named() -> None:
    with pytest.raises(UserError, match=r"distils a teacher; extract its features with"):
        build_towers(FULL, clip(), WIDTH, student=STUDENT)
    with pytest.raises(UserError, match=r"batch has no teacher features; .*features="):
        towers()(replace(batch(), teacher=None))


def test_branches_that_are_missing_are_named() -> None:
    injection = FUSION_VARIANTS["full"].build(WIDTH, 8)
    loss = FULL.build_loss(WIDTH)
    with pytest.raises(ValueError, match="needs a student's image branch"):
        Towers(clip(), loss, injection=injection)
    student = DualBranchStudent(text=False, **STUDENT)
    with pytest.raises(ValueError, match="needs a student's text branch"):
        Towers(clip(), loss, student=student, injection=injection)


def test_a_batch_moves_whole() -> None:
    moved = batch().to("meta")
    assert moved.teacher is not None
    tensors: list[Tensor] = [moved.images, moved.texts, *moved.teacher]
    assert {x.device.type for x in tensors} == {"meta"}
    assert moved.keys == batch().keys


def test_under_autocast_the_objective_stays_in_float32() -> None:
    made, data = towers().float(), batch()
    data = replace(data, images=data.images.float())
    exact = made(data)
    with torch.autocast("cpu", torch.bfloat16):
        terms = made(data)
    for key, term in terms.items():
        assert term.dtype == torch.float32, key
        torch.testing.assert_close(term, exact[key], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("make", [torch.zeros, torch.randn])
def test_unit_norm_in_every_case(make: Callable[..., Tensor]) -> None:
    """Also for images of one colour, whose tokens are all alike."""
    made, data = towers(moved=True), batch()
    data = replace(data, images=make(COUNT, 3, 16, 16, dtype=torch.float64))
    features = made.encode(data)["image_features"]
    assert features.isfinite().all()
    torch.testing.assert_close(functional.normalize(features, dim=1), features)

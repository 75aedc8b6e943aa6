"""DinoRankCLIP: terms, injection, teacher, what is saved; with models of open_clip and others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankloss import (
    ClipLoss,
    DinoRankCLIP,
    GradCache,
    GramLoss,
    PatchDistillation,
    RankCLIPLoss,
    RelationalAngleLoss,
    RelationalDistanceLoss,
)
from rankloss.distillation import resize_features
from rankloss.fusion import FUSION_VARIANTS, DualBranchStudent, TeacherFeatures

WIDTH, COUNT, GRID = 16, 6, (2, 2)
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
OPEN_CLIP = {"open_clip": {"embed_dim": WIDTH, "vision_cfg": VISION, "text_cfg": TEXT}}
STUDENT: dict[str, Any] = {
    "token_dim": 8,
    "image_options": {"depth": 1, "embed_dim": 12, "num_heads": 2, "patch_size": 8},
    "text_options": {"width": 12, "depth": 1, "heads": 2},
}
OF_EMBEDDINGS = ("contrastive_loss", "ranking_loss", "cyclic_loss")
LOSSES = [{"ClipLoss": {}}, {"HighOrderPLLoss": {"order": 2}}, {"CyCLIPLoss": {}}]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def build(*, moved: bool = False, **options: Any) -> DinoRankCLIP:
    """In float64; `moved`: with blocks and heads that no longer are zero."""
    torch.manual_seed(0)
    architecture = options.pop("architecture", OPEN_CLIP)
    made = DinoRankCLIP(architecture=architecture, **{"student": STUDENT, **options}).double()
    if moved:
        torch.manual_seed(1)
        for name, parameter in made.named_parameters():
            if name.startswith(("loss.", "injection.")) and not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return made


def batch(teacher_grid: tuple[int, int] = GRID) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    images = torch.randn(COUNT, 3, 16, 16, generator=g, dtype=torch.float64)
    texts = torch.randint(1, 49, (COUNT, 8), generator=g)
    texts[:, -1] = 49
    texts[2, 4:] = torch.tensor([49, 0, 0, 0])
    patches = torch.randn(COUNT, teacher_grid[0] * teacher_grid[1], 5, generator=g).half()
    cls = torch.randn(COUNT, 7, generator=g).half()
    return {"images": images, "texts": texts, "teacher_patches": patches, "teacher_cls": cls}


def pairs() -> tuple[Tensor, Tensor]:
    data = batch()
    return data["images"], data["texts"]


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def trunk(made: DinoRankCLIP) -> Any:
    """The wrapped model, whose methods mypy does not know."""
    return made.model


# ---------------------------------------------------------------- terms


@pytest.mark.parametrize("variant", FUSION_VARIANTS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda spec: next(iter(spec)))
def test_every_variant_starts_from_the_loss_and_trunk_gradients_of_none(
    loss: dict[str, Any], variant: str
) -> None:
    results = []
    for used in (variant, "none"):
        made = build(variant=used, loss=loss)
        terms = made(**batch())
        assert all(term.dim() == 0 and key.endswith("_loss") for key, term in terms.items())
        spared = [*made.model.parameters(), *made.loss.parameters()]
        gradients = torch.autograd.grad(
            total(terms), spared, allow_unused=True, materialize_grads=True
        )
        results.append([*(terms[k] for k in OF_EMBEDDINGS if k in terms), *gradients])
    assert sum(x.detach().abs().sum().item() for x in results[0]) > 1
    for ours, without in zip(*results, strict=True):
        torch.testing.assert_close(ours, without, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", FUSION_VARIANTS)
def test_a_variant_has_the_terms_of_its_stages(variant: str) -> None:
    terms = set(build(variant=variant)(**batch())) - set(OF_EMBEDDINGS)
    distilled = {"gram_loss", "distance_loss", "angle_loss"}
    gated = {"gate_loss"} if FUSION_VARIANTS[variant].stages.gate else set()
    assert terms == (set() if variant == "none" else distilled | gated)


@pytest.mark.parametrize("teacher_grid", [GRID, (3, 4)], ids=["same grid", "resized"])
@pytest.mark.parametrize("relations", ["patches", "cls"])
def test_distillation_terms_are_the_losses_times_their_weights(
    teacher_grid: tuple[int, int], relations: str
) -> None:
    settings = {
        "gram": {"GramLoss": {"level": "batch"}},
        "gram_weight": 2.0,
        "relational_weight": 3.0,
        "relations": relations,
    }
    made, data = build(distillation={"PatchDistillation": settings}), batch(teacher_grid)
    tokens = made.encode(data["images"], data["texts"])["student_patches"]
    assert tokens.shape == (COUNT, *GRID, 8)
    tokens, teacher = tokens.flatten(1, 2), data["teacher_patches"].double()
    of_images = data["teacher_cls"].double() if relations == "cls" else teacher.mean(1)
    resized = resize_features(teacher, teacher_grid, GRID)
    expected = {
        "gram_loss": 2 * GramLoss("batch")(tokens, resized),
        "distance_loss": 3 * RelationalDistanceLoss()(tokens.mean(1), of_images),
        "angle_loss": 3 * RelationalAngleLoss()(tokens.mean(1), of_images),
    }
    terms = made(**data, teacher_grid=teacher_grid)
    for key, value in expected.items():
        assert value > 0
        torch.testing.assert_close(terms[key], value, rtol=1e-5, atol=1e-7)


def test_the_text_branch_is_distilled_from_text_aligned_vectors() -> None:
    """CLS and mean patch of the images, or features of a text tower; of real tokens only."""
    made, data = build(distillation={"PatchDistillation": {"relational_weight": 3.0}}), batch()
    cls, patches = data["teacher_cls"].double(), data["teacher_patches"].double()
    target = TeacherFeatures(patches, cls, GRID).text_aligned
    assert torch.equal(target, torch.cat([cls, patches.mean(1)], 1))
    terms = made(**data, teacher_text=target)
    assert set(terms) == set(made(**data)) | {"text_distance_loss", "text_angle_loss"}
    assert made.student is not None
    tokens = made.student(text_ids=data["texts"])
    assert tokens.text is not None
    assert tokens.text_mask is not None
    pooled = [x[keep].mean(0) for x, keep in zip(tokens.text, tokens.text_mask, strict=True)]
    for name, loss in (("distance", RelationalDistanceLoss()), ("angle", RelationalAngleLoss())):
        expected = 3 * loss(torch.stack(pooled), target)
        assert expected > 0
        torch.testing.assert_close(terms[f"text_{name}_loss"], expected)
    (terms["text_distance_loss"] + terms["text_angle_loss"]).backward()
    moved = {n for n, p in made.named_parameters() if p.grad is not None}
    assert {name.rpartition(".")[0].split(".")[1] for name in moved} == {"text"}
    for variant, distillation in (("image-only", "auto"), ("full", None), ("none", None)):
        with pytest.raises(ValueError, match="got teacher_text, but there is no text branch"):
            build(variant=variant, distillation=distillation)(**data, teacher_text=target)


def test_the_gate_penalty_is_the_mean_over_both_towers() -> None:
    made, data = build(moved=True, gate_weight=0.1), batch()
    outputs = made.encode(*pairs())
    gates = [outputs["image_gate"], outputs["text_gate"]]
    expected = 0.1 * (gates[0].mean() + gates[1].mean()) / 2
    torch.testing.assert_close(made(**data)["gate_loss"], expected, rtol=1e-6, atol=0.0)
    assert gates[0].std() > 0
    assert "gate_loss" not in build(gate_weight=0.0)(**data)


def test_cached_features_give_the_same_gradients() -> None:
    made, data = build(moved=True), batch()
    torch.autograd.backward(total(made(**data)))
    expected = {name: p.grad for name, p in made.named_parameters()}
    made.zero_grad()

    def objective(**outputs: Tensor) -> dict[str, Tensor]:
        return made.objective(outputs, data["teacher_patches"], data["teacher_cls"])

    cache = GradCache(lambda part: made.encode(*part), objective, modules=[made])
    images, texts = pairs()
    cache([(images[:4], texts[:4]), (images[4:], texts[4:])])
    for name, p in made.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.parametrize("variant", ["none", "full", "image-only"])
def test_every_parameter_learns_once_the_blocks_have_moved(variant: str) -> None:
    made = build(variant=variant, moved=True)
    torch.autograd.backward(total(made(**batch())))
    still = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


def test_the_teacher_only_reaches_the_student() -> None:
    made = build()
    terms = made(**batch())
    (terms["gram_loss"] + terms["distance_loss"] + terms["angle_loss"]).backward()
    assert {n.split(".")[0] for n, p in made.named_parameters() if p.grad is not None} == {
        "student"
    }


def test_ids_reach_the_loss() -> None:
    made, data = build(variant="none", loss=ClipLoss()), batch()
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    outputs = made.encode(*pairs())
    for name in ("image_ids", "text_ids"):
        expected = ClipLoss()(**outputs, **{name: ids})
        assert made(**data, **{name: ids})["contrastive_loss"] == expected
        assert made(**data, local=True, **{name: ids})["contrastive_loss"] == expected
        assert made(**data)["contrastive_loss"] != expected


def test_the_loss_is_told_the_progress() -> None:
    made, values = build(variant="none", loss=RankCLIPLoss()), []
    for progress in (0.0, 1 / 3, 1.0):
        made.set_progress(progress)
        values.append(made(*pairs())["ranking_loss"].item())
    assert values == pytest.approx([0.0, values[1], 2 * values[1]])
    assert values[1] > 0
    build(loss=ClipLoss()).set_progress(0.5)


def test_under_autocast_the_objective_stays_in_float32() -> None:
    made, data = build().float(), batch()
    data["images"] = data["images"].float()
    exact = made(**data)
    with torch.autocast("cpu", torch.bfloat16):
        terms = made(**data)
    for key, term in terms.items():
        assert term.dtype == torch.float32, key
        torch.testing.assert_close(term, exact[key], rtol=0.1, atol=0.02)


def test_spared_parameters_are_of_every_part() -> None:
    made = build()
    spared = made.no_weight_decay()
    assert spared <= {name for name, _ in made.named_parameters()} | {
        f"model.{name}" for name in trunk(made).no_weight_decay()
    }
    assert {name.split(".")[0] for name in spared} >= {"loss", "student"}


# ---------------------------------------------------------------- encoding


def test_training_has_the_partner_and_inference_works_alone() -> None:
    made = build(moved=True).eval()
    images, texts = pairs()
    outputs = made.encode(images, texts)
    alone = made.encode_image(images), made.encode_text(texts)
    image, text = trunk(made).encode_image(images, True), trunk(made).encode_text(texts, True)
    assert made.student is not None
    assert made.injection is not None
    tokens = made.student(images, texts)
    with_partner = made.injection(image, text, tokens.image, tokens.text, tokens.text_mask)
    for i, name in enumerate(("image", "text")):
        fused = getattr(with_partner, name).embedding
        torch.testing.assert_close(outputs[f"{name}_features"], fused)
        assert not torch.allclose(alone[i], fused), "the conflict projection did nothing"
        assert not torch.allclose(alone[i], (image, text)[i]), "nothing was injected"
        torch.testing.assert_close(alone[i].norm(dim=1), torch.ones(COUNT).double())
    # a tower does not see the other samples, nor the other modality
    torch.testing.assert_close(made.encode_image(images[1:2]), alone[0][1:2])
    torch.testing.assert_close(made.encode_text(texts[2:3, :]), alone[1][2:3])


@pytest.mark.parametrize("normalize", [True, False])
def test_without_injection_towers_encode_as_the_model(normalize: bool) -> None:
    made = build(variant="none")
    images, texts = pairs()
    expected = trunk(made).encode_image(images, normalize=normalize)
    torch.testing.assert_close(made.encode_image(images, normalize), expected, rtol=0, atol=0)
    expected = trunk(made).encode_text(texts, normalize=normalize)
    torch.testing.assert_close(made.encode_text(texts, normalize), expected, rtol=0, atol=0)


def test_image_only_leaves_texts_alone() -> None:
    made = build(variant="image-only", moved=True)
    images, texts = pairs()
    assert made.student is not None
    assert made.student.text is None
    text = trunk(made).encode_text(texts, normalize=True)
    outputs = made.encode(images, texts)
    torch.testing.assert_close(outputs["text_features"], text)
    torch.testing.assert_close(made.encode_text(texts), text)
    assert "text_gate" not in outputs


def test_a_text_mask_replaces_the_end_token() -> None:
    made = build(moved=True).eval()
    images, texts = pairs()
    student = made.student
    assert student is not None
    assert student.text is not None
    mask = student.text.mask(texts)
    other = mask & (torch.arange(8) < 3)
    assert torch.equal(made.encode_text(texts, text_mask=mask), made.encode_text(texts))
    assert not torch.allclose(made.encode_text(texts, text_mask=other), made.encode_text(texts))
    changed = made.encode(images, texts, text_mask=other)["text_features"]
    assert not torch.allclose(changed, made.encode(images, texts)["text_features"])


@pytest.mark.parametrize("make", [torch.zeros, torch.randn])
def test_unit_norm_in_every_case(make: Callable[..., Tensor]) -> None:
    """Also for images of one colour, whose tokens are all alike."""
    images = make(COUNT, 3, 16, 16, dtype=torch.float64)
    features = build(moved=True).encode(images, batch()["texts"])["image_features"]
    assert features.isfinite().all()
    torch.testing.assert_close(functional.normalize(features, dim=1), features)


# ---------------------------------------------------------------- models, and what is saved


class Towers(nn.Module):
    """A model of one's own, with OpenAI's interface: no `normalize`, a tuple from forward."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.words = nn.Linear(3 * 16 * 16, WIDTH), nn.Embedding(50, WIDTH)

    def encode_image(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images.flatten(1))
        return features

    def encode_text(self, texts: Tensor) -> Tensor:
        features: Tensor = self.words(texts).mean(1)
        return features

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.encode_image(images), self.encode_text(texts)
        one, two = (functional.normalize(x, dim=1) for x in (image, text))
        return one, two, torch.tensor(10.0)


def plain_clip() -> nn.Module:
    made: nn.Module = open_clip.CLIP(**json.loads(json.dumps(OPEN_CLIP["open_clip"])))
    return made


def hugging_face(kind: str) -> nn.Module:
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "vocab_size": 50,
        "eos_token_id": 49,
        "image_size": 16,
        "patch_size": 8,
    }
    config = getattr(transformers, f"{kind}Config")(text_config=sizes, vision_config=sizes)
    made: nn.Module = getattr(transformers, f"{kind}Model")(config)
    return made


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "open_clip by its configuration": lambda: {"architecture": OPEN_CLIP},
    "open_clip as a module": lambda: {
        "model": plain_clip(),
        "architecture": OPEN_CLIP,
    },
    "CLIPModel": lambda: {"model": hugging_face("CLIP")},
    "SiglipModel": lambda: {"model": hugging_face("Siglip"), "loss": {"SigLipLoss": {}}},
}


def moved_away(made: DinoRankCLIP) -> DinoRankCLIP:
    """Weights that no initialisation gives."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return made.eval()


@pytest.mark.parametrize("which", MODELS)
def test_one_call_gives_back_what_was_saved(which: str, tmp_path: Path) -> None:
    made = moved_away(DinoRankCLIP(**MODELS[which](), student=STUDENT))
    made.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json"} <= {x.name for x in tmp_path.iterdir()}
    again = DinoRankCLIP.from_pretrained(tmp_path)
    data = {k: v.float() if v.is_floating_point() else v for k, v in batch().items()}
    assert torch.equal(again.encode_image(data["images"]), made.encode_image(data["images"]))
    assert torch.equal(again.encode_text(data["texts"]), made.encode_text(data["texts"]))
    terms = again(**data)
    assert terms == made(**data)
    assert len(terms) >= 5
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_open_clip_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved model's name and options alone are read; nothing is downloaded."""
    asked: list[dict[str, Any]] = []

    def create_model(model_name: str, **options: Any) -> nn.Module:
        asked.append({"model_name": model_name, **options})
        return plain_clip()

    monkeypatch.setattr(open_clip, "create_model", create_model)
    made = DinoRankCLIP.from_open_clip(
        "ViT-B-32", "openai", model_options={"force_quick_gelu": True}, student=STUDENT
    )
    moved_away(made).save_pretrained(tmp_path)
    again = DinoRankCLIP.from_pretrained(tmp_path)
    images = pairs()[0].float()
    assert torch.equal(again.encode_image(images), made.encode_image(images))
    first = {"model_name": "ViT-B-32", "pretrained": "openai", "force_quick_gelu": True}
    second = {"model_name": "ViT-B-32", "pretrained_text": False, "force_quick_gelu": True}
    assert asked == [first, second]


def test_parts_given_as_modules_are_given_again(tmp_path: Path) -> None:
    given: dict[str, Callable[[], nn.Module]] = {
        "model": Towers,
        "loss": ClipLoss,
        "student": lambda: DualBranchStudent(text=False, image_size=16, **STUDENT),
        "distillation": lambda: PatchDistillation(gram_weight=2.0),
    }
    options: dict[str, Any] = {name: make() for name, make in given.items()}
    made = moved_away(DinoRankCLIP(**options, variant="image-only", embed_dim=WIDTH))
    made.save_pretrained(tmp_path)
    images = pairs()[0].float()
    fresh: dict[str, Any] = {name: make() for name, make in given.items()}
    again = DinoRankCLIP.from_pretrained(tmp_path, **fresh)
    assert torch.equal(again.encode_image(images), made.encode_image(images))
    for name in given:
        rest: dict[str, Any] = {other: given[other]() for other in given if other != name}
        with pytest.raises(ValueError, match=rf"from_pretrained\(folder, {name}=\.\.\.\)"):
            DinoRankCLIP.from_pretrained(tmp_path, **rest)


def test_missing_weights_are_not_passed_over(tmp_path: Path) -> None:
    build(variant="none").float().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="injection"):
        DinoRankCLIP.from_pretrained(tmp_path, variant="full", student=STUDENT)


# ---------------------------------------------------------------- errors

ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"variant": "half"}, "unknown variant 'half'; choose one of"),
    ({"gate_weight": -1.0}, "gate_weight must not be negative, got -1.0"),
    ({"architecture": None}, "needs a model or an architecture"),
    ({"architecture": {"clip": {}}}, r"must be {'open_clip': .* got keys \['clip'\]"),
    ({"loss": {"Clip": {}}}, "loss: there is no 'Clip'; choose one of HighOrderPLLoss, "),
    ({"loss": {"ClipLoss": {}, "SigLipLoss": {}}}, "must be a module or one class name"),
    (
        {"variant": "none", "distillation": {"PatchDistillation": {}}},
        "choose another variant, or distillation=None",
    ),
    ({"student": DualBranchStudent(image=False)}, "needs a student with its image branch"),
    ({"distillation": {"PatchDistillation": {"gram_weight": -1}}}, "must not be negative"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_missing_teachers_are_named() -> None:
    with pytest.raises(ValueError, match=r"distils a teacher, but got no teacher_patches; give"):
        build()(*pairs())
    assert "gram_loss" not in build(distillation=None)(*pairs())
    weightless = {"PatchDistillation": {"gram_weight": 0.0, "relational_weight": 0.0}}
    assert "gram_loss" not in build(distillation=weightless)(*pairs())


def test_whole_numbers_are_no_images() -> None:
    made, (images, texts) = build(), pairs()
    for call in (made.encode_image, lambda x: made(x, texts)):
        with pytest.raises(TypeError, match=r"got torch\.uint8; divide by 255"):
            call(images.to(torch.uint8))


def test_models_that_are_no_towers_are_named() -> None:
    made = DinoRankCLIP(nn.Bilinear(4, 4, 4), variant="none", embed_dim=4)
    with pytest.raises(ValueError, match=r"Bilinear\(images, texts\) must return image_features"):
        made(torch.eye(4), torch.eye(4))
    with pytest.raises(ValueError, match="Bilinear does not say how wide its embeddings are"):
        DinoRankCLIP(nn.Bilinear(4, 4, 4), variant="none")

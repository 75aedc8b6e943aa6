"""What is trained: model, loss, and if wanted a distilled student whose tokens are injected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from examples.cc3m.batches import Batch
from examples.cc3m.features import Features
from examples.cc3m.files import UserError
from examples.cc3m.recipe import DistillationSettings, Recipe
from rankloss import GramLoss, RelationalAngleLoss, RelationalDistanceLoss
from rankloss.fusion import DualBranchStudent, Injection
from rankloss.fusion.patches import Grid, patch_grid

SCALARS = ("logit_scale", "logit_bias")
"""Outputs of `Towers.encode` that are not one row a sample."""


class PatchDistillation(nn.Module):
    """The student's patch tokens against the teacher's: relations within images, and between them.

    Gram compares the patches of an image with each other; the relational losses compare images,
    each as the mean of its patch tokens (the teacher's CLS with `relations="cls"`), with the other
    images of this process.

    Args:
        settings: weights and options.
        teacher_grid: (height, width) of the teacher's patches; resized to the student's.
    """

    def __init__(self, settings: DistillationSettings, teacher_grid: Grid) -> None:
        super().__init__()
        self.settings, self.teacher_grid = settings, teacher_grid
        self.gram = GramLoss(
            settings.gram_level, settings.gram_negatives, max_tokens=settings.gram_max_tokens
        )
        self.distance, self.angle = RelationalDistanceLoss(), RelationalAngleLoss()

    def forward(self, tokens: Tensor, grid: Grid, teacher: Features) -> dict[str, Tensor]:
        """Weighted "gram_loss", "distance_loss" and "angle_loss".

        Args:
            tokens: (B, h w, D) of the student.
            grid: (h, w).
            teacher: of the same images: patches (B, P, D'), cls (B, D'').
        """
        gram = self.gram(tokens, teacher.patches, student_grid=grid, teacher_grid=self.teacher_grid)
        of_cls = self.settings.relations == "cls"
        target = teacher.cls if of_cls else teacher.patches.float().mean(1)
        pooled = tokens.mean(1)
        relational = self.settings.relational_weight
        return {
            "gram_loss": self.settings.gram_weight * gram,
            "distance_loss": relational * self.distance(pooled, target),
            "angle_loss": relational * self.angle(pooled, target),
        }


class Towers(nn.Module):
    """All that is trained in one module: optimizer, checkpoint and DDP then see all parameters.

    The loss of a batch is computed in two halves, so that features of many small batches can be
    cached for one exact large one: `encode` has nothing between samples, `objective` has no trunk.

    With an injection, the student's tokens of a sample enter its embeddings, in training with the
    other modality's embedding as partner, at inference alone. The student's image branch is
    distilled from the teacher; its text branch has no text-aligned teacher here (DINOv3's,
    dino.txt, is in neither timm nor transformers) and is trained by the loss on the embeddings.

    Args:
        model: (images, texts) -> keyword arguments of the loss, as open_clip's with output_dict.
        loss: called with them and output_dict=True, returns named terms whose sum is minimised.
        student: with the branches that the injection uses.
        injection: what the student's tokens do to the embeddings.
        distillation: of the student's image branch; batches must then have teacher features.
        gate_weight: of mean |gate|.

    Raises:
        ValueError: an injection or a distillation without the branch of the student it needs.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        student: DualBranchStudent | None = None,
        injection: Injection | None = None,
        distillation: PatchDistillation | None = None,
        gate_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.student, self.injection, self.distillation = student, injection, distillation
        self.gate_weight = gate_weight
        self._check_branches()

    def _check_branches(self) -> None:
        injection, student = self.injection, self.student
        for name in ("image", "text"):
            used = injection is not None and getattr(injection, name) is not None
            used |= name == "image" and self.distillation is not None
            if used and (student is None or getattr(student, name) is None):
                raise ValueError(
                    f"Towers: injection or distillation needs a student's {name} branch"
                )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named and weighted terms, each ending in "_loss"; their sum is to be minimised."""
        return self.objective(self.encode(batch), batch)

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """What the objective needs of each sample: (B, ...) tensors, and SCALARS.

        "image_features" and "text_features" (B, D) unit-norm, after injection; "student_patches"
        (B, h w, C) if they are distilled; "image_gate" and "text_gate" (B, D) where there is one.
        """
        outputs: dict[str, Tensor] = dict(self.model(batch.images, batch.texts))
        if self.student is None:
            return outputs
        tokens = self.student(
            None if self.student.image is None else batch.images,
            None if self.student.text is None else batch.texts,
        )
        if self.distillation is not None:
            outputs["student_patches"] = tokens.image
        if self.injection is not None:
            fused = self.injection(
                outputs["image_features"],
                outputs["text_features"],
                tokens.image,
                tokens.text,
                tokens.text_mask,
            )
            for name, output in (("image", fused.image), ("text", fused.text)):
                if output is None:
                    continue
                outputs[f"{name}_features"] = output.embedding
                if getattr(self.injection, name).gate is not None:
                    outputs[f"{name}_gate"] = output.gate
        return outputs

    def objective(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Loss terms of what `encode` returned for a batch, or for the parts of one together.

        Of the batch only the teacher's features and the images' size are used.

        Raises:
            UserError: the student is distilled, but the batch has no teacher features.
        """
        names = ("image_features", "text_features", *SCALARS)
        given = {name: outputs[name] for name in names if name in outputs}
        terms: dict[str, Tensor] = dict(self.loss(**given, output_dict=True))
        distillation, student = self.distillation, self.student
        if distillation is not None and student is not None and student.image is not None:
            if batch.teacher is None:
                raise UserError(
                    "this recipe distils a teacher, but the batch has no teacher features; extract "
                    "them with examples.cc3m.extract_dinov3 and give the loader features="
                )
            grid = patch_grid("Towers", batch.images, student.image.patch_size)
            terms |= distillation(outputs["student_patches"], grid, batch.teacher)
        gates = [outputs[name] for name in ("image_gate", "text_gate") if name in outputs]
        if gates:
            whole = torch.cat(gates)
            whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
            terms["gate_loss"] = self.gate_weight * whole.abs().mean()
        return terms

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """(B, 3, H, W) -> (B, D), with injection if there is one, without partner or teacher.

        Injected embeddings are unit-norm whatever `normalize` says.
        """
        block = None if self.injection is None else self.injection.image
        if block is None or self.student is None:
            return self._of_model("encode_image", images, normalize)
        tokens = self.student(images=images)
        embedding = self._of_model("encode_image", images, True)
        injected: Tensor = block(embedding, tokens.image).embedding
        return injected

    def encode_text(self, texts: Tensor, normalize: bool = True) -> Tensor:
        """(B, L) int64 tokens -> (B, D), as `encode_image`."""
        block = None if self.injection is None else self.injection.text
        if block is None or self.student is None:
            return self._of_model("encode_text", texts, normalize)
        tokens = self.student(text_ids=texts)
        embedding = self._of_model("encode_text", texts, True)
        injected: Tensor = block(embedding, tokens.text, mask=tokens.text_mask).embedding
        return injected

    def _of_model(self, method: str, inputs: Tensor, normalize: bool) -> Tensor:
        encode: Callable[..., Tensor] = getattr(self.model, method)
        return encode(inputs, normalize=normalize)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that some part wants spared from weight decay."""
        spared: set[str] = set()
        for part, module in self.named_children():
            names: Callable[[], set[str]] = getattr(module, "no_weight_decay", set)
            spared |= {f"{part}.{name}" for name in names()}
        return spared

    def set_progress(self, progress: float) -> None:
        """Tell a loss with a schedule how far training is, in [0, 1]."""
        set_progress: Callable[[float], None] | None = getattr(self.loss, "set_progress", None)
        if set_progress is not None:
            set_progress(progress)


def build_towers(
    recipe: Recipe,
    model: nn.Module,
    embed_dim: int,
    *,
    student: dict[str, Any] | None = None,
    teacher_grid: Grid | None = None,
) -> Towers:
    """A model and everything a recipe puts around it, freshly initialised.

    Args:
        recipe: what to train with.
        model: as in `Towers`; built before, so that every recipe starts from the same one.
        embed_dim: width of the model's embeddings.
        student: arguments of `DualBranchStudent`, for example image_size; its branches are those
            that the recipe's injection uses.
        teacher_grid: of the teacher's features (`FeatureReader.grid`); needed to distil.

    Raises:
        UserError: the recipe distils, and there is no teacher_grid.
    """
    settings, variant = recipe.distillation, recipe.variant
    if settings is not None and teacher_grid is None:
        raise UserError(
            f"recipe {recipe.label!r} distils a teacher; extract its features with "
            "examples.cc3m.extract_dinov3 first"
        )
    loss = recipe.build_loss(embed_dim)
    if recipe.injection is None or not (variant.image or variant.text):
        return Towers(model, loss)
    branches = DualBranchStudent(variant.image, variant.text, **(student or {}))
    distillation = None
    if settings is not None and teacher_grid is not None:
        distillation = PatchDistillation(settings, teacher_grid)
    return Towers(
        model,
        loss,
        student=branches,
        injection=variant.build(embed_dim, branches.token_dim),
        distillation=distillation,
        gate_weight=recipe.injection.gate_weight,
    )

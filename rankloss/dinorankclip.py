"""DinoRankCLIP: the whole method around a two-tower CLIP model, as one module over tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from rankloss.distillation import PatchDistillation
from rankloss.fusion import FUSION_VARIANTS, DualBranchStudent, Injection
from rankloss.fusion.masks import masked_mean
from rankloss.fusion.optional import require
from rankloss.hub import SavesSettings
from rankloss.parts import build_loss, build_student, given_or_built, width_of
from rankloss.specs import Spec, build, spec_of
from rankloss.two_towers import (
    OUTPUTS,
    SCALARS,
    Architecture,
    architecture_of,
    encode_images,
    encode_pairs,
    encode_texts,
)

Grid = tuple[int, int]


class Given(TypedDict, total=False):
    """Further arguments of `forward` that `objective` documents and defaults."""

    teacher_grid: Grid | None
    teacher_text: Tensor | None
    image_ids: Tensor | None
    text_ids: Tensor | None
    local: bool


__all__ = ["SCALARS", "DinoRankCLIP"]


class DinoRankCLIP(nn.Module, SavesSettings, library_name="rankloss", tags=["clip", "rankloss"]):
    """A CLIP model, a ranking loss, and a student distilled from DINOv3 that both towers use.

        L + lambda_gram L_Gram + lambda_rel (L_RKD-D + L_RKD-A) + lambda_gate mean|g|

    One module holds all that is trained, so an optimizer, a checkpoint, DDP and FSDP see every
    parameter. The student's tokens of a sample enter its embeddings: in training with the other
    modality's embedding as partner, at inference alone, one tower at a time and without teacher.
    Source: DINORANKCLIP (arXiv 2605.06592), in this project's definition.

    Args:
        model: two towers, of open_clip (or any module with `encode_image(images)`,
            `encode_text(texts)` and open_clip's outputs from `model(images, texts)`) or of
            transformers (CLIPModel, SiglipModel). None builds it from `architecture`.
        architecture: how `from_pretrained` rebuilds the model: {"open_clip": {"model_name": ...}},
            {"open_clip": {"embed_dim": ..., "vision_cfg": ..., "text_cfg": ...}} or
            {"transformers": {...}}. Models of transformers say it themselves.
        loss: loss of the embeddings, called as `HighOrderPLLoss` is; a module, or {"class name":
            {arguments}}. Default: HighOrderPLLoss of order 3.
        variant: key of `rankloss.fusion.FUSION_VARIANTS`, the layers of the injection; "none" has
            neither student nor injection.
        student: with the branches that the variant injects into; a module, or arguments of
            `DualBranchStudent`. Image size, context length and vocabulary default to the model's.
        distillation: trains the student's image branch, called as `PatchDistillation` is; a module,
            {"PatchDistillation": {arguments}}, or None for no teacher. "auto" is
            PatchDistillation() where the variant injects into the image tower.
        gate_weight: lambda_gate, 1e-3 by default; not used by variants without gate.
        embed_dim: D, width of the embeddings. Default: what the model says.

    Raises:
        ImportError: timm, open_clip or transformers is missing.
        ValueError: an argument does not fit the others; a size is not known.

    Example:
        >>> import open_clip
        >>> architecture = {"open_clip": {
        ...     "embed_dim": 32,
        ...     "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
        ...     "text_cfg": {"context_length": 16, "width": 64, "heads": 1, "layers": 1},
        ... }}
        >>> model = DinoRankCLIP(architecture=architecture, student={
        ...     "image_options": {"embed_dim": 48, "depth": 1, "num_heads": 1},
        ...     "text_options": {"width": 48, "depth": 1, "heads": 1},
        ... })
        >>> images, texts = torch.randn(4, 3, 32, 32), torch.randint(1, 49406, (4, 16))
        >>> patches, cls = torch.randn(4, 49, 256), torch.randn(4, 384)  # of the teacher, 7 x 7
        >>> terms = model(images, texts, patches, cls, teacher_grid=(7, 7))
        >>> list(terms)  # doctest: +NORMALIZE_WHITESPACE
        ['contrastive_loss', 'ranking_loss', 'gram_loss', 'distance_loss', 'angle_loss',
         'gate_loss']
        >>> sum(terms.values()).backward()
        >>> model.encode_image(images).shape
        torch.Size([4, 32])

        Saved and loaded, here around a model of transformers:

        >>> import tempfile
        >>> from transformers import CLIPConfig, CLIPModel
        >>> sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1}
        >>> towers = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes))
        >>> model = DinoRankCLIP(towers, variant="none", loss={"RankCLIPLoss": {}}).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = DinoRankCLIP.from_pretrained(folder)
        Loading weights from local directory
        >>> images = torch.randn(2, 3, 224, 224)
        >>> torch.equal(again.encode_image(images), model.encode_image(images))
        True
    """

    loss_inputs: tuple[str, ...] = OUTPUTS
    """Names of what `encode` returns that are arguments of the loss."""

    def __init__(
        self,
        model: nn.Module | None = None,
        architecture: Architecture | None = None,
        *,
        loss: nn.Module | Spec | None = None,
        variant: str = "full",
        student: DualBranchStudent | Mapping[str, Any] | None = None,
        distillation: nn.Module | Spec | Literal["auto"] | None = "auto",
        gate_weight: float = 1e-3,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        if variant not in FUSION_VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; choose one of {list(FUSION_VARIANTS)}")
        if not gate_weight >= 0:
            raise ValueError(f"DinoRankCLIP: gate_weight must not be negative, got {gate_weight}")
        parts = FUSION_VARIANTS[variant]
        if distillation == "auto":
            distillation = {"PatchDistillation": {}} if parts.image else None
        self.model = given_or_built(model, architecture)
        width = width_of(self.model, embed_dim)
        loss = loss or {"HighOrderPLLoss": {"order": 3}}
        self.loss = build_loss(loss, width)
        self.student: DualBranchStudent | None = None
        self.injection: Injection | None = None
        if parts.image or parts.text:
            self.student = build_student(self.model, student, image=parts.image, text=parts.text)
            self.injection = parts.build(width, self.student.token_dim)
        self.distillation: nn.Module | None = None
        if distillation is not None:
            self.distillation = build("distillation", distillation, (PatchDistillation,))
        self.gate_weight = gate_weight
        self._check_branches(parts.image, parts.text)
        self.settings = {
            "architecture": architecture or architecture_of(self.model),
            "loss": spec_of(loss),
            "variant": variant,
            "student": spec_of(student) if isinstance(student, nn.Module) else student,
            "distillation": None if distillation is None else spec_of(distillation),
            "gate_weight": gate_weight,
            "embed_dim": embed_dim,
        }
        """Arguments from which `from_pretrained` builds the same module again; JSON-able."""

    def _check_branches(self, image: bool, text: bool) -> None:
        if self.distillation is not None and not image:
            raise ValueError(
                "DinoRankCLIP: distillation trains a student that only an injection into the "
                "image tower uses; choose another variant, or distillation=None"
            )
        for name, used in (("image", image), ("text", text)):
            if used and getattr(self.student, name, None) is None:
                raise ValueError(
                    f"DinoRankCLIP: the injection needs a student with its {name} branch"
                )

    @classmethod
    def from_open_clip(
        cls,
        model_name: str,
        pretrained: str | None = None,
        *,
        model_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> DinoRankCLIP:
        """Wrap a model of open_clip, by name.

        Args:
            model_name: one of `open_clip.list_models()`.
            pretrained: tag or file of the weights to start from; None starts at random.
            model_options: further arguments of `open_clip.create_model`, JSON-able.
            options: further arguments of `DinoRankCLIP`.

        Example:
            >>> model = DinoRankCLIP.from_open_clip("ViT-S-32-alt", variant="none")
            >>> model.settings["architecture"]
            {'open_clip': {'model_name': 'ViT-S-32-alt'}}
        """
        chosen = dict(model_options or {})
        model = require("open_clip").create_model(model_name, pretrained=pretrained, **chosen)
        return cls(model, {"open_clip": {"model_name": model_name, **chosen}}, **options)

    def forward(
        self,
        images: Tensor,
        texts: Tensor,
        teacher_patches: Tensor | None = None,
        teacher_cls: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        **given: Unpack[Given],
    ) -> dict[str, Tensor]:
        """Compute the named and weighted loss terms of B pairs; their sum is to be minimised.

        Args:
            images: (B, 3, H, W) floating, normalised as the model wants them.
            texts: (B, L) int64 token ids.
            teacher_patches: (B, P, D) floating, the teacher's patch tokens of the same images.
            teacher_cls: (B, D') floating, its CLS tokens.
            text_mask: (B, L) bool, True for real tokens; None asks the student's end token.
            **given: what more is known of the pairs, as follows.
            teacher_grid: (height, width) with height x width = P; None means the student's grid.
            teacher_text: (B, D'') floating, what the student's text branch is distilled from: the
                pairs in the teacher's text-aligned space, which is dino.txt's text features, or
                `TeacherFeatures.text_aligned` of the images. None leaves the text branch to the
                loss of the embeddings.
            image_ids, text_ids: (B,) integers, as in `HighOrderPLLoss`.
            local: leave other processes out, as in `HighOrderPLLoss`, of all terms.

        Returns:
            The terms of the loss and the distillation, and "gate_loss" if there is a gate; 0-D,
            float32 at least, each name ending in "_loss".

        Raises:
            ValueError: shapes do not fit, or the teacher's features are missing.
        """
        outputs = self.encode(images, texts, text_mask=text_mask)
        return self.objective(outputs, teacher_patches, teacher_cls, **given)

    def encode(
        self, images: Tensor, texts: Tensor, *, text_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute all that the objective needs of each pair, with nothing between pairs.

        Features of many small batches can therefore be cached for the exact gradient of one large
        batch: join them, except for `SCALARS`, and give them to `objective`.

        Returns:
            "image_features" and "text_features" (B, D) unit-norm, after injection; "logit_scale",
            and "logit_bias" if the model has one; "student_patches" (B, h, w, C) and
            "student_text" (B, C), the mean of a text's tokens, if there is a teacher;
            "image_gate" and "text_gate" (B, D) where there is a gate.
        """
        outputs = encode_pairs(self.model, images, texts, text_mask)
        if self.student is None or self.injection is None:
            return outputs
        tokens = self.student(
            None if self.student.image is None else images,
            None if self.student.text is None else texts,
            text_mask,
        )
        if self._distils():
            outputs["student_patches"] = tokens.image.unflatten(1, tokens.grid)
            if tokens.text is not None:
                outputs["student_text"] = masked_mean(tokens.text, tokens.text_mask)
        fused = self.injection(
            outputs["image_features"],
            outputs["text_features"],
            tokens.image,
            tokens.text,
            tokens.text_mask,
        )
        for name, output in (("image", fused.image), ("text", fused.text)):
            if output is not None:
                outputs[f"{name}_features"] = output.embedding
                if output.gate is not None:
                    outputs[f"{name}_gate"] = output.gate
        return outputs

    def objective(
        self,
        outputs: Mapping[str, Tensor],
        teacher_patches: Tensor | None = None,
        teacher_cls: Tensor | None = None,
        *,
        teacher_grid: Grid | None = None,
        teacher_text: Tensor | None = None,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        local: bool = False,
    ) -> dict[str, Tensor]:
        """Compute the terms of `forward` from what `encode` returned, of one batch or joined.

        Raises:
            ValueError: the student is distilled, and teacher_patches is None.
        """
        ids = {"image_ids": image_ids, "text_ids": text_ids}
        given: dict[str, Any] = {n: outputs[n] for n in self.loss_inputs if n in outputs}
        given |= {name: value for name, value in ids.items() if value is not None}
        if local:  # a loss that knows no processes need not know the argument
            given["local"] = local
        terms: dict[str, Tensor] = dict(self.loss(**given, output_dict=True))
        if self.distillation is not None and self._distils():
            if teacher_patches is None:
                raise ValueError(
                    "DinoRankCLIP: this model distils a teacher, but got no teacher_patches; give "
                    "the features of Dinov3Teacher, or build the model with distillation=None"
                )
            patches = outputs["student_patches"]
            grid = (patches.shape[1], patches.shape[2])
            alone: dict[str, Any] = {"local": True} if local else {}
            terms |= self.distillation(
                patches.flatten(1, 2),
                grid,
                teacher_patches,
                teacher_cls,
                teacher_grid=teacher_grid,
                **alone,
            )
        if teacher_text is not None:
            terms |= self._text_terms(outputs, teacher_text, local)
        gates = [outputs[name] for name in ("image_gate", "text_gate") if name in outputs]
        if gates and self.gate_weight > 0:
            whole = torch.cat(gates)
            whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
            terms["gate_loss"] = self.gate_weight * whole.abs().mean()
        return terms

    def _text_terms(
        self, outputs: Mapping[str, Tensor], teacher: Tensor, local: bool
    ) -> dict[str, Tensor]:
        """Compute the terms that distil the student's text branch."""
        if "student_text" not in outputs:
            raise ValueError(
                "DinoRankCLIP: got teacher_text, but there is no text branch to distil; choose a "
                "variant that injects into texts, with a distillation"
            )
        distillation: Any = self.distillation
        terms: dict[str, Tensor] = distillation.of_texts(
            outputs["student_text"], teacher, local=local
        )
        return terms

    def _distils(self) -> bool:
        """Say if the teacher's features are used at all."""
        return bool(getattr(self.distillation, "needs_teacher", self.distillation is not None))

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Encode images (B, 3, H, W) as (B, D), injected if there is a student, without partner.

        Injected embeddings are unit-norm whatever `normalize` says.
        """
        block = None if self.injection is None else self.injection.image
        embedding = encode_images(self.model, images)
        if normalize or block is not None:
            embedding = F.normalize(embedding, dim=-1)
        if block is None or self.student is None:
            return embedding
        fused: Tensor = block(embedding, self.student(images).image).embedding
        return fused

    def encode_text(
        self, texts: Tensor, normalize: bool = True, *, text_mask: Tensor | None = None
    ) -> Tensor:
        """Encode token ids (B, L) as (B, D), as `encode_image` does images."""
        block = None if self.injection is None else self.injection.text
        embedding = encode_texts(self.model, texts, text_mask)
        if normalize or block is not None:
            embedding = F.normalize(embedding, dim=-1)
        if block is None or self.student is None:
            return embedding
        tokens = self.student(None, texts, text_mask)
        fused: Tensor = block(embedding, tokens.text, mask=tokens.text_mask).embedding
        return fused

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that some part wants spared from weight decay."""
        spared: set[str] = set()
        for part, module in self.named_children():
            names: Callable[[], set[str]] = getattr(module, "no_weight_decay", set)
            spared |= {f"{part}.{name}" for name in names()}
        return spared

    def set_progress(self, progress: float) -> None:
        """Tell a loss with a schedule the progress of training, in [0, 1]."""
        set_progress: Callable[[float], None] | None = getattr(self.loss, "set_progress", None)
        if set_progress is not None:
            set_progress(progress)

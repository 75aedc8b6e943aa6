"""Losses of a step: a recipe's own, and baselines that see a second caption or view."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.data import Batch
from benchmarks.study.settings import Trained
from rankloss import ALIPLoss, DinoRankCLIP, ITOFusion, ITOLoss


class RecipeObjective(nn.Module):
    """The recipe's own loss, with distillation and gate penalty where it has them."""

    def __init__(self, towers: DinoRankCLIP, *, ids: bool) -> None:
        super().__init__()
        self.towers, self.ids = towers, ids

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        given: dict[str, Any] = {"text_ids": batch.text_ids} if self.ids else {}
        if batch.teacher is not None:
            side = math.isqrt(batch.teacher.shape[1])
            given |= {"teacher_patches": batch.teacher, "teacher_grid": (side, side)}
        return total(self.towers(batch.images, batch.texts, **given))


class TwoCaptions(nn.Module):
    """CLIP against two captions of each image: the mean of both losses."""

    def __init__(self, towers: DinoRankCLIP) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        outputs = self.towers.encode(batch.images, batch.texts)
        others = encoded_texts(self.towers, batch.other_texts)
        losses = [
            total(self.towers.objective({**outputs, "text_features": texts}))
            for texts in (outputs["text_features"], others)
        ]
        return torch.stack(losses).mean()


class ALIPObjective(nn.Module):
    """ALIP, with a second caption of the scene in the place of the synthetic one."""

    def __init__(self, towers: DinoRankCLIP) -> None:
        super().__init__()
        self.towers, self.loss = towers, ALIPLoss()

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        outputs = self.towers.encode(batch.images, batch.texts)
        captions = encoded_texts(self.towers, batch.other_texts)
        loss: Tensor = self.loss(**outputs, caption_features=captions)
        return loss


class ITOObjective(nn.Module):
    """ITO on two views; with fusion_weight=0 CLIP on two views.

    Image tokens are the embedding and the tower's last feature map through the pooling's own value
    and output maps; text tokens are all of the last layer through the text projection.

    Args:
        towers: around an open_clip model whose image tower is a residual network.
        fusion_weight: as in `rankloss.ITOLoss`.
    """

    def __init__(self, towers: DinoRankCLIP, fusion_weight: float = 2.0) -> None:
        super().__init__()
        self.towers, self.loss = towers, ITOLoss(fusion_weight)
        model: Any = towers.model
        self.fusion: ITOFusion | None = None
        if fusion_weight:
            self.fusion = ITOFusion(model.text_projection.shape[1])
            model.visual.layer4.register_forward_hook(self._keep_patches)
            model.ln_final.register_forward_hook(self._keep_words)

    def _keep_patches(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        model: Any = self.towers.model
        pool, patches = model.visual.attnpool, output.flatten(2).transpose(1, 2)
        self._patches = pool.c_proj(pool.v_proj(patches))

    def _keep_words(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        model: Any = self.towers.model
        self._words = output @ model.text_projection

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        outputs = self.towers.encode(batch.images, batch.texts)
        fused = [self._fused(outputs["image_features"], batch.texts)]
        model: Any = self.towers.model
        other = model.encode_image(batch.other_images, normalize=True)
        fused.append(self._fused(other, batch.texts))
        loss: Tensor = self.loss(
            **outputs,
            other_view_features=other,
            fused_features=fused[0],
            other_fused_features=fused[1],
        )
        return loss

    def _fused(self, embedding: Tensor, texts: Tensor) -> Tensor | None:
        if self.fusion is None:
            return None
        tokens = torch.cat([embedding[:, None], self._patches], 1)
        fused: Tensor = self.fusion(tokens, self._words, texts != 0)
        return fused


def objective_of(settings: Trained, towers: DinoRankCLIP) -> nn.Module:
    """Build what is minimised; its modules beside the towers are drawn from torch's generator."""
    if settings.objective == "recipe":
        return RecipeObjective(towers, ids=settings.ids)
    if settings.objective == "two-captions":
        return TwoCaptions(towers)
    if settings.objective == "alip":
        return ALIPObjective(towers)
    return ITOObjective(towers, fusion_weight=2.0 if settings.objective == "ito" else 0.0)


def encoded_texts(towers: DinoRankCLIP, texts: Tensor) -> Tensor:
    """Return (B, D) unit-norm embeddings by the towers' model alone."""
    model: Any = towers.model
    return F.normalize(model.encode_text(texts), dim=1)


def total(terms: dict[str, Tensor]) -> Tensor:
    """Return the sum of named terms."""
    return torch.stack(list(terms.values())).sum()

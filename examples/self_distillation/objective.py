"""DINO, iBOT, KoLeo and the Gram anchor: what DINOv3 minimises."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightly.loss.dino_loss import DINOLoss
from lightly.loss.ibot_loss import IBOTPatchLoss
from lightly.models.utils import random_block_mask, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from examples.self_distillation.backbone import Network
from examples.self_distillation.crops import Views
from examples.self_distillation.settings import ObjectiveSettings
from rankloss import GramAnchor, GramLoss, KoLeoLoss


class SelfDistillation(nn.Module):
    """Student, moving-average teacher, and the losses between them.

    DINO (CLS tokens of all crops against the teacher's of global crops) and iBOT (masked patches
    against the teacher's view of them) with centred targets are lightly's, as is the moving
    average; KoLeo and the Gram anchor, which sees the crops at twice the resolution, are this
    library's. Source: DINOv3 (2025), section 3 and 4, with centring in the place of
    Sinkhorn-Knopp.

    Args:
        network: the student at its start, copied for the teacher.
        settings: weights and schedules.
        steps: length of the whole training.
    """

    def __init__(self, network: Network, settings: ObjectiveSettings, steps: int) -> None:
        super().__init__()
        self.settings, self.steps = settings, steps
        self.student = network
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.dino = DINOLoss(settings.prototypes)
        self.ibot = IBOTPatchLoss(settings.prototypes)
        self.koleo = KoLeoLoss(group_size=settings.koleo_group)
        self.gram = GramLoss()
        every = max(1, round(settings.gram_every * steps))
        first = every * max(1, round(settings.gram_start / settings.gram_every))
        self.anchor = GramAnchor(self.teacher.backbone, first, every, settings.gram_refreshes)

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """Named and weighted terms, each ending in "_loss"; their sum is to be minimised."""
        settings, temperature = self.settings, self.teacher_temperature(step)
        images = views.globals.flatten(0, 1)
        backbone = self.student.backbone
        side = images.shape[-1] // backbone.patch_size
        mask = random_block_mask((len(images), side, side), min_num_masks_per_block=1)
        hidden = mask.flatten(1)
        with torch.no_grad():
            told = self.teacher.backbone(images)
            targets = list(self.teacher.cls_head(told.cls).chunk(2))
            patch_targets = self.teacher.patch_head(told.patches[hidden])
        seen = backbone(images, mask)
        local = backbone(views.locals.flatten(0, 1))
        answers = list(self.student.cls_head(seen.cls).chunk(2))
        answers += list(self.student.cls_head(local.cls).chunk(len(views.locals)))
        patches = self.student.patch_head(seen.patches[hidden])
        koleo = sum((self.koleo(crop) for crop in seen.cls.chunk(2)), seen.cls.new_zeros(()))
        terms = {
            "dino_loss": self.dino(targets, answers, teacher_temp=temperature),
            "ibot_loss": self.ibot(patch_targets, patches, mask, teacher_temp=temperature),
            "koleo_loss": settings.koleo_weight * koleo,
        }
        if views.high is not None:
            anchored: Any = self.anchor(views.high.flatten(0, 1))
            grid, high = (side, side), (2 * side, 2 * side)
            gram = self.gram(seen.patches, anchored.patches, student_grid=grid, teacher_grid=high)
            terms["gram_loss"] = settings.gram_weight * gram
        return terms

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher towards the student, and refresh the anchor when it is due."""
        momentum = cosine_schedule(step, self.steps, self.settings.momentum, 1.0)
        update_momentum(self.student, self.teacher, momentum)
        self.anchor.update(step, self.teacher.backbone)

    def needs_high(self, step: int) -> bool:
        """Say if there is an anchor at this step, which wants crops at twice the resolution."""
        return step >= self.anchor.first_update

    def teacher_temperature(self, step: int) -> float:
        start, end = self.settings.teacher_temperatures
        warmup = max(1.0, self.settings.temperature_warmup * self.steps)
        return start + (end - start) * min(1.0, step / warmup)

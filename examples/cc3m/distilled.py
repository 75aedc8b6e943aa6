"""Distillation that training alone adds to DinoRankCLIP: a teacher of texts, and a Gram anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import Unpack

from rankloss import DinoRankCLIP, GramAnchor, GramLoss
from rankloss.dinorankclip import Given
from rankloss.distillation.pairs import full_precision
from rankloss.fusion.teacher import TeacherFeatures


@dataclass(frozen=True)
class AnchorSettings:
    """A second Gram loss, whose targets are patches of an earlier self of the student.

    The anchor is a copy of a moving average of the student's image branch, taken on a schedule.
    Until it is taken for the first time there is nothing worth following, and the loss is 0.
    Source: DINOv3's Gram anchoring; numbers in recipes are this project's choice.

    Args:
        weight: weight of the loss, in the mean form of `GramLoss`.
        decay: decay of the moving average at each step.
        first: part of the training steps before the anchor is taken for the first time.
        every: part of the training steps from one time to the next.
        most: times that it is taken at most; None sets no limit.
    """

    weight: float
    decay: float
    first: float
    every: float
    most: int | None = None

    def __post_init__(self) -> None:
        if not (self.weight > 0 and 0 <= self.decay < 1):
            raise ValueError(
                "anchor: weight must be above 0 and decay in [0, 1), got "
                f"{self.weight} and {self.decay}"
            )
        if not (0 <= self.first < 1 and 0 < self.every <= 1):
            raise ValueError(
                "anchor: first must be in [0, 1) and every in (0, 1], parts of all steps; got "
                f"{self.first} and {self.every}"
            )
        if self.most is not None and self.most < 1:
            raise ValueError(f"anchor: most must be at least 1, or null; got {self.most}")


class DistilledCLIP(DinoRankCLIP):
    """DinoRankCLIP with what of its distillation is state, or is made of a batch's features.

    Nothing of it is left at inference, nor in what is exported.

    Args:
        text_teacher: distil the text branch from the teacher's features of the texts' images: CLS
            and mean patch, the space that dino.txt aligns texts with.
        anchor: settings of the Gram anchor; None has none.
        options: arguments of `DinoRankCLIP`, with a student and a distillation.
    """

    def __init__(
        self,
        *,
        text_teacher: bool = False,
        anchor: AnchorSettings | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.text_teacher, self.anchoring = text_teacher, anchor
        self.anchor: GramAnchor | None = None
        if anchor is not None:
            average = get_ema_multi_avg_fn(anchor.decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self._branch, multi_avg_fn=average).requires_grad_(False)
            self.anchor = GramAnchor(self._branch, first_update=0, every=1, most=anchor.most)
            self.anchor_gram = GramLoss()

    @property
    def _branch(self) -> torch.nn.Module:
        """Student's branch for images."""
        assert self.student is not None
        assert self.student.image is not None
        return self.student.image

    def encode(
        self, images: Tensor, texts: Tensor, *, text_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute what `DinoRankCLIP` does, and "anchor_patches" (B, h w, C) with an anchor."""
        outputs = super().encode(images, texts, text_mask=text_mask)
        if self.anchor is not None:
            tokens: Any = self.anchor(images)
            outputs["anchor_patches"] = tokens[0]
        return outputs

    def objective(
        self,
        outputs: Mapping[str, Tensor],
        teacher_patches: Tensor | None = None,
        teacher_cls: Tensor | None = None,
        **given: Unpack[Given],
    ) -> dict[str, Tensor]:
        """Compute the terms of `DinoRankCLIP`, and "anchor_loss" with an anchor.

        Raises:
            ValueError: as there, or the text branch has a teacher and teacher_cls is None.
        """
        if self.text_teacher and teacher_patches is not None:
            given["teacher_text"] = _text_aligned(teacher_patches, teacher_cls)
        terms = super().objective(outputs, teacher_patches, teacher_cls, **given)
        if self.anchor is not None and self.anchoring is not None:
            student = outputs["student_patches"].flatten(1, 2)
            gram: Tensor = self.anchor_gram(student, outputs["anchor_patches"])
            terms["anchor_loss"] = self.anchoring.weight * (self.anchor.refreshes > 0) * gram
        return terms

    def told_distillation(self) -> str:
        """Say what is distilled beside the teacher's patches, for the run's log."""
        told = ["the text branch from CLS and mean patch"] if self.text_teacher else []
        if self.anchoring is not None:
            a = self.anchoring
            often = "any number of times" if a.most is None else f"{a.most} times at most"
            told.append(
                f"the image branch from its own average (decay {a.decay:g}, weight {a.weight:g}), "
                f"taken after {a.first:.0%} of the steps and every {a.every:.0%}, {often}"
            )
        return "; ".join(told)

    def after_step(self, step: int, total: int) -> None:
        """Let the moving average follow the student, and the anchor the schedule.

        Args:
            step: number of the step that was just done, from 0.
            total: steps of the whole run.
        """
        if self.anchor is None or self.anchoring is None:
            return
        self.average.update_parameters(self._branch)
        self.anchor.first_update = round(self.anchoring.first * total)
        self.anchor.every = max(1, round(self.anchoring.every * total))
        self.anchor.update(step, self.average.module)


def _text_aligned(patches: Tensor, cls: Tensor | None) -> Tensor:
    if cls is None:
        raise ValueError("DistilledCLIP: text_teacher needs teacher_cls; got None")
    grid = (1, patches.shape[1])
    return TeacherFeatures(full_precision(patches), full_precision(cls), grid).text_aligned

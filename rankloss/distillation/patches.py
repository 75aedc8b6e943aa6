"""Distillation of patch tokens: the Gram and the relational losses together, weighted and named."""

from typing import Literal

from torch import Tensor, nn

from rankloss.checks import check_option
from rankloss.distillation.gram import GramLoss, Grid
from rankloss.distillation.pairs import full_precision
from rankloss.distillation.relational import RelationalAngleLoss, RelationalDistanceLoss
from rankloss.distributed import gather_with_gradient, rank_and_world_size
from rankloss.specs import Spec, build

Relations = Literal["patches", "cls"]


class PatchDistillation(nn.Module):
    """Student patch tokens against teacher patch tokens: relations within images and between them.

        lambda_gram L_Gram + lambda_rel (L_RKD-D + L_RKD-A)

    The Gram loss compares the patches of an image with each other. The relational losses compare
    each image with the other images of the batches of all processes, gathered with gradient as
    `HighOrderPLLoss` does; the mean of its patch tokens stands for it. Under DDP's averaging the
    gradient is the global batch's.
    Source: DINORANKCLIP's objective; the weights are this project's choice. A term of weight 0 is
    not computed.

    Args:
        gram: compares (B, P, C) tokens as `GramLoss` does, or its `Spec`. Default: GramLoss().
        distance, angle: compare (B, C) vectors, or the `Spec` of such a loss. Default:
            RelationalDistanceLoss() and RelationalAngleLoss().
        gram_weight: lambda_gram, 1 by default.
        relational_weight: lambda_rel, 1 by default.
        relations: teacher vector of an image in the relational losses: "patches", the mean of its
            patch tokens, or "cls", its CLS token.

    Raises:
        ValueError: a weight is negative, or an option is unknown.

    Example:
        >>> import torch
        >>> distillation = PatchDistillation(gram_weight=2.0)
        >>> student, teacher = torch.randn(8, 16, 64), torch.randn(8, 49, 256)  # 4 x 4, 7 x 7
        >>> terms = distillation(student, (4, 4), teacher, teacher_grid=(7, 7))
        >>> sorted(terms)
        ['angle_loss', 'distance_loss', 'gram_loss']
    """

    def __init__(
        self,
        gram: nn.Module | Spec | None = None,
        distance: nn.Module | Spec | None = None,
        angle: nn.Module | Spec | None = None,
        *,
        gram_weight: float = 1.0,
        relational_weight: float = 1.0,
        relations: Relations = "patches",
    ) -> None:
        super().__init__()
        if not (gram_weight >= 0 and relational_weight >= 0):
            raise ValueError(
                "PatchDistillation: weights must not be negative, got "
                f"gram_weight={gram_weight} and relational_weight={relational_weight}"
            )
        check_option("relations", relations, Relations)
        self.gram = build("gram", gram or {"GramLoss": {}}, (GramLoss,))
        self.distance, self.angle = (
            build(name, given or {default.__name__: {}}, (default,))
            for name, given, default in (
                ("distance", distance, RelationalDistanceLoss),
                ("angle", angle, RelationalAngleLoss),
            )
        )
        self.gram_weight, self.relational_weight = gram_weight, relational_weight
        self.relations = relations

    @property
    def needs_teacher(self) -> bool:
        """False when both weights are 0."""
        return self.gram_weight > 0 or self.relational_weight > 0

    def forward(
        self,
        student_patches: Tensor,
        student_grid: Grid,
        teacher_patches: Tensor,
        teacher_cls: Tensor | None = None,
        *,
        teacher_grid: Grid | None = None,
        local: bool = False,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms, float32 scalars (float64 if given so).

        Args:
            student_patches: (B, h w, C) floating, in row-major order of the grid.
            student_grid: (h, w).
            teacher_patches: (B, P, D) floating.
            teacher_cls: (B, D') floating; needed with relations="cls".
            teacher_grid: (height, width) with height x width = P; None means the student's.
            local: compare images of this process only.

        Returns:
            "gram_loss", "distance_loss" and "angle_loss", those whose weight is not 0.

        Raises:
            ValueError: shapes or devices do not fit, processes have different numbers of images,
                or teacher_cls is missing.
            TypeError: an input is not floating point.
        """
        terms: dict[str, Tensor] = {}
        if self.gram_weight > 0:
            grids = {"student_grid": student_grid, "teacher_grid": teacher_grid or student_grid}
            gram: Tensor = self.gram(student_patches, teacher_patches, **grids)
            terms["gram_loss"] = self.gram_weight * gram
        if self.relational_weight > 0:
            teacher = self._vectors(teacher_patches, teacher_cls)
            terms |= self._relational("", student_patches.mean(1), teacher, local)
        return terms

    def of_texts(
        self, student: Tensor, teacher: Tensor, *, local: bool = False
    ) -> dict[str, Tensor]:
        """Compute the weighted relational terms of a student's text branch.

        Args:
            student: (B, C) floating, the mean of each text's tokens.
            teacher: (B, D) floating vectors of the same pairs in the teacher's text-aligned space.
            local: compare texts of this process only.

        Returns:
            "text_distance_loss" and "text_angle_loss", or nothing with relational_weight=0.

        Raises:
            ValueError: shapes or devices do not fit.
            TypeError: an input is not floating point.
        """
        if self.relational_weight == 0:
            return {}
        return self._relational("text_", student, teacher, local)

    def _relational(
        self, prefix: str, student: Tensor, teacher: Tensor, local: bool
    ) -> dict[str, Tensor]:
        if not local:
            processes = rank_and_world_size()
            student, teacher = (gather_with_gradient(x, processes) for x in (student, teacher))
        return {
            f"{prefix}distance_loss": self.relational_weight * self.distance(student, teacher),
            f"{prefix}angle_loss": self.relational_weight * self.angle(student, teacher),
        }

    def _vectors(self, patches: Tensor, cls: Tensor | None) -> Tensor:
        """Return (B, D), the teacher's vector for each image."""
        if self.relations == "patches":
            return full_precision(patches).mean(1)
        if cls is None:
            raise ValueError('PatchDistillation: relations="cls" needs teacher_cls; got None')
        return cls

    def extra_repr(self) -> str:
        return (
            f"gram_weight={self.gram_weight}, relational_weight={self.relational_weight}, "
            f"relations={self.relations!r}"
        )

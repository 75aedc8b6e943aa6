"""Gram anchoring: the cosines between a student's patches follow those of a teacher."""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss import kernels
from rankloss.checks import check_option
from rankloss.distillation.pairs import check_pair, full_precision
from rankloss.distributed import HoldsProcessGroup, gather_with_gradient, rank_and_world_size
from rankloss.fusion.masks import Mask
from rankloss.kernels.launch import outside_autocast

Level = Literal["image", "batch"]
Negatives = Literal["keep", "clamp", "clamp_teacher"]
Grid = tuple[int, int]


def resize_features(features: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Resample patch features of one grid to another: bicubic, no antialiasing.

    Source: DINOv3's high-resolution Gram teacher, which resizes before normalising; other than
    its code, grids need not be square.

    Args:
        features: (B, h w, D) in row-major order of `grid`.
        grid, target: (height, width) in patches.

    Returns:
        (B, target height x width, D) in the dtype given.

    Raises:
        ValueError: features are not (B, P, D), or P is not the number of patches in `grid`.

    Example:
        >>> resize_features(torch.randn(2, 14 * 14, 256), (14, 14), (7, 7)).shape
        torch.Size([2, 49, 256])
    """
    if features.dim() != 3 or features.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"resize_features: need (B, {grid[0]} * {grid[1]}, D) to fill a grid of {grid}, got "
            f"{tuple(features.shape)}"
        )
    if tuple(grid) == tuple(target):
        return features
    image = full_precision(features).transpose(1, 2).reshape(len(features), -1, *grid)
    image = F.interpolate(image, size=target, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(features.dtype)


class GramLoss(HoldsProcessGroup, nn.Module):
    """Mean squared difference of the cosine Gram matrices of student and teacher patches.

        L = mean over kept pairs (i, j) of (<s_i, s_j> - <t_i, t_j>)^2,  rows normalised

    Source: DINOv3 section "Gram anchoring", in the mean form of its code (the paper's sum over
    pairs is P^2 times it), to which its weights belong. Zero rows have similarity 0 and receive
    no gradient. In PyTorch's implementations products follow
    `torch.set_float32_matmul_precision`; cosines of patches need no more than TF32.

    Args:
        level: "image": pairs within an image; "batch": all pairs of the batch.
        negatives: "keep"; "clamp": negative similarities of both count as 0; "clamp_teacher":
            negative similarities of the teacher count as 0, and so do the student's where both
            are negative. DINOv3 documents the last; its code clamps the teacher before it looks
            at the teacher's sign, so there student negatives stay.
        max_tokens: use that many random tokens of each image, the same ones in every image of this
            process.
        distributed: with level="batch", take the pairs of the batches of all processes, gathered
            with gradient: under DDP's averaging the gradient is the global batch's. Every process
            compares all pairs.
        process_group: processes whose batches count with distributed=True, for example
            `mesh.get_group("dp")`; None: all.
        impl: "auto" and "blocked" never hold P x P matrices for the whole batch; "reference" does,
            and differentiates twice.

    Raises:
        ValueError: an unknown option, max_tokens < 1, distributed with level="image", or a
            process_group without distributed.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # one image, two equal patches
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # orthogonal ones
        >>> round(float(GramLoss()(student, teacher)), 4)  # two of four pairs differ by 1
        0.5
    """

    def __init__(
        self,
        level: Level = "image",
        negatives: Negatives = "keep",
        *,
        max_tokens: int | None = None,
        distributed: bool = False,
        process_group: dist.ProcessGroup | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_option("level", level, Level)
        check_option("negatives", negatives, Negatives)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"GramLoss: max_tokens must be at least 1, got {max_tokens}")
        if distributed and level == "image":
            raise ValueError('GramLoss: pairs of one image are on one process; use level="batch"')
        if process_group is not None and not distributed:
            raise ValueError("GramLoss: process_group has no effect without distributed=True")
        self.level, self.negatives = level, negatives
        self.distributed, self.process_group = distributed, process_group
        self.max_tokens, self.impl = max_tokens, impl

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Mask = None,
        *,
        student_grid: Grid | None = None,
        teacher_grid: Grid | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Compute the loss, a float32 scalar (float64 if given so); 0 when no token is kept.

        Args:
            student: (B, P, Ds) floating.
            teacher: (B, P, Dt), or (B, P', Dt) with both grids given: then it is resized to the
                student's grid before it is normalised.
            mask: (B, P) bool, False leaves a token out.
            student_grid, teacher_grid: (height, width) in patches.
            generator: draws the tokens of `max_tokens`, on the CPU.

        Raises:
            ValueError: shapes or devices do not fit, or one grid is missing.
            TypeError: an input is not floating point, or mask is not bool.
        """
        teacher = teacher.detach()
        if student_grid is not None and teacher_grid is not None:
            teacher = resize_features(full_precision(teacher), teacher_grid, student_grid)
        elif student_grid is not None or teacher_grid is not None:
            raise ValueError("GramLoss: give both student_grid and teacher_grid, or neither")
        check_pair("GramLoss", student, teacher, dims=3)
        _check_token_mask(student, mask)
        if self.max_tokens is not None and self.max_tokens < student.shape[1]:
            chosen = torch.randperm(student.shape[1], generator=generator)[: self.max_tokens]
            chosen = chosen.to(student.device)
            student, teacher = student[:, chosen], teacher[:, chosen]
            mask = None if mask is None else mask[:, chosen]
        with outside_autocast(student):
            s, t = full_precision(student), full_precision(teacher)
            if mask is not None:  # a zero row has similarity 0 in both
                s, t = (x.masked_fill(~mask[:, :, None], 0.0) for x in (s, t))
            if self.level == "image":
                total = kernels.gram_distance(s, t, self.negatives, self.impl).sum()
                return total / _pairs_of_images(s, mask)
            s, t, kept = self._global_tokens(s.flatten(0, 1), t.flatten(0, 1), mask)
            total = kernels.gram_distance(s[None], t[None], self.negatives, self.impl).sum()
            return total / kept.square().clamp(min=1)

    def _global_tokens(
        self, student: Tensor, teacher: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gather (n, Ds) and (n, Dt) tokens of all processes, and count those that are kept."""
        kept = student.new_full((1,), len(student)) if mask is None else mask.sum()[None]
        kept = kept.to(student.dtype)
        if self.distributed:
            processes = rank_and_world_size(process_group=self.process_group)
            student = gather_with_gradient(student, processes)
            teacher, kept = (gather_with_gradient(x, processes) for x in (teacher, kept))
        return student, teacher, kept.sum()

    def extra_repr(self) -> str:
        return f"level={self.level!r}, negatives={self.negatives!r}, max_tokens={self.max_tokens}"


def _pairs_of_images(tokens: Tensor, mask: Mask) -> Tensor | int:
    """Count the pairs of kept tokens that share an image, at least 1."""
    if mask is None:
        return max(tokens.shape[0] * tokens.shape[1] ** 2, 1)
    return mask.sum(1).to(tokens.dtype).square().sum().clamp(min=1)


def _check_token_mask(student: Tensor, mask: Mask) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"GramLoss: mask must be bool (True keeps), got {mask.dtype}")
    if mask.shape != student.shape[:2] or mask.device != student.device:
        raise ValueError(
            f"GramLoss: mask must be (B, P) = {tuple(student.shape[:2])} on {student.device}, got "
            f"{tuple(mask.shape)} on {mask.device}"
        )

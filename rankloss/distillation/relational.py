"""Relational knowledge distillation: distances and angles between samples follow a teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.distillation.pairs import check_pair, exact_products, full_precision
from rankloss.kernels.launch import outside_autocast


class RelationalDistanceLoss(nn.Module):
    """RKD-D: distances between samples, each batch's scaled to mean 1, compared by smooth L1.

        d_ij = |x_i - x_j| / mean of the positive distances;  L = mean_ij smooth_l1(d_ij^s, d_ij^t)

    Source: Park et al. 2019, with the reductions of the official code: the mean runs over all
    B^2 entries, its zero diagonal too, and the student's mean carries gradient. Finite with finite
    gradients for B = 1, duplicates and collapsed batches, where the official code returns NaN:
    distances below 1e-6 count as 1e-6 and get no gradient. Distances are computed in float64, so
    that those of near samples keep their digits (in float32 on devices without float64).

    Example:
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.eye(3)  # all equally far apart
        >>> round(float(RelationalDistanceLoss()(student, teacher)), 4)
        0.0098
        >>> float(RelationalDistanceLoss()(student, 5 * student + 1))
        0.0
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss, a float32 scalar (float64 if given so); 0 when B is 0.

        Args:
            student: (B, Ds) floating.
            teacher: (B, Dt) floating; it gets no gradient.

        Raises:
            ValueError: shapes or devices do not fit.
            TypeError: an input is not floating point.
        """
        check_pair("RelationalDistanceLoss", student, teacher, dims=2)
        with outside_autocast(student):
            s, t = (_scaled_distances(full_precision(x)) for x in (student, teacher.detach()))
            return F.smooth_l1_loss(s, t, reduction="sum") / max(s.numel(), 1)


def _scaled_distances(x: Tensor) -> Tensor:
    """Divide the distances (B, B) between rows (B, D) by the mean of the positive ones."""
    wide = exact_products(x)
    wide = wide - wide.detach().mean(0)  # distances stay; their squares lose fewer digits
    squares = wide.square().sum(1)
    d = (squares[:, None] + squares[None, :] - 2 * wide @ wide.T).clamp(min=1e-12).sqrt()
    d = d.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)
    positive = d > 0
    return (d / (d.sum() / positive.sum().clamp(min=1)).clamp(min=1e-12)).to(x.dtype)


class RelationalAngleLoss(nn.Module):
    """RKD-A: for every triple (i, j, k), the cosine of the angle at sample i, by smooth L1.

        A_ijk = <e_ij, e_ik>,  e_ij = normalise(x_j - x_i);  L = mean_ijk smooth_l1(A^s, A^t)

    Source: Park et al. 2019, with the official code's mean over all B^3 triples. Coinciding
    samples have e = 0 and receive no gradient through it.

    Args:
        max_bytes: memory for differences and cosines in float32, of which a training step holds up
            to 5 times as much (cosines are products in float64, which no TF32 setting rounds);
            beyond it a random subset of samples is used, with all of its triples.

    Raises:
        ValueError: max_bytes is not positive.

    Example:
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.eye(3)  # all angles are 60 degrees
        >>> round(float(RelationalAngleLoss()(student, teacher)), 4)
        0.0124
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        super().__init__()
        if max_bytes < 1:
            raise ValueError(f"RelationalAngleLoss: max_bytes must be positive, got {max_bytes}")
        self.max_bytes = max_bytes

    def forward(
        self, student: Tensor, teacher: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Compute the loss, a float32 scalar (float64 if given so); 0 when B is 0.

        Args:
            student: (B, Ds) floating.
            teacher: (B, Dt) floating; it gets no gradient.
            generator: draws the subset of samples, on the CPU.

        Raises:
            ValueError: shapes or devices do not fit.
            TypeError: an input is not floating point.
        """
        check_pair("RelationalAngleLoss", student, teacher, dims=2)
        most = self.samples_within_memory(student.shape[1] + teacher.shape[1])
        if most < len(student):
            chosen = torch.randperm(len(student), generator=generator)[:most].to(student.device)
            student, teacher = student[chosen], teacher[chosen]
        with outside_autocast(student):
            s, t = (_angles(full_precision(x)) for x in (student, teacher.detach()))
            return F.smooth_l1_loss(s, t, reduction="sum") / max(s.numel(), 1)

    def samples_within_memory(self, widths: int) -> int:
        """Count the most samples n with (n^2 widths + 2 n^3) floats in `max_bytes`, at least 1.

        Args:
            widths: Ds + Dt.
        """
        n = 1
        while 4 * ((n + 1) ** 2 * widths + 2 * (n + 1) ** 3) <= self.max_bytes:
            n += 1
        return n


def _angles(x: Tensor) -> Tensor:
    """Cosines (B, B, B) of the angles between the directions from each row to all others."""
    difference = x[None, :, :] - x[:, None, :]
    length = difference.square().sum(2, keepdim=True)
    apart = length > 1e-24
    direction = torch.where(apart, difference, 0.0) * torch.where(apart, length, 1.0).rsqrt()
    direction = exact_products(direction)
    return (direction @ direction.transpose(1, 2)).to(x.dtype)

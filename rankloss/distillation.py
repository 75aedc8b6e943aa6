"""Distilling a frozen teacher's relations: Gram matrices, distances, angles; KoLeo's spread.

All losses compare relations within a batch, so student and teacher may differ in width. The
teacher never receives gradient. Everything is computed in float32 (float64 if given so).
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss import kernels
from rankloss.checks import check_option
from rankloss.distributed import gather_with_gradient, processes
from rankloss.kernels.launch import outside_autocast
from rankloss.kernels.reference import row_norms

Level = Literal["image", "batch"]
Negatives = Literal["keep", "clamp", "clamp_teacher"]
Grid = tuple[int, int]


def resize_features(features: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Patch features of one grid, resampled to another: bicubic, no antialiasing.

    Source: DINOv3's high-resolution Gram teacher, which resizes before normalising; other than
    its code, grids need not be square.

    Args:
        features: (B, h w, D) in row-major order of `grid`.
        grid, target: (height, width) in patches.

    Returns:
        (B, target height x width, D) in the dtype given.

    Raises:
        ValueError: features are not (B, P, D), or P is not the number of patches in `grid`.
    """
    if features.dim() != 3 or features.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"resize_features: need (B, {grid[0]} * {grid[1]}, D) to fill a grid of {grid}, got "
            f"{tuple(features.shape)}"
        )
    if tuple(grid) == tuple(target):
        return features
    image = _full(features).transpose(1, 2).reshape(len(features), -1, *grid)
    image = F.interpolate(image, size=target, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(features.dtype)


class GramLoss(nn.Module):
    """Mean squared difference of the cosine Gram matrices of student and teacher patches.

        L = mean over kept pairs (i, j) of (<s_i, s_j> - <t_i, t_j>)^2,  rows normalised

    Source: DINOv3 section "Gram anchoring", in the mean form of its code (the paper's sum over
    pairs is P^2 times it), to which its weights belong. Zero rows have similarity 0 and receive
    no gradient.

    Args:
        level: "image": pairs within an image; "batch": all pairs of the batch.
        negatives: "keep"; "clamp": negative similarities of both count as 0; "clamp_teacher":
            negative similarities of the teacher count as 0, and so do the student's where both
            are negative. DINOv3 documents the last; its code clamps the teacher before it looks
            at the teacher's sign, so there student negatives stay.
        max_tokens: use that many random tokens of each image, the same ones in every image.
        impl: "auto" and "blocked" never hold P x P matrices for the whole batch; "reference" does,
            and differentiates twice.

    Raises:
        ValueError: an unknown option, or max_tokens < 1.
    """

    def __init__(
        self,
        level: Level = "image",
        negatives: Negatives = "keep",
        *,
        max_tokens: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_option("level", level, Level)
        check_option("negatives", negatives, Negatives)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"GramLoss: max_tokens must be at least 1, got {max_tokens}")
        self.level, self.negatives = level, negatives
        self.max_tokens, self.impl = max_tokens, impl

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None = None,
        *,
        student_grid: Grid | None = None,
        teacher_grid: Grid | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss, a float32 scalar (float64 if given so); 0 when no token is kept.

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
            teacher = resize_features(_full(teacher), teacher_grid, student_grid)
        elif student_grid is not None or teacher_grid is not None:
            raise ValueError("GramLoss: give both student_grid and teacher_grid, or neither")
        _check_pair("GramLoss", student, teacher, dims=3)
        _check_token_mask(student, mask)
        if self.max_tokens is not None and self.max_tokens < student.shape[1]:
            chosen = torch.randperm(student.shape[1], generator=generator)[: self.max_tokens]
            chosen = chosen.to(student.device)
            student, teacher = student[:, chosen], teacher[:, chosen]
            mask = None if mask is None else mask[:, chosen]
        with outside_autocast(student):
            s, t = _full(student), _full(teacher)
            if mask is not None:  # a zero row has similarity 0 in both
                s, t = (x.masked_fill(~mask[:, :, None], 0.0) for x in (s, t))
            if self.level == "batch":
                s, t = s.flatten(0, 1)[None], t.flatten(0, 1)[None]
            total = kernels.gram_distance(s, t, self.negatives, self.impl).sum()
            return total / _pairs(s, mask, self.level)

    def extra_repr(self) -> str:
        return f"level={self.level!r}, negatives={self.negatives!r}, max_tokens={self.max_tokens}"


def _pairs(tokens: Tensor, mask: Tensor | None, level: Level) -> Tensor | int:
    """How many pairs of kept tokens there are, at least 1."""
    if mask is None:
        return max(tokens.shape[0] * tokens.shape[1] ** 2, 1)
    kept = mask.sum() if level == "batch" else mask.sum(1)
    return kept.to(tokens.dtype).square().sum().clamp(min=1)


class RelationalDistanceLoss(nn.Module):
    """RKD-D: distances between samples, each batch's scaled to mean 1, compared by smooth L1.

        d_ij = |x_i - x_j| / mean of the positive distances;  L = mean_ij smooth_l1(d_ij^s, d_ij^t)

    Source: Park et al. 2019, with the reductions of the official code: the mean runs over all
    B^2 entries, its zero diagonal too, and the student's mean carries gradient. Finite with finite
    gradients for B = 1, duplicates and collapsed batches, where the official code returns NaN.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Loss of (B, Ds) and (B, Dt), a scalar; 0 when B is 0.

        Raises:
            ValueError: shapes or devices do not fit.
            TypeError: an input is not floating point.
        """
        _check_pair("RelationalDistanceLoss", student, teacher, dims=2)
        with outside_autocast(student):
            s, t = (_scaled_distances(_full(x)) for x in (student, teacher.detach()))
            return F.smooth_l1_loss(s, t, reduction="sum") / max(s.numel(), 1)


def _scaled_distances(x: Tensor) -> Tensor:
    x = x - x.detach().mean(0)  # distances stay; their squares lose fewer digits
    squares = x.square().sum(1)
    d = (squares[:, None] + squares[None, :] - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    d = d.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)
    positive = d > 0
    return d / (d.sum() / positive.sum().clamp(min=1)).clamp(min=1e-12)


class RelationalAngleLoss(nn.Module):
    """RKD-A: cosines of the angles that pairs of samples span at a third, by smooth L1.

        A_ijk = <e_ij, e_ik>,  e_ij = normalise(x_j - x_i);  L = mean_ijk smooth_l1(A^s, A^t)

    Source: Park et al. 2019, with the official code's mean over all B^3 triples. Coinciding
    samples have e = 0 and receive no gradient through it.

    Args:
        max_bytes: memory for differences and cosines in float32, of which a training step holds up
            to 3 times as much; beyond it a random subset of samples is used, with all of its
            triples.

    Raises:
        ValueError: max_bytes is not positive.
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        super().__init__()
        if max_bytes < 1:
            raise ValueError(f"RelationalAngleLoss: max_bytes must be positive, got {max_bytes}")
        self.max_bytes = max_bytes

    def forward(
        self, student: Tensor, teacher: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Loss of (B, Ds) and (B, Dt), a scalar; `generator` (CPU) draws the subset.

        Raises:
            ValueError: shapes or devices do not fit.
            TypeError: an input is not floating point.
        """
        _check_pair("RelationalAngleLoss", student, teacher, dims=2)
        most = self.samples_within_memory(student.shape[1] + teacher.shape[1])
        if most < len(student):
            chosen = torch.randperm(len(student), generator=generator)[:most].to(student.device)
            student, teacher = student[chosen], teacher[chosen]
        with outside_autocast(student):
            s, t = (_angles(_full(x)) for x in (student, teacher.detach()))
            return F.smooth_l1_loss(s, t, reduction="sum") / max(s.numel(), 1)

    def samples_within_memory(self, widths: int) -> int:
        """Most samples n with (n^2 widths + 2 n^3) floats in `max_bytes`, at least 1."""
        n = 1
        while 4 * ((n + 1) ** 2 * widths + 2 * (n + 1) ** 3) <= self.max_bytes:
            n += 1
        return n


def _angles(x: Tensor) -> Tensor:
    difference = x[None, :, :] - x[:, None, :]
    length = difference.square().sum(2, keepdim=True)
    apart = length > 1e-24
    direction = torch.where(apart, difference, 0.0) * torch.where(apart, length, 1.0).rsqrt()
    return direction @ direction.transpose(1, 2)


class KoLeoLoss(nn.Module):
    """KoLeo: pushes every sample away from its nearest neighbours on the sphere.

        L = -mean_i mean over the k nearest n of  ln(|x_i - x_n + eps| + eps),   rows normalised

    Source: Sablayrolles et al. 2019, in DINOv3's form (eps 1e-8, neighbours by dot product, the
    sample itself excluded, also where DINOv3's code lets it tie with an opposite one). Neighbours
    and samples both receive gradient.

    Args:
        top_k: neighbours of each sample.
        group_size: split the batch into groups of that many samples (DINOv3 uses 16) and look for
            neighbours within them; None: the whole batch.
        distributed: look among the samples of all processes, gathered with gradient.

    Raises:
        ValueError: an option is not positive, or both group_size and distributed are given.
    """

    EPS = 1e-8

    def __init__(
        self, top_k: int = 1, group_size: int | None = None, distributed: bool = False
    ) -> None:
        super().__init__()
        if top_k < 1 or (group_size is not None and group_size < 1):
            raise ValueError(
                f"KoLeoLoss: top_k and group_size must be positive, got {top_k}, {group_size}"
            )
        if distributed and group_size is not None:
            raise ValueError("KoLeoLoss: groups are within a process; leave distributed=False")
        self.top_k, self.group_size, self.distributed = top_k, group_size, distributed

    def forward(self, x: Tensor) -> Tensor:
        """Loss of (B, D), a scalar; 0 when B is 0.

        Raises:
            ValueError: x is not (B, D), or B is not a multiple of group_size.
            TypeError: x is not floating point.
        """
        if x.dim() != 2:
            raise ValueError(f"KoLeoLoss: x must be (B, D), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"KoLeoLoss: x must be floating point, got {x.dtype}")
        if self.group_size is not None and len(x) % self.group_size:
            raise ValueError(
                f"KoLeoLoss: {len(x)} samples are no multiple of group_size={self.group_size}"
            )
        with outside_autocast(x):
            x = _full(x)
            x = x / row_norms(x, self.EPS)
            world = processes(None, None)
            distributed = self.distributed and world.world_size > 1
            among = gather_with_gradient(x, world) if distributed else x
            if len(x) == 0:
                return x.sum()
            if distributed:
                return self._spread(x, among, world.rank * len(x))
            groups = (
                x[None]
                if self.group_size is None
                else x.view(len(x) // self.group_size, self.group_size, x.shape[1])
            )
            return torch.stack([self._spread(part, part, 0) for part in groups]).mean()

    def _spread(self, x: Tensor, among: Tensor, start: int) -> Tensor:
        """Of samples x, which are rows start, start + 1, ... of `among`."""
        with torch.no_grad():
            dots = x @ among.T
            own = torch.arange(len(x), device=x.device)
            dots[own, start + own] = -torch.inf
            k = min(self.top_k, max(len(among) - 1, 1))  # a sample alone is its own neighbour
            nearest = dots.topk(k, dim=1).indices  # (B, k)
        apart = (x[:, None, :] - among[nearest] + self.EPS).norm(dim=2)
        spread: Tensor = -(apart + self.EPS).log().mean()
        return spread


class GramAnchor(nn.Module):
    """An early copy of a teacher that provides Gram targets, refreshed on a schedule.

    Source: DINOv3. After training step `step` (counted from 0) the anchor becomes a copy of the
    moving-average teacher when step + 1 >= first_update, (step + 1) is a multiple of `every`, and
    fewer than `most` refreshes have happened. The copy and the count are in `state_dict`.

    Args:
        teacher: module to copy now; the copy is frozen and in evaluation mode.
        first_update, every: training steps.
        most: refreshes at most, or None.

    Raises:
        ValueError: first_update < 0, every < 1, or most < 0.
    """

    def __init__(
        self, teacher: nn.Module, first_update: int, every: int, most: int | None = None
    ) -> None:
        super().__init__()
        if first_update < 0 or every < 1 or (most is not None and most < 0):
            raise ValueError(
                "GramAnchor: need first_update >= 0, every >= 1 and most >= 0, got "
                f"{first_update}, {every} and {most}"
            )
        self.first_update, self.every, self.most = first_update, every, most
        self.anchor = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.refreshes: Tensor
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))

    def is_due(self, step: int) -> bool:
        """Whether `update(step, ...)` will refresh."""
        done = step + 1
        if done < self.first_update or done % self.every:
            return False  # without a look at the count, which may be on a GPU
        return self.most is None or int(self.refreshes) < self.most

    @torch.no_grad()
    def update(self, step: int, teacher: nn.Module) -> bool:
        """Refresh from `teacher` if the schedule says so; returns whether it did."""
        if not self.is_due(step):
            return False
        self.anchor.load_state_dict(teacher.state_dict())
        self.refreshes += 1
        return True

    def train(self, mode: bool = True) -> "GramAnchor":
        """Stays in evaluation mode, whatever the model around it does."""
        super().train(mode)
        self.anchor.eval()
        return self

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> object:
        """The anchor's output, without gradient."""
        return self.anchor(*args, **kwargs)


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_pair(name: str, student: Tensor, teacher: Tensor, dims: int) -> None:
    if student.dim() != dims or teacher.dim() != dims or student.shape[:-1] != teacher.shape[:-1]:
        shape = "(B, P, D)" if dims == 3 else "(B, D)"
        hint = "; give student_grid and teacher_grid to resize" if dims == 3 else ""
        raise ValueError(
            f"{name}: student and teacher must be {shape}, equal but for D; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}{hint}"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise TypeError(
            f"{name}: student and teacher must be floating point, got {student.dtype} and "
            f"{teacher.dtype}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{name}: student is on {student.device} but teacher on {teacher.device}; "
            "move them to one device"
        )


def _check_token_mask(student: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"GramLoss: mask must be bool (True keeps), got {mask.dtype}")
    if mask.shape != student.shape[:2] or mask.device != student.device:
        raise ValueError(
            f"GramLoss: mask must be (B, P) = {tuple(student.shape[:2])} on {student.device}, got "
            f"{tuple(mask.shape)} on {mask.device}"
        )

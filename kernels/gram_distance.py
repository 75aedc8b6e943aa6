"""The Gram distance op: public function, gradient, registration.

The gradient is made in the forward pass, where the tiles of both Gram matrices exist anyway, and
scaled, out of place, in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from rankloss.kernels import blocked, reference
from rankloss.kernels.blocked import through_normalisation_
from rankloss.kernels.derivatives import MadeAhead, applied, link_to, scaled
from rankloss.kernels.dispatch import choose
from rankloss.kernels.launch import loop_over_batch, outside_autocast
from rankloss.kernels.reference import row_norms

NEGATIVES = ("keep", "clamp", "clamp_teacher")


def gram_distance(
    student: Tensor, teacher: Tensor, negatives: str = "keep", impl: str = "auto"
) -> Tensor:
    """Sum over pairs of squared differences of two cosine Gram matrices.

        sum over i, j of (S_ij - T_ij)^2,   S_ij = <s_i, s_j>,  T_ij = <t_i, t_j>,  rows normalised

    Zero rows have similarity 0 and get no gradient, the teacher gets none. `rankloss.GramLoss` is
    the friendly form.

    Args:
        student, teacher: (B, P, Ds) and (B, P, Dt) floating.
        negatives: "keep"; "clamp": negative S and T count as 0; "clamp_teacher": negative T count
            as 0, and S where both are negative.
        impl: "auto", or the name of an implementation.

    Returns:
        (B,) float32, or float64 when an input is.

    Raises:
        ValueError: shapes or devices do not fit, or an option is unknown.
        TypeError: an input is not floating point.
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"unknown negatives {negatives!r}; choose one of {list(NEGATIVES)}")
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "gram_distance: need (B, P, Ds) and (B, P, Dt), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise TypeError(
            "gram_distance: student and teacher must be floating point, got "
            f"{student.dtype} and {teacher.dtype}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"gram_distance: student is on {student.device} but teacher on {teacher.device}; "
            "move them to one device"
        )
    double = torch.float64 in (student.dtype, teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    chosen = choose(impl, student.device, dtype)
    if chosen == "reference":
        with outside_autocast(student):
            return reference.gram_distance(student, teacher, negatives)
    distance: Tensor
    distance = applied(_GramDistance, student, teacher, negatives, chosen, link_to(student))[0]
    return distance


# ---------------------------------------------------------------- registration


def _run(student: Tensor, teacher: Tensor, negatives: str, impl: str) -> tuple[Tensor, Tensor]:
    """(B,) distances and the gradient of their sum to the student."""
    student, teacher = student.contiguous(), teacher.contiguous()
    with outside_autocast(student):
        if impl == "blocked":
            return blocked.gram_distance(student, teacher, negatives)
        from rankloss.kernels import gram

        norms = row_norms(student)
        s, t = student / norms, teacher / row_norms(teacher)
        distance, gradient = gram.distance_and_gradient(s, t, negatives)
        return distance, through_normalisation_(gradient, s, norms)


_forward = torch.library.custom_op(
    "rankloss::gram_distance",
    _run,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, str negatives, str impl) -> (Tensor, Tensor)",
)


@_forward.register_fake
def _(student: Tensor, teacher: Tensor, negatives: str, impl: str) -> tuple[Tensor, Tensor]:
    return student.new_empty(student.shape[0]), student.new_empty(student.shape)


loop_over_batch(_forward)


class _GramDistance(MadeAhead):
    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, negatives: str, impl: str, link: Tensor
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _forward(student, teacher, negatives, impl)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        if grad is None:
            return None, None, None, None, None
        return scaled(grad, *ctx.saved_tensors), None, None, None, None

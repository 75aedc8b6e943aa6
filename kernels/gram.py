"""The Gram distance op: streaming implementation, registration, gradient, public function.

The gradient is made in the forward pass, where the tiles of both Gram matrices exist anyway, and
scaled, out of place, in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from rankloss.kernels import reference
from rankloss.kernels.dispatch import choose
from rankloss.kernels.launch import outside_autocast
from rankloss.kernels.reference import row_norms
from rankloss.kernels.registration import loop_over_batch

TILE = 1 << 22  # entries of a Gram matrix, or of rows, alive at a time; 16 MiB in float32
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
    link = student[:0].clone()  # ties gradients to the student without keeping its memory
    distance: Tensor = _GramDistance.apply(student, teacher, negatives, chosen, link)[0]
    return distance


def blocked(student: Tensor, teacher: Tensor, negatives: str) -> tuple[Tensor, Tensor]:
    """(B,) distances and the gradient of their sum to the student, a tile at a time.

    Rows too are normalised for a few images at a time: all of them would take more than the tiles.
    """
    b, p, ds = student.shape
    distance, gradient = student.new_zeros(b), torch.empty_like(student)
    images = max(1, TILE // max(1, p * p, p * (ds + teacher.shape[2])))
    rows = max(1, min(p, TILE // max(1, p)))
    for i in range(0, b, images):
        norms = row_norms(student[i : i + images])
        s = student[i : i + images] / norms
        t = teacher[i : i + images] / row_norms(teacher[i : i + images])
        for j in range(0, p, rows):
            ours = s[:, j : j + rows] @ s.transpose(1, 2)  # (images, rows, P)
            theirs = t[:, j : j + rows] @ t.transpose(1, 2)
            difference = _difference(ours, theirs, negatives)
            distance[i : i + images] += torch.linalg.vector_norm(difference, dim=(1, 2)).square()
            if negatives == "clamp":
                difference.masked_fill_(ours < 0, 0.0)
            gradient[i : i + images, j : j + rows] = 4 * (difference @ s)
        _through_normalisation_(gradient[i : i + images], s, norms)
    return distance, gradient


def fused(student: Tensor, teacher: Tensor, negatives: str) -> tuple[Tensor, Tensor]:
    """The same by the Triton kernel."""
    from rankloss.kernels import gram_triton

    norms = row_norms(student)
    s, t = student / norms, teacher / row_norms(teacher)
    distance, gradient = gram_triton.forward(s, t, negatives)
    return distance, _through_normalisation_(gradient, s, norms)


def _through_normalisation_(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """A gradient to unit rows becomes, in place, one to the rows they were made of."""
    gradient -= (gradient * unit).sum(-1, keepdim=True) * unit
    return gradient.div_(norms)


def _difference(ours: Tensor, theirs: Tensor, negatives: str) -> Tensor:
    """Their difference as `negatives` counts it; `theirs` is overwritten."""
    if negatives == "keep":
        return torch.sub(ours, theirs, out=theirs)
    if negatives == "clamp":
        return theirs.clamp_(min=0).neg_().add_(ours.clamp(min=0))
    both = (ours < 0) & (theirs < 0)  # then both count as 0
    return theirs.clamp_(min=0).neg_().add_(ours).masked_fill_(both, 0.0)


# ---------------------------------------------------------------- registration


@torch.library.custom_op("rankloss::gram_distance", mutates_args=())
def _forward(student: Tensor, teacher: Tensor, negatives: str, impl: str) -> tuple[Tensor, Tensor]:
    student, teacher = student.contiguous(), teacher.contiguous()
    with outside_autocast(student):
        implementation = blocked if impl == "blocked" else fused
        return implementation(student, teacher, negatives)


@_forward.register_fake
def _(student: Tensor, teacher: Tensor, negatives: str, impl: str) -> tuple[Tensor, Tensor]:
    return student.new_empty(student.shape[0]), student.new_empty(student.shape)


loop_over_batch(_forward)


class _Scale(torch.autograd.Function):
    """The gradient times what comes from above; differentiating it is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, gradient: Tensor, link: Tensor) -> Tensor:
        return grad[:, None, None] * gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "gram_distance: the streaming implementations have no second derivative; "
            "use impl='reference' to differentiate twice"
        )


class _GramDistance(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, negatives: str, impl: str, link: Tensor
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _forward(student, teacher, negatives, impl)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)  # or backward would be handed zeros as large as it
        ctx.save_for_backward(gradient, inputs[4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        if grad is None:
            return None, None, None, None, None
        return _Scale.apply(grad, *ctx.saved_tensors), None, None, None, None

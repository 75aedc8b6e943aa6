"""Checks and dtypes that the losses of a student and a teacher share."""

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Convert to float32, but leave float64."""
    return x if x.dtype == torch.float64 else x.float()


def exact_products(x: Tensor) -> Tensor:
    """Convert to float64, in which no TF32 or bfloat16 setting of float32 products has a say.

    On devices without float64 (Apple's) the dtype stays.
    """
    return x if x.device.type == "mps" else x.double()


def check_pair(name: str, student: Tensor, teacher: Tensor, dims: int) -> None:
    """Raise unless both are floating, on one device, and equal in shape but for the last axis."""
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

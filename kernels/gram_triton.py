"""Launches the Triton kernel of the Gram distance.

A program owns a tile of rows of one image and streams the others; the two Gram matrices exist a
tile at a time, in registers, and nothing of size P x P is written.
"""

import torch
from torch import Tensor

from rankloss.kernels.configurations import gram_configuration
from rankloss.kernels.gram_kernels import gram_kernel
from rankloss.kernels.launch import on_device_of


def forward(student: Tensor, teacher: Tensor, negatives: str) -> tuple[Tensor, Tensor]:
    """Of unit rows: (B,) distances and the gradient of their sum to the student (B, P, Ds)."""
    b, p, ds = student.shape
    config = gram_configuration(student.device)
    tiles = -(-p // config.rows)
    distance, gradient = student.new_zeros(b, tiles), torch.empty_like(student)
    if student.numel():
        with on_device_of(student):
            gram_kernel[(b * tiles, -(-ds // config.columns))](
                student,
                teacher,
                distance,
                gradient,
                p,
                DS=ds,
                DT=teacher.shape[2],
                BI=config.rows,
                BJ=config.rows,
                BD=config.columns,
                NEGATIVES=negatives,
                PRECISION=config.precision,
                **config.options(),
            )
    return distance.sum(1), gradient

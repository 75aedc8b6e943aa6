"""The Gram distance in Triton: tiles of both Gram matrices at once, then their difference times s.

The first kernel makes a tile of <s_i, s_j> and of <t_i, t_j>, adds up the squares of their
difference and stores it; it makes the upper half and stores the lower one, its mirror image. The
second kernel multiplies the differences with the student's rows, which is the gradient. They
exist for some images at a time, or for some rows of one image too large for that.

Rows of such an image, of more than 4,096 patches, have no mirror image in the buffer, so that both
matrices are made whole: with the gradient that is 1 + Ds / (Ds + Dt) times the arithmetic of two
batched products, 1.43 at widths 768 and 1,024, where smaller images take at most 1.2 times. A
mirror image would have to add to gradients of rows that other programs write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankloss.kernels.configurations import gram_plan_for
from rankloss.kernels.launch import on_device_of

TILE = 1 << 24  # differences alive at a time: 64 MiB


@triton.jit
def tile_of_rows(x, rows, columns, P, D: tl.constexpr):
    """Some columns of some rows of one image, (P, D), 0 outside."""
    mask = (rows < P)[:, None] & (columns < D)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0)


@triton.jit
def gram_tile(x, i, j, P, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """<x_i, x_j>, (BI, BJ) float32."""
    acc = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for d0 in range(0, D, BD):  # unrolled, all of D would be in shared memory at once
        d = d0 + tl.arange(0, BD)
        left, right = tile_of_rows(x, i, d, P, D), tile_of_rows(x, j, d, P, D)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["first", "row0", "rows", "P"])
def gram_kernel(
    student,  # (B, P, DS) unit rows, float32
    teacher,  # (B, P, DT)
    differences,  # out (images, rows, P)
    distance,  # in and out (B, row tiles of P): a tile's share
    first,  # image at which the chunk starts
    row0,  # row at which it starts, and how many rows it has
    rows,
    P,
    DS: tl.constexpr,
    DT: tl.constexpr,
    BI: tl.constexpr,
    BD: tl.constexpr,
    MIRROR: tl.constexpr,  # every row is in the chunk: the lower half mirrors the upper
    NEGATIVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program axis 0: image and BI rows; it streams the columns."""
    tiles = tl.cdiv(rows, BI)
    local = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = row0 + tile * BI + tl.arange(0, BI)
    s, t = student + (first + local) * P * DS, teacher + (first + local) * P * DT
    differences += local * rows * P
    total = tl.zeros((BI,), tl.float32)
    start = tile * BI if MIRROR else 0
    for j0 in range(start, P, BI):
        j = j0 + tl.arange(0, BI)
        ours = gram_tile(s, i, j, P, DS, BD, PRECISION)
        theirs = gram_tile(t, i, j, P, DT, BD, PRECISION)
        if NEGATIVES == "keep":
            difference = ours - theirs
        elif NEGATIVES == "clamp":
            difference = tl.maximum(ours, 0.0) - tl.maximum(theirs, 0.0)
        else:
            both = (ours < 0) & (theirs < 0)
            difference = tl.where(both, 0.0, ours - tl.maximum(theirs, 0.0))
        twice = 2.0 if MIRROR else 1.0
        total += tl.sum(difference * difference, 1) * tl.where(j0 > start, twice, 1.0)
        if NEGATIVES == "clamp":
            difference = tl.where(ours >= 0, difference, 0.0)
        inside = (i < row0 + rows)[:, None] & (j < P)[None, :]
        row = (i - row0).to(tl.int64)
        tl.store(differences + row[:, None] * P + j[None, :], difference, mask=inside)
        if MIRROR:
            mirrored = differences + j.to(tl.int64)[None, :] * P + i[:, None]
            tl.store(mirrored, difference, mask=inside & (j0 > start))
    out = distance + (first + local) * tl.cdiv(P, BI) + row0 // BI + tile
    tl.store(out, tl.sum(total, 0))


@triton.jit(do_not_specialize=["first", "row0", "rows", "P"])
def gradient_kernel(
    differences,  # (images, rows, P)
    student,
    gradient,  # out (B, P, DS)
    first,
    row0,
    rows,
    P,
    DS: tl.constexpr,
    BI: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """4 differences @ student. Program axis 0: image and BI rows; axis 1: BD columns."""
    tiles = tl.cdiv(rows, BI)
    local = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BI + tl.arange(0, BI)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    s = student + (first + local) * P * DS
    differences += local * rows * P
    acc = tl.zeros((BI, BD), tl.float32)
    for j0 in range(0, P, BI):
        j = j0 + tl.arange(0, BI)
        mask = (row < rows)[:, None] & (j < P)[None, :]
        at = row.to(tl.int64)[:, None] * P + j[None, :]
        difference = tl.load(differences + at, mask=mask, other=0.0)
        acc = tl.dot(difference, tile_of_rows(s, j, d, P, DS), acc, input_precision=PRECISION)
    out = gradient + (first + local) * P * DS + (row0 + row).to(tl.int64)[:, None] * DS
    tl.store(out + d[None, :], 4.0 * acc, mask=(row < rows)[:, None] & (d < DS)[None, :])


def distance_and_gradient(
    student: Tensor, teacher: Tensor, negatives: str
) -> tuple[Tensor, Tensor]:
    """For unit rows: (B,) distances and the gradient of their sum to the student, (B, P, Ds)."""
    (b, p, ds), plan = student.shape, gram_plan_for(student.device)
    side = plan.rows
    distance = student.new_zeros(b, triton.cdiv(p, side))
    gradient = torch.empty_like(student)
    if not student.numel():
        return distance.sum(1), gradient.zero_()
    images = max(1, min(b, TILE // (p * p)))
    rows = p if p * p <= TILE else max(1, TILE // p // side) * side
    buffer = student.new_empty(images, min(rows, p), p)
    for first in range(0, b, images):
        count = min(images, b - first)
        for row0 in range(0, p, rows):
            sizes = first, row0, min(rows, p - row0), p
            programs = count * triton.cdiv(sizes[2], side)
            with on_device_of(student):
                gram_kernel[(programs,)](
                    student,
                    teacher,
                    buffer,
                    distance,
                    *sizes,
                    DS=ds,
                    DT=teacher.shape[2],
                    MIRROR=rows >= p,
                    NEGATIVES=negatives,
                    **plan.constants(plan.inner),
                )
                gradient_kernel[(programs, triton.cdiv(ds, plan.columns))](
                    buffer, student, gradient, *sizes, DS=ds, **plan.constants(plan.columns)
                )
    return distance.sum(1), gradient

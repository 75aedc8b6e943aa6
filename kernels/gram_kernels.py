"""Triton device code of the Gram distance, launched by `gram_triton.py`."""

import triton
import triton.language as tl


@triton.jit
def gram_tile(
    x,  # rows of one image, (P, D) float32
    i,  # (BI,)
    j,  # (BJ,)
    P,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<x_i, x_j>, (BI, BJ) float32."""
    acc = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for d0 in range(0, D, BD):  # unrolled, all of D would be in shared memory at once
        d = d0 + tl.arange(0, BD)
        left = tl.load(
            x + i.to(tl.int64)[:, None] * D + d[None, :],
            mask=(i < P)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        right = tl.load(
            x + j.to(tl.int64)[:, None] * D + d[None, :],
            mask=(j < P)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["P"])
def gram_kernel(
    student,  # (B, P, DS) float32
    teacher,  # (B, P, DT) float32
    distance,  # out (B, row tiles) float32: a tile's share
    gradient,  # out (B, P, DS) float32
    P,
    DS: tl.constexpr,
    DT: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    NEGATIVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program axis 0: image and row tile; axis 1: the columns of the gradient it makes."""
    tiles = tl.cdiv(P, BI)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = tile * BI + tl.arange(0, BI)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    s, t = student + image * P * DS, teacher + image * P * DT
    total = tl.zeros((BI,), tl.float32)
    acc = tl.zeros((BI, BD), tl.float32)
    for j0 in range(0, P, BJ):
        j = j0 + tl.arange(0, BJ)
        ours = gram_tile(s, i, j, P, DS, BD, PRECISION)
        theirs = gram_tile(t, i, j, P, DT, BD, PRECISION)
        if NEGATIVES == "keep":
            difference = ours - theirs
        elif NEGATIVES == "clamp":
            difference = tl.maximum(ours, 0.0) - tl.maximum(theirs, 0.0)
        else:
            both = (ours < 0) & (theirs < 0)
            difference = tl.where(both, 0.0, ours - tl.maximum(theirs, 0.0))
        total += tl.sum(difference * difference, 1)
        if NEGATIVES == "clamp":
            difference = tl.where(ours >= 0, difference, 0.0)
        columns = tl.load(
            s + j.to(tl.int64)[:, None] * DS + d[None, :],
            mask=(j < P)[:, None] & (d < DS)[None, :],
            other=0.0,
        )
        acc = tl.dot(difference, columns, acc, input_precision=PRECISION)
    out = gradient + image * P * DS + i.to(tl.int64)[:, None] * DS + d[None, :]
    tl.store(out, 4.0 * acc, mask=(i < P)[:, None] & (d < DS)[None, :])
    if tl.program_id(1) == 0:
        tl.store(distance + image * tiles + tile, tl.sum(total, 0))

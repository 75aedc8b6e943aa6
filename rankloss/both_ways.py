"""InfoNCE in both directions of one set of pairs, whose scores are formed once for both.

Row i of the images matches row i of the texts and every candidate is an anchor, so that scores of
texts against images are those of images against texts, transposed, and both directions' gradients
add up in one matrix. Of six products, which two separate directions take, three are left, or four
where the scores are formed twice because they do not all fit.

As in `rankloss.streaming`, values and gradients are made together, by one opaque op inside an
`autograd.Function`, and nothing N x N is kept between the forward and the backward pass. Nothing
waits for a device other than the CPU.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankloss.fusion.precision import full_dtype
from rankloss.kernels.derivatives import MadeAhead, Refusing, applied, link_to, products
from rankloss.kernels.launch import loop_over_batch, outside_autocast
from rankloss.scores import exact_product

PART = 1 << 20  # bytes of scores that a processor's cache holds while they are worked on
WHOLE = 80 << 20  # bytes up to which all scores and their gradients exist at once
KEPT = 64 << 20  # bytes of scores up to which a CPU forms them once, and overwrites them
CHUNK = 20 << 20  # bytes for what is made of the scores of some images at a time
LARGEST = 192 << 20  # the same for many images, for fewer launches
ENTRY = 5  # numbers of them a score

SPAN = 120.0  # of matches' scores: exponentials lie within exp(-60) and exp(60) then


def info_nce_both_ways(images: Tensor, texts: Tensor, scale: Tensor, weight: float) -> Tensor:
    """Return `weight` times the mean over both directions of InfoNCE.

    Args:
        images, texts: (N, D) of any floating dtype; computed in float32, float64 if one is.
        scale: 0-D.
        weight: factor of the loss.

    Returns:
        A scalar; 0 for no pairs.
    """
    leaves = images, texts, scale
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in leaves)):
        value: Tensor = applied(_Value, *leaves, weight)
        return value
    found: tuple[Tensor, ...] = applied(_BothWays, *leaves, weight, *map(link_to, leaves))
    return found[0]


class Found(NamedTuple):
    """The loss, and gradients to what it was computed from; None where none are wanted."""

    value: Tensor
    d_images: Tensor | None = None
    d_texts: Tensor | None = None
    d_scale: Tensor | None = None


# ---------------------------------------------------------------- three ways


def in_one_exponential(
    images: Tensor, texts: Tensor, scale: Tensor, weight: float, *, wanted: bool
) -> Found | None:
    """Compute the loss on a CPU with one exponential a score, which both directions share.

    With E_ij = exp(S_ij - c) for one number c, the sums r_i of its rows and s_j of its columns are
    both directions' partition functions, and E_ij (1/r_i + 1/s_j) their probabilities, added. With
    c amid the matches' scores no sum is below exp(-60), so that what underflows, below exp(-87),
    counts for nothing in it.

    Args:
        images, texts: (N, D) float32 or float64, N > 0.
        scale: 0-D.
        weight: factor of both directions' sums over anchors.
        wanted: make gradients too.

    Returns:
        None where matches' scores span more than `SPAN`, an exponential overflows, or any number
        is not finite: the others have no such limit.
    """
    factor = float(scale)
    if not factor:  # the scale's gradient is made of those of scaled features
        return None
    shares = torch.addmm(scale, images, texts.T, beta=0, alpha=factor)  # (N, N)
    own = shares.diagonal()
    low, high = map(float, own.aminmax())
    if not high - low <= SPAN:
        return None
    count = -(-shares.nbytes // PART)
    parts, sums = shares.chunk(count), shares.new_zeros(2, len(shares))
    for part, row in zip(parts, sums[0].chunk(count), strict=True):
        torch.sum(part.sub_((low + high) / 2).exp_(), 1, out=row)
        sums[1].add_(part.sum(0))
    value = (sums / own).log_().sum().mul_(weight)
    if not math.isfinite(value):
        return None
    if not wanted:
        return Found(value)
    by_row, by_column = sums.reciprocal_().unbind()
    for part, row in zip(parts, by_row[:, None].chunk(count), strict=True):
        part.mul_(row + by_column)
    own.sub_(2)
    by = factor * weight
    d_images = torch.addmm(scale, shares, texts, beta=0, alpha=by)
    d_texts = torch.addmm(scale, shares.T, images, beta=0, alpha=by)
    return Found(value, d_images, d_texts, d_images.flatten().dot(images.flatten()).div_(factor))


def at_once(images: Tensor, texts: Tensor, scale: Tensor, weight: float, *, wanted: bool) -> Found:
    """Compute the loss of all scores together, on any device; see `in_one_exponential`."""
    scores = exact_product(images, texts.T).mul_(scale)
    by_row, by_column = scores.log_softmax(1), scores.log_softmax(0)
    value = (by_row.trace() + by_column.trace()) * -weight
    if not wanted:
        return Found(value)
    gradient = by_row.exp_().add_(by_column.exp_())
    gradient.diagonal().sub_(2)
    gradient.mul_(weight)
    d_images, d_texts = gradient @ texts, gradient.T @ images
    d_scale = d_images.flatten().dot(images.flatten())
    return Found(value, d_images.mul_(scale), d_texts.mul_(scale), d_scale)


def by_log_sums(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    weight: float,
    *,
    wanted: bool,
    step: int,
) -> Found:
    """Compute the loss in two passes over some images at a time, on any device.

    The first makes the log-sum-exps of rows and columns of scores; the second makes the scores
    again, and their gradients.

    Args:
        images, texts, scale, weight, wanted: as in `in_one_exponential`.
        step: number of images whose scores are worked on at a time.
    """

    def scores(rows: slice) -> Tensor:
        return exact_product(images[rows], texts.T).mul_(scale)

    chunks = [slice(start, start + step) for start in range(0, len(images), step)]
    by_row, by_column = [], images.new_full((len(images),), -math.inf)
    value = images.new_zeros(())
    for rows in chunks:
        s = scores(rows)
        by_row.append(s.logsumexp(1, keepdim=True))
        by_column = torch.logaddexp(by_column, s.logsumexp(0))
        value += by_row[-1].sum() - 2 * s.diagonal(rows.start).sum()
    value = (value + by_column.sum()).mul_(weight)
    if not wanted:
        return Found(value)
    d_images, d_texts = torch.empty_like(images), torch.zeros_like(texts)
    for rows, log_sums in zip(chunks, by_row, strict=True):
        s = scores(rows)
        gradient = (s - log_sums).exp_()
        gradient += s.sub_(by_column).exp_()  # the last that these scores are needed for
        gradient.diagonal(rows.start).sub_(2)
        gradient.mul_(weight)
        torch.mm(gradient, texts, out=d_images[rows])
        d_texts.addmm_(gradient.T, images[rows])
    d_scale = d_images.flatten().dot(images.flatten())
    return Found(value, d_images.mul_(scale), d_texts.mul_(scale), d_scale)


# ---------------------------------------------------------------- registration


def _widened(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert to the dtype of computation, that of features but at least float32."""
    dtype = full_dtype(images, texts)
    return images.to(dtype), texts.to(dtype), scale.to(dtype)


def run(images: Tensor, texts: Tensor, scale: Tensor, weight: float, wanted: bool) -> Any:
    """Implementation of the op: value, and gradients, empty where none are wanted."""
    n = len(images)
    images, texts, scale = given = _widened(images, texts, scale)
    each, found, size = weight / 2 / max(n, 1), None, images.itemsize * n * n
    with outside_autocast(images):
        if n and images.device.type == "cpu" and size <= KEPT:
            found = in_one_exponential(*given, each, wanted=wanted)
        if found is None and size * ENTRY <= WHOLE:
            found = at_once(*given, each, wanted=wanted)
        if found is None:
            bytes_ = max(CHUNK, min(LARGEST, size))
            step = max(1, bytes_ // (ENTRY * images.itemsize * n))
            found = by_log_sums(*given, each, wanted=wanted, step=step)
    return tuple(images.new_empty(0) if x is None else x for x in found)


def _fake(images: Tensor, texts: Tensor, scale: Tensor, weight: float, wanted: bool) -> Any:
    wide = _widened(images, texts, scale)
    new = wide[0].new_empty
    return new(()), *(new(x.shape if wanted else 0) for x in wide)


both_ways = torch.library.custom_op(
    "rankloss::both_ways",
    run,
    mutates_args=(),
    schema="(Tensor images, Tensor texts, Tensor scale, float weight, bool wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
both_ways.register_fake(_fake)
loop_over_batch(both_ways)


class _Value(Refusing):
    """The loss alone; a function, so that tangents are refused and not dropped."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        found: tuple[Tensor, ...] = both_ways(*args, False)
        return found[0]


class _BothWays(MadeAhead):
    """The loss and its gradients; arguments are those of the op, and links."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = both_ways(*args[:4], True)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        return *products(ctx, grad), *(None,) * 4

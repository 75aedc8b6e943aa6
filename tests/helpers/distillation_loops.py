"""The distillation losses spelled out: one pair, triple or neighbour after the other, in float64.

Vectors are lists of numbers, 0-D tensors that autograd follows; nothing is computed on a batch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

Vector = list[Tensor]
ZERO = torch.zeros((), dtype=torch.float64)


def vectors(x: Tensor) -> list[Vector]:
    """(n, D) to n lists of D numbers."""
    return [list(row.unbind()) for row in x.double().unbind()]


def number(x: Tensor) -> float:
    return float(x.detach())


def total(numbers: Iterable[Tensor]) -> Tensor:
    return sum(numbers, ZERO)


def dot(a: Vector, b: Vector) -> Tensor:
    return total(x * y for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> Vector:
    """a / |a|; 0, and no function of a, when a is 0."""
    square = dot(a, a)
    if number(square) == 0:
        return [ZERO] * len(a)
    return [x / square.sqrt() for x in a]


def smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    difference = abs(a - b)
    return difference**2 / 2 if number(difference) < 1 else difference - 0.5


# ---------------------------------------------------------------- Gram


def similarities(s: Tensor, t: Tensor, negatives: str) -> tuple[Tensor, Tensor]:
    """Values that two similarities count as."""
    student_below, teacher_below = number(s) < 0, number(t) < 0
    if negatives == "clamp":
        return (ZERO if student_below else s), (ZERO if teacher_below else t)
    if negatives == "clamp_teacher":
        return (ZERO if student_below and teacher_below else s), (ZERO if teacher_below else t)
    return s, t


def gram(
    student: Tensor,
    teacher: Tensor,
    level: str = "image",
    negatives: str = "keep",
    mask: Tensor | None = None,
) -> Tensor:
    """Mean over the pairs of kept tokens that share an image, or the batch."""
    s, t = ([vectors(image) for image in x] for x in (student, teacher))
    places = list(product(range(student.shape[0]), range(student.shape[1])))
    kept = [(b, p) for b, p in places if mask is None or mask[b, p]]
    terms = []
    for (b, p), (c, q) in product(kept, kept):
        if level == "image" and b != c:
            continue
        of_student = dot(unit(s[b][p]), unit(s[c][q]))
        of_teacher = dot(unit(t[b][p]), unit(t[c][q]))
        x, y = similarities(of_student, of_teacher, negatives)
        terms.append((x - y) ** 2)
    return total(terms) / max(len(terms), 1)


def frobenius(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """The paper's sum for each image: over all of its pairs."""
    return [
        total((dot(unit(s[p]), unit(s[q])) - dot(unit(t[p]), unit(t[q]))) ** 2 for p, q in pairs)
        for s, t, pairs in (
            (vectors(a), vectors(b), list(product(range(len(a)), repeat=2)))
            for a, b in zip(student, teacher, strict=True)
        )
    ]


# ---------------------------------------------------------------- relations


def distances(x: Tensor) -> list[list[Tensor]]:
    """Between samples, over the mean of those above 0; 1e-6 where two samples coincide."""
    rows = vectors(x)
    d = [[ZERO] * len(rows) for _ in rows]
    for i, j in product(range(len(rows)), repeat=2):
        if i != j:
            difference = [a - b for a, b in zip(rows[i], rows[j], strict=True)]
            square = dot(difference, difference)
            d[i][j] = square.sqrt() if number(square) > 1e-12 else ZERO + 1e-6
    positive = [value for row in d for value in row if number(value) > 0]
    if not positive:
        return d
    mean = total(positive) / len(positive)
    return [[value / mean for value in row] for row in d]


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    s, t = distances(student), distances(teacher)
    return total(smooth_l1(s[i][j], t[i][j]) for i, j in product(range(n), repeat=2)) / n**2


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    edges = [
        {
            (i, j): unit([b - a for a, b in zip(rows[i], rows[j], strict=True)])
            for i, j in product(range(n), repeat=2)
        }
        for rows in (vectors(student), vectors(teacher))
    ]
    terms = []
    for i, j, k in product(range(n), repeat=3):
        s, t = (dot(e[i, j], e[i, k]) for e in edges)
        terms.append(smooth_l1(s, t))
    return total(terms) / n**3


# ---------------------------------------------------------------- KoLeo


def koleo(x: Tensor, top_k: int = 1) -> Tensor:
    eps = 1e-8
    rows = [unit(row) for row in vectors(x)]
    terms = []
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i] or [i]
        others.sort(key=lambda j: -number(dot(row, rows[j])))
        nearest = others[:top_k]
        for j in nearest:
            apart = [a - b + eps for a, b in zip(row, rows[j], strict=True)]
            terms.append(-(dot(apart, apart).sqrt() + eps).log() / len(nearest))
    return total(terms) / len(rows)


def spread_of_coinciding(width: int) -> float:
    """KoLeo's value where neighbours coincide: every component is apart by eps alone."""
    return -math.log(1e-8 * math.sqrt(width) + 1e-8)


def gradient(value: Tensor, x: Tensor) -> Tensor:
    """d value / d x, zeros where x does not matter."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (result,) = torch.autograd.grad(value, x, materialize_grads=True)
    return result


def value_and_gradient(
    loss: Callable[..., Tensor], x: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Value of a loss, and its gradient to the first argument, of which a copy is made."""
    leaf = x.detach().requires_grad_()
    value = loss(leaf, *rest, **options)
    return value.detach(), gradient(value, leaf)


def random_features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def permutations(count: int, size: int, seed: int = 0) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(size, generator=generator) for _ in range(count)]

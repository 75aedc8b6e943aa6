"""The named cases: a problem at a size, and the seeded inputs every provider gets."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

LOGIT_SCALE = 1 / 0.07  # where CLIP training starts
FEATURES = 512  # width of the features an order-0 loss is given
LATENT = 64  # width of the embeddings the scores of the other orders come from
WIDE_ANCHORS, WIDE_PLACES, WIDE_CANDIDATES = 256, 64, 4096


@dataclass(frozen=True)
class Inputs:
    """`leaves` require a gradient. `given` does not: target scores (absent at order 0), or the
    teacher's features. `sorted`: the candidates by target score, where the sort is not timed."""

    leaves: dict[str, Tensor]
    given: Tensor | None = None
    sorted: Tensor | None = None

    def ranking(self) -> Tensor:
        """Candidates (N, M), best first: sorted now, as a loss would, unless that is done."""
        if self.sorted is not None:
            return self.sorted
        assert self.given is not None
        return self.given.argsort(dim=1, descending=True, stable=True)


@dataclass(frozen=True)
class Case:
    """N anchors rank K of M candidates under a model of some order, transition width r.

    `dtype` is that of the transition tables (order 0: of the features); scores are float32.
    `presorted`: the ranking is given, and no provider is timed for making it.
    """

    order: int
    n: int
    k: int
    m: int
    r: int = 32
    seed: int = 0
    dtype: torch.dtype = torch.float32
    presorted: bool = False

    @property
    def group(self) -> str:
        return f"order {self.order}"

    @property
    def size(self) -> str:
        if self.order == 0:
            return f"N=M={self.m}" if self.n == self.m else f"N={self.n}, M={self.m}"
        if self.n == self.k == self.m:
            return f"N=K=M={self.m}"
        return f"N={self.n}, K={self.k}, M={self.m}"

    @property
    def name(self) -> str:
        width = "" if self.r == 32 else f", r={self.r}"
        half = "" if self.dtype == torch.float32 else ", " + str(self.dtype).removeprefix("torch.")
        return f"{self.group}, {self.size}{width}{half}"

    @property
    def scores(self) -> int:
        """Number of utilities that the definition asks for, N x K x M."""
        return self.n * self.k * self.m

    @property
    def remaining_scores(self) -> int:
        """Number of utilities of candidates not yet taken: N (K M - K (K-1) / 2)."""
        return self.n * (self.k * self.m - self.k * (self.k - 1) // 2)

    def with_at_most(self, scores: int) -> "Case":
        """The same case with fewer anchors (order 0: pairs), lists as long, so that it fits."""
        if self.order == 0:
            side = min(self.m, math.isqrt(scores))
            return replace(self, n=side, m=side)
        return replace(self, n=max(1, min(self.n, scores // (self.k * self.m))))

    def inputs(self, *, exact: bool = False, device: str = "cpu") -> Inputs:
        """Matched pairs of unit-norm embeddings, their scores, and standard-normal tables.

        Drawn in float32 on the CPU, so that all dtypes and devices see one problem; `exact`: then
        rounded to the case's dtype all the same, but held in float64.
        """
        generator = torch.Generator().manual_seed(self.seed)
        width = LATENT if self.order else FEATURES
        shared, images, texts = torch.randn(3, self.m, width, generator=generator)
        images, texts = normalize(shared + images, dim=1), normalize(shared + texts, dim=1)
        if self.order == 0:
            leaves = {
                "image_features": images.to(self.dtype),
                "text_features": texts.to(self.dtype),
            }
            leaves["logit_scale"] = torch.tensor(LOGIT_SCALE)
            return Inputs(_leaves(leaves, exact, device))
        leaves = {"scores": LOGIT_SCALE * images[: self.n] @ texts.T}
        if terms := self.order - 1:
            rows = self.order * terms // 2
            predecessors = torch.randn(rows, self.m, self.r, generator=generator)
            keys = torch.randn(terms, self.m, self.r, generator=generator) * self.r**-0.5
            leaves |= {"predecessors": predecessors.to(self.dtype), "keys": keys.to(self.dtype)}
        targets = (LOGIT_SCALE * texts[: self.n] @ images.T).contiguous().to(device)
        inputs = Inputs(_leaves(leaves, exact, device), targets)
        return replace(inputs, sorted=inputs.ranking()) if self.presorted else inputs


@dataclass(frozen=True)
class GramCase:
    """Features of a student and a teacher for the patches of n images."""

    n: int = 64
    patches: int = 1024
    student_width: int = 384
    teacher_width: int = 768
    seed: int = 0

    group = "gram"
    dtype = torch.float32

    @property
    def name(self) -> str:
        widths = f"widths {self.student_width} and {self.teacher_width}"
        return f"gram, B={self.n}, P={self.patches}, {widths}"

    @property
    def scores(self) -> int:
        """Number of similarities that one side has, B x P x P."""
        return self.n * self.patches**2

    def with_at_most(self, scores: int) -> "GramCase":
        return replace(self, n=max(1, min(self.n, scores // self.patches**2)))

    def inputs(self, *, exact: bool = False, device: str = "cpu") -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        widths = (self.student_width, self.teacher_width)
        student, teacher = (
            torch.randn(self.n, self.patches, width, generator=generator) for width in widths
        )
        given = teacher.to(device, torch.float64 if exact else None)
        return Inputs(_leaves({"student": student}, exact, device), given)


AnyCase = Case | GramCase


def square_case(order: int, size: int, seed: int = 0) -> Case:
    """N = K = M = size; an order-0 loss has one place, K = 1."""
    return Case(order, size, size if order else 1, size, seed=seed)


def wide_case(order: int, seed: int = 0) -> Case:
    """Few places among many candidates, for a local batch; at order 0 the 4096 x 4096 loss."""
    if order == 0:
        return square_case(0, WIDE_CANDIDATES, seed)
    return Case(order, WIDE_ANCHORS, WIDE_PLACES, WIDE_CANDIDATES, seed=seed)


def cases(orders: Iterable[int], sizes: list[int], wide: bool, seed: int = 0) -> list[Case]:
    chosen = []
    for order in orders:
        chosen += [square_case(order, size, seed) for size in sizes]
        chosen += [wide_case(order, seed)] * wide
    return chosen


def _leaves(tensors: dict[str, Tensor], exact: bool, device: str) -> dict[str, Tensor]:
    dtype = torch.float64 if exact else None
    return {name: x.to(device, dtype).contiguous().requires_grad_() for name, x in tensors.items()}

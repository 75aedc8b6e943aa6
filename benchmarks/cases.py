"""The named cases: a problem at a size, and the seeded inputs every provider gets."""

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
    teacher's features."""

    leaves: dict[str, Tensor]
    given: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """N anchors rank K of M candidates under a model of some order, transition width r."""

    order: int
    n: int
    k: int
    m: int
    r: int = 32
    seed: int = 0

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
        return f"{self.group}, {self.size}"

    @property
    def scores(self) -> int:
        """Number of utilities that the definition asks for, N x K x M."""
        return self.n * self.k * self.m

    def with_at_most(self, scores: int) -> "Case":
        """The same case with fewer anchors, so that N x K x M fits; lists keep their lengths."""
        if self.order == 0:
            return self
        return replace(self, n=max(1, min(self.n, scores // (self.k * self.m))))

    def inputs(self, dtype: torch.dtype = torch.float32) -> Inputs:
        """Matched pairs of unit-norm embeddings, their scores, and standard-normal tables.

        Drawn in float32 whatever the dtype, so that all dtypes see one problem.
        """
        generator = torch.Generator().manual_seed(self.seed)
        width = LATENT if self.order else FEATURES
        shared, images, texts = torch.randn(3, self.m, width, generator=generator)
        images, texts = normalize(shared + images, dim=1), normalize(shared + texts, dim=1)
        if self.order == 0:
            leaves = {"image_features": images, "text_features": texts}
            leaves["logit_scale"] = torch.tensor(LOGIT_SCALE)
            return Inputs(_leaves(leaves, dtype))
        leaves = {"scores": LOGIT_SCALE * images[: self.n] @ texts.T}
        if terms := self.order - 1:
            rows = self.order * terms // 2
            leaves["predecessors"] = torch.randn(rows, self.m, self.r, generator=generator)
            keys = torch.randn(terms, self.m, self.r, generator=generator)
            leaves["keys"] = keys * self.r**-0.5
        targets = LOGIT_SCALE * texts[: self.n] @ images.T
        return Inputs(_leaves(leaves, dtype), targets.to(dtype).contiguous())


@dataclass(frozen=True)
class GramCase:
    """Features of a student and a teacher for the patches of n images."""

    n: int = 64
    patches: int = 1024
    student_width: int = 384
    teacher_width: int = 768
    seed: int = 0

    group = "gram"

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

    def inputs(self, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        widths = (self.student_width, self.teacher_width)
        student, teacher = (
            torch.randn(self.n, self.patches, width, generator=generator) for width in widths
        )
        return Inputs(_leaves({"student": student}, dtype), teacher.to(dtype))


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


def _leaves(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype).contiguous().requires_grad_() for name, x in tensors.items()}

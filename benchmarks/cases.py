"""The named cases: which order at which size, and the seeded inputs every provider gets."""

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
class Case:
    """N anchors rank K of M candidates under a model of some order, transition width r."""

    order: int
    n: int
    k: int
    m: int
    r: int = 32
    seed: int = 0

    @property
    def size(self) -> str:
        if self.order == 0:
            return f"N=M={self.m}" if self.n == self.m else f"N={self.n}, M={self.m}"
        if self.n == self.k == self.m:
            return f"N=K=M={self.m}"
        return f"N={self.n}, K={self.k}, M={self.m}"

    @property
    def name(self) -> str:
        return f"order {self.order}, {self.size}"

    @property
    def scores(self) -> int:
        """How many utilities the definition asks for, N x K x M."""
        return self.n * self.k * self.m


@dataclass(frozen=True)
class Inputs:
    """Leaves require a gradient; the target scores, absent at order 0, do not."""

    leaves: dict[str, Tensor]
    targets: Tensor | None


def square_case(order: int, size: int, seed: int = 0) -> Case:
    """N = K = M = size; an order-0 loss has one place, K = 1."""
    return Case(order, size, size if order else 1, size, seed=seed)


def wide_case(order: int, seed: int = 0) -> Case:
    """Few places among many candidates, for a local batch; at order 0 the 4096 x 4096 loss."""
    if order == 0:
        return square_case(0, WIDE_CANDIDATES, seed)
    return Case(order, WIDE_ANCHORS, WIDE_PLACES, WIDE_CANDIDATES, seed=seed)


def cases(orders: Iterable[int], sizes: Iterable[int], wide: bool, seed: int = 0) -> list[Case]:
    sizes = list(sizes)
    chosen = []
    for order in orders:
        chosen += [square_case(order, size, seed) for size in sizes]
        if wide:
            chosen.append(wide_case(order, seed))
    return chosen


def with_at_most(case: Case, scores: int) -> Case:
    """The same case with fewer anchors, so that N x K x M fits; the lists keep their lengths."""
    if case.order == 0:
        return case
    return replace(case, n=max(1, min(case.n, scores // (case.k * case.m))))


def make_inputs(
    case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Inputs:
    """Matched pairs of unit-norm embeddings, their scores, and standard-normal tables.

    Drawn in float32 on the CPU whatever the dtype and device, so all of them see one problem.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def place(x: Tensor) -> Tensor:
        return x.to(device, dtype).contiguous()

    images, texts = _pairs(case.m, LATENT if case.order else FEATURES, generator)
    if case.order == 0:
        leaves = {
            "image_features": place(images),
            "text_features": place(texts),
            "logit_scale": place(torch.tensor(LOGIT_SCALE)),
        }
        return Inputs(_require_gradients(leaves), None)
    leaves = {"scores": place(LOGIT_SCALE * images[: case.n] @ texts.T)}
    if case.order > 1:
        terms = case.order - 1
        predecessors = torch.randn(case.order * terms // 2, case.m, case.r, generator=generator)
        keys = torch.randn(terms, case.m, case.r, generator=generator) * case.r**-0.5
        leaves |= {"predecessors": place(predecessors), "keys": place(keys)}
    targets = place(LOGIT_SCALE * texts[: case.n] @ images.T)
    return Inputs(_require_gradients(leaves), targets)


def _pairs(count: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Image and text embeddings (count, width) that share half of their variance."""
    shared, images, texts = torch.randn(3, count, width, generator=generator)
    return normalize(shared + images, dim=1), normalize(shared + texts, dim=1)


def _require_gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}

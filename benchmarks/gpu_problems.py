"""The GPU command's cases and their inputs, drawn on the device; rankings are given, not timed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.cases import FEATURES, LATENT, LOGIT_SCALE, Case, square_case

PEAKED_SCALE = 100.0  # logit scale of a trained model
PEAKED_NOISE = 0.1  # of the embeddings around what image and text share: rankings agree


@dataclass(frozen=True)
class Problem:
    """Leaves require a gradient. Order 0 has features and a scale, the others a ranking too."""

    case: Case
    leaves: dict[str, Tensor]
    ranking: Tensor | None = None

    @property
    def given_ranking(self) -> Tensor:
        assert self.ranking is not None
        return self.ranking


def make_problem(
    case: Case, device: torch.device, dtype: torch.dtype, *, peaked: bool = False, seed: int = 0
) -> Problem:
    """`dtype` is the tables' (order 0: the features'); scores are float32.

    Ordinary scores have the scale that CLIP training starts with and noisy pairs; peaked ones
    have a trained model's scale, and rankings that nearly agree with the scores.
    """
    from rankloss import rankings

    generator = torch.Generator(device=device).manual_seed(seed)
    noise, scale = (PEAKED_NOISE, PEAKED_SCALE) if peaked else (1.0, LOGIT_SCALE)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    width = LATENT if case.order else FEATURES
    shared = normal(case.m, width)
    images, texts = (normalize(shared + noise * normal(case.m, width), dim=1) for _ in range(2))
    if case.order == 0:
        leaves = {"image_features": images.to(dtype), "text_features": texts.to(dtype)}
        leaves["logit_scale"] = torch.tensor(scale, device=device)
        return Problem(case, _leaves(leaves))
    leaves = {"scores": scale * images[: case.n] @ texts.T}
    if case.order > 1:
        terms = case.order - 1
        leaves["predecessors"] = normal(case.order * terms // 2, case.m, case.r).to(dtype)
        leaves["keys"] = (normal(terms, case.m, case.r) * case.r**-0.5).to(dtype)
    ranking = rankings(scale * texts[: case.n] @ images.T, top_k=case.k)
    return Problem(case, _leaves(leaves), ranking)


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.contiguous().requires_grad_() for name, x in tensors.items()}


def as_float64(problem: Problem) -> Problem:
    leaves = {name: x.detach().double() for name, x in problem.leaves.items()}
    return Problem(problem.case, _leaves(leaves), problem.ranking)


def remaining_scores(case: Case) -> int:
    """Number of utilities of candidates not yet taken: N (K M - K (K-1) / 2)."""
    return case.n * (case.k * case.m - case.k * (case.k - 1) // 2)


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Sizes:
    """Shapes by use, so that a dry run is the same code on small ones."""

    checks: tuple[Case, ...]
    kernels: tuple[Case, ...]  # timed kernel by kernel
    losses: tuple[Case, ...]  # timed against peers
    ceiling: int  # side of the measured matrix product


REAL = Sizes(
    checks=(
        *(Case(order, 256, 256, 256) for order in (3, 1, 2, 4)),
        Case(3, 256, 64, 1024),
        Case(3, 65, 333, 500),
        Case(3, 128, 10, 1000),
        Case(5, 64, 300, 300, r=128),
    ),
    kernels=(square_case(3, 1024), square_case(3, 4096), Case(3, 512, 256, 4096)),
    losses=(
        *(square_case(3, size) for size in (1024, 4096, 512)),
        Case(3, 512, 256, 4096),
        square_case(1, 4096),
        square_case(0, 4096),
        square_case(0, 65536),
    ),
    ceiling=8192,
)
DRY = Sizes(  # the interpreter takes a second for four anchors
    checks=(Case(3, 2, 3, 24), Case(1, 2, 3, 3), Case(4, 2, 8, 8)),
    kernels=(square_case(3, 3),),
    losses=(square_case(3, 2), square_case(1, 3), square_case(0, 16)),
    ceiling=64,
)


# ---------------------------------------------------------------- limits


@dataclass(frozen=True)
class Ceilings:
    """Rates measured on this device."""

    copy: float  # bytes/s, read and written
    matrix: float  # bf16 flop/s
    exponentials: float  # 1/s


def least_seconds(case: Case, ceilings: Ceilings) -> tuple[float, float]:
    """The least time of a forward pass, and of forward and backward, that does all the work.

    Order >= 2: one exponential for each remaining score, each way, or 2 (R-1) r flops forward and
    6 (R-1) r backward, whichever takes longer. Order 1: every input read and every output written
    once. Order 0: one product of features forward, and three backward.
    """
    if case.order == 0:
        product = 2 * case.n * case.m * FEATURES / ceilings.matrix
        return product, 4 * product
    if case.order == 1:
        ranked, scores = case.n * case.k, case.n * case.m
        forward = (8 * ranked + 4 * scores + 4 * ranked) / ceilings.copy
        backward = (8 * ranked + 4 * scores + 4 * ranked + 4 * scores) / ceilings.copy
        return forward, forward + backward
    scores, width = remaining_scores(case), (case.order - 1) * case.r
    exponentials = scores / ceilings.exponentials
    forward = max(exponentials, 2 * width * scores / ceilings.matrix)
    return forward, forward + max(exponentials, 6 * width * scores / ceilings.matrix)

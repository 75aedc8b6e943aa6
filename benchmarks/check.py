"""Is a provider's answer right? Nobody is timed for a wrong one."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import AnyCase, Case, Inputs

CHECK_SCORES = 512**3  # larger cases are checked with fewer anchors
CHUNK_SCORES = 1 << 24  # float64 utilities alive at a time in the truth
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest relative error by dtype. float32 providers are usually within 1e-6; half-precision tables
round their queries and errors to half before a product, as attention does."""


@dataclass(frozen=True)
class Outcome:
    """A loss and its gradient with respect to each leaf."""

    value: float
    gradients: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Errors:
    """Relative error of the value; the worst gradient's RMS error over its RMS size."""

    value: float
    gradient: float

    def acceptable(self, dtype: torch.dtype = torch.float32, *, peer: bool = False) -> bool:
        """A nan is not. Of peers in half precision, whose autograd adds up gradients in half as
        well, only the value is held to it."""
        most = TOLERANCE[dtype]
        forgiven = peer and dtype != torch.float32
        return self.value <= most and (forgiven or self.gradient <= most)


def outcome(value: Tensor, leaves: dict[str, Tensor]) -> Outcome:
    gradients = torch.autograd.grad(value, list(leaves.values()))
    arrays = (gradient.double().cpu().numpy() for gradient in gradients)
    return Outcome(value.item(), dict(zip(leaves, arrays, strict=True)))


def truth(case: AnyCase, device: str = "cpu") -> Outcome:
    """The definition in float64, a few anchors or images at a time."""
    inputs = case.inputs(exact=True, device=device)
    step = max(1, CHUNK_SCORES * case.n // case.scores) if inputs.given is not None else case.n
    parts = [
        outcome(_share(case, inputs, slice(start, start + step)), inputs.leaves)
        for start in range(0, case.n, step)
    ]
    sums = {name: sum(part.gradients[name] for part in parts) for name in inputs.leaves}
    return Outcome(
        sum(part.value for part in parts),
        {name: np.asarray(gradient) for name, gradient in sums.items()},
    )


def _share(case: AnyCase, inputs: Inputs, rows: slice) -> Tensor:
    """These anchors' part of the mean over all anchors."""
    leaves, given = dict(inputs.leaves), inputs.given
    if given is None:
        return peers.clip(**leaves)
    share = len(given[rows]) / case.n
    if isinstance(case, Case):
        scores, ranking = leaves.pop("scores")[rows], inputs.ranking()[rows, : case.k]
        return share * peers.plackett_luce(scores, ranking, **leaves)
    return share * peers.gram(leaves["student"][rows], given[rows])


def errors(found: Outcome, expected: Outcome) -> Errors:
    value = abs(found.value - expected.value) / max(abs(expected.value), 1e-30)
    gradient = [
        _rms(found.gradients[name] - exact) / max(_rms(exact), 1e-30)
        for name, exact in expected.gradients.items()
    ]
    return Errors(value, float(np.max(gradient)))


def _rms(array: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(array))))

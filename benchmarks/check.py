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
TOLERANCE = 1e-4  # relative; float32 providers are usually within 1e-6


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

    @property
    def acceptable(self) -> bool:
        return self.value <= TOLERANCE and self.gradient <= TOLERANCE  # a nan is not


def outcome(value: Tensor, leaves: dict[str, Tensor]) -> Outcome:
    gradients = torch.autograd.grad(value, list(leaves.values()))
    arrays = (gradient.double().numpy() for gradient in gradients)
    return Outcome(value.item(), dict(zip(leaves, arrays, strict=True)))


def truth(case: AnyCase) -> Outcome:
    """The definition in float64, a few anchors or images at a time."""
    inputs = case.inputs(torch.float64)
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
    given, share = given[rows], len(given[rows]) / case.n
    if isinstance(case, Case):
        scores = leaves.pop("scores")[rows]
        return share * peers.plackett_luce(scores, given, case.k, **leaves)
    return share * peers.gram(leaves["student"][rows], given)


def errors(found: Outcome, expected: Outcome) -> Errors:
    value = abs(found.value - expected.value) / max(abs(expected.value), 1e-30)
    gradient = [
        _rms(found.gradients[name] - exact) / max(_rms(exact), 1e-30)
        for name, exact in expected.gradients.items()
    ]
    return Errors(value, float(np.max(gradient)))


def _rms(array: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(array))))

"""Is a provider's answer right? Nobody is timed for a wrong one."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Case, Inputs, make_inputs, with_at_most

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


def check_case(case: Case) -> Case:
    """The case itself, or with fewer anchors where a reference would take too long."""
    return with_at_most(case, CHECK_SCORES)


def outcome(value: Tensor, leaves: dict[str, Tensor]) -> Outcome:
    gradients = torch.autograd.grad(value, list(leaves.values()))
    arrays = (gradient.double().numpy() for gradient in gradients)
    return Outcome(value.item(), dict(zip(leaves, arrays, strict=True)))


def truth(case: Case) -> Outcome:
    """The definition in float64, a few anchors at a time."""
    inputs = make_inputs(case, torch.float64)
    if inputs.targets is None:
        return outcome(peers.clip(**inputs.leaves), inputs.leaves)
    total = torch.zeros((), dtype=torch.float64)
    sums = {name: torch.zeros_like(leaf) for name, leaf in inputs.leaves.items()}
    step = max(1, CHUNK_SCORES // (case.k * case.m))
    for start in range(0, case.n, step):
        part = _loss_of_anchors(inputs, case, slice(start, start + step))
        gradients = torch.autograd.grad(part, list(inputs.leaves.values()))
        for sum_, gradient in zip(sums.values(), gradients, strict=True):
            sum_ += gradient
        total += part.detach()
    return Outcome(total.item(), {name: sum_.numpy() for name, sum_ in sums.items()})


def errors(found: Outcome, expected: Outcome) -> Errors:
    value = abs(found.value - expected.value) / max(abs(expected.value), 1e-30)
    gradient = [
        _rms(found.gradients[name] - exact) / max(_rms(exact), 1e-30)
        for name, exact in expected.gradients.items()
    ]
    return Errors(value, float(np.max(gradient)))


def _loss_of_anchors(inputs: Inputs, case: Case, rows: slice) -> Tensor:
    """These anchors' share of the mean over all anchors."""
    assert inputs.targets is not None
    scores, targets = inputs.leaves["scores"][rows], inputs.targets[rows]
    tables = {name: leaf for name, leaf in inputs.leaves.items() if name != "scores"}
    loss = peers.plackett_luce(scores, targets, case.k, **tables)
    return loss * (scores.shape[0] / case.n)


def _rms(array: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(array))))

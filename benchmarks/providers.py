"""The sides that are measured: this library and its peers, each as a loss of a case's inputs.

A build function returns a callable that computes the scalar loss from the inputs' leaves. It is
called in the provider's own process, so imports that are optional or slow belong inside it.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import AnyCase, Case, GramCase, Inputs

Loss = Callable[[], Tensor]
Build = Callable[[AnyCase, Inputs], Loss]

OURS = "rankloss"
COMPILE_SCORES = 512**3  # torch.compile takes minutes and gains nothing beyond
FLOAT = 4  # bytes


class Unavailable(Exception):
    """The provider cannot run here; the text says why. Reported as skipped, not as failed."""


@dataclass(frozen=True)
class Provider:
    """A name, and how to build the loss.

    `groups`: a pattern of the groups of cases it takes part in. `tensors`: float tensors with one
    element a score alive at its peak, to foresee what cannot fit. `most_scores`: beyond them it is
    not tried. `compiles`: its first call is long.
    """

    name: str
    build: Build
    groups: str = ".*"
    tensors: float = 0.0
    most_scores: int | None = None
    compiles: bool = False

    def takes(self, case: AnyCase) -> bool:
        return re.fullmatch(self.groups, case.group) is not None

    def bytes_needed(self, case: AnyCase) -> int:
        return int(self.tensors * case.scores * FLOAT)


def build_ours(case: AnyCase, inputs: Inputs, impl: str = "auto") -> Loss:
    import rankloss

    leaves, given = inputs.leaves, inputs.given
    if given is None:
        clip_loss = rankloss.ClipLoss()
        return lambda: clip_loss(*leaves.values())
    if isinstance(case, GramCase):
        return partial(rankloss.GramLoss(impl=impl), leaves["student"], given)
    transitions = None
    if case.order > 1:
        transitions = rankloss.Transitions(leaves["predecessors"], leaves["keys"])

    def loss() -> Tensor:
        ranking = rankloss.rankings(given, top_k=case.k)
        return rankloss.plackett_luce_nll(leaves["scores"], ranking, transitions, impl=impl)

    return loss


def build_naive(case: AnyCase, inputs: Inputs) -> Loss:
    leaves, given = inputs.leaves, inputs.given
    if given is None:
        return lambda: peers.clip(**leaves)
    if isinstance(case, GramCase):
        return lambda: peers.gram(leaves["student"], given)
    return lambda: peers.plackett_luce(targets=given, k=case.k, **leaves)


def build_compiled_naive(case: AnyCase, inputs: Inputs) -> Loss:
    """The first call compiles: the worker's scratch folder, where caches go, starts empty."""
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or its helper processes outlive the call
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # says no CUDA is here
    compiled = torch.compile(build_naive(case, inputs), dynamic=False)
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        try:
            value: Tensor = compiled()
        except Exception as error:
            if calls:
                raise
            raise Unavailable(f"torch.compile failed: {first_line(error)}") from error
        calls += 1
        return value

    return loss


def build_list_mle(case: AnyCase, inputs: Inputs) -> Loss:
    scores, targets = inputs.leaves["scores"], inputs.given
    assert isinstance(case, Case)
    assert targets is not None
    return lambda: peers.list_mle(scores, targets, case.k)


def build_open_clip(case: AnyCase, inputs: Inputs) -> Loss:
    try:
        from open_clip.loss import ClipLoss
    except ImportError as error:
        raise Unavailable(f"open_clip cannot be imported: {first_line(error)}") from error
    return partial(ClipLoss(), *inputs.leaves.values())


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


COMPILED = Provider(
    "naive compiled",
    build_compiled_naive,
    tensors=2.5,
    most_scores=COMPILE_SCORES,
    compiles=True,
)
PROVIDERS = (
    Provider(OURS, build_ours),
    Provider("naive", build_naive, tensors=5),
    COMPILED,
    Provider("open_clip", build_open_clip, "order 0"),
    Provider("list_mle", build_list_mle, "order 1"),
)
REFERENCE = partial(build_ours, impl="reference")
BY_REQUEST = (Provider("reference", REFERENCE, "order [1-9]|gram", tensors=9),)

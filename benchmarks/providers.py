"""The sides that are measured: this library and its peers, each as a loss of a case's inputs.

A build function returns a callable that computes the scalar loss from the inputs' leaves. It raises
`Unavailable` with the reason where its provider cannot run, and is called in the provider's own
process, so imports that are optional or slow belong inside it.
"""

import importlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import AnyCase, Case, GramCase, Inputs

Loss = Callable[[], Tensor]
Build = Callable[[AnyCase, Inputs], Loss]

OURS = "rankloss"
COMPILE_SCORES = 512**3  # on a CPU torch.compile takes minutes and gains nothing beyond
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
    nll = partial(rankloss.plackett_luce_nll, leaves["scores"], transitions=transitions, impl=impl)
    if inputs.sorted is not None:
        return partial(nll, inputs.sorted[:, : case.k].contiguous(), validate=False)
    return lambda: nll(rankloss.rankings(given, top_k=case.k))


def build_naive(case: AnyCase, inputs: Inputs) -> Loss:
    leaves, given = inputs.leaves, inputs.given
    if given is None:
        return lambda: peers.clip(**leaves)
    if isinstance(case, GramCase):
        return lambda: peers.gram(leaves["student"], given)
    return lambda: peers.plackett_luce(ranking=inputs.ranking()[:, : case.k], **leaves)


def build_compiled_naive(case: AnyCase, inputs: Inputs) -> Loss:
    """Compile the naive loss on the first call.

    On a CPU that call is timed: the worker's scratch folder, where caches go, starts empty.
    """
    if on_cpu(inputs):
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or its helpers outlive the call
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # says no CUDA is here
    torch._dynamo.reset()  # earlier shapes count towards its limit of recompilations
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
    assert isinstance(case, Case)
    return lambda: peers.list_mle(inputs.leaves["scores"], inputs.ranking(), case.k)


def build_open_clip(case: AnyCase, inputs: Inputs) -> Loss:
    loss = imported("open_clip.loss", "ClipLoss")()
    images, texts, scale = inputs.leaves.values()
    return lambda: loss(images, texts, scale.to(images.dtype))


def build_inf_cl(case: AnyCase, inputs: Inputs) -> Loss:
    function = imported("inf_cl", "cal_inf_loss")
    images, texts, scale = inputs.leaves.values()
    return lambda: function(images, texts, scale=scale.to(images.dtype))


def build_cross_entropy(case: AnyCase, inputs: Inputs, *, module: str) -> Loss:
    """InfoNCE both ways from a fused cross-entropy of (features, classes, labels)."""
    function: Callable[..., Tensor] = imported(module, "linear_cross_entropy")
    images, texts, scale = inputs.leaves.values()
    labels = torch.arange(len(images), device=images.device)
    if module == "torch.nn.functional":
        options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
        function = partial(function, options=options)

    def loss() -> Tensor:
        pairs = ((images, texts), (texts, images))
        one, other = (function(scale.to(a.dtype) * a, b, labels) for a, b in pairs)
        return (one + other) / 2

    return loss


def build_flex(case: AnyCase, inputs: Inputs) -> Loss:
    """Utilities as attention scores: an anchor is a batch entry, a place a query.

    Queries are composed, and candidates' keys and scores gathered in ranked order, before the
    call; the mask leaves candidates at places j >= k. Its log-sum-exp is the likelihood's.
    """
    attention = imported("torch.nn.attention", "flex_attention")
    assert isinstance(case, Case)
    leaves, ranking = inputs.leaves, inputs.ranking()
    torch._dynamo.reset()
    attend: Any = attention.flex_attention
    if not on_cpu(inputs):
        attend = torch.compile(attend, dynamic=False)
    log_sums: dict[str, Any] = {"return_lse": True}
    if hasattr(attention, "AuxRequest"):  # from torch 2.9 on
        log_sums = {"return_aux": attention.AuxRequest(lse=True)}
    mask = attention.create_block_mask(
        lambda b, h, place, j: j >= place, None, None, case.k, case.m, device=ranking.device
    )

    def loss() -> Tensor:
        ranked = leaves["scores"].gather(1, ranking)  # (N, M)
        keys = leaves["keys"].transpose(0, 1).flatten(1)[ranking]  # (N, M, W)
        queries = peers.queries(ranking[:, : case.k], leaves["predecessors"])  # (N, K, W)

        def with_score(score: Tensor, b: Tensor, h: Tensor, place: Tensor, j: Tensor) -> Tensor:
            return score + ranked[b, j]

        _, found = attend(
            queries[:, None],
            keys[:, None],
            keys[:, None, :, :16].detach(),  # values are not needed; the fewest there can be
            score_mod=with_score,
            block_mask=mask,
            scale=1.0,
            **log_sums,
        )
        lse = getattr(found, "lse", found)  # (N, 1, K)
        own = (queries.float() * keys[:, : case.k].float()).sum(2)
        mean: Tensor = (lse[:, 0] - ranked[:, : case.k] - own).mean()
        return mean

    return loss


def imported(module: str, name: str) -> Any:
    try:
        found = importlib.import_module(module)
        return getattr(found, name, None) or importlib.import_module(f"{module}.{name}")
    except Exception as error:  # a broken optional package is a missing one
        raise Unavailable(f"{module}.{name} cannot be imported: {first_line(error)}") from error


def on_cpu(inputs: Inputs) -> bool:
    return next(iter(inputs.leaves.values())).device.type == "cpu"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


NAIVE = Provider("naive", build_naive, tensors=5)
COMPILED = Provider(
    "naive compiled", build_compiled_naive, tensors=2.5, most_scores=COMPILE_SCORES, compiles=True
)
OPEN_CLIP = Provider("open_clip", build_open_clip, "order 0")
LIST_MLE = Provider("list_mle", build_list_mle, "order 1")
PROVIDERS = (Provider(OURS, build_ours), NAIVE, COMPILED, OPEN_CLIP, LIST_MLE)
REFERENCE = partial(build_ours, impl="reference")
BY_REQUEST = (Provider("reference", REFERENCE, "order [1-9]|gram", tensors=9),)

LINEAR = partial(build_cross_entropy, module="torch.nn.functional")
CUT = partial(build_cross_entropy, module="cut_cross_entropy")
GPU_PROVIDERS = (
    Provider(OURS, partial(build_ours, impl="triton")),
    Provider("FlexAttention", build_flex, "order [2-9]"),
    NAIVE,
    replace(COMPILED, most_scores=None),
    LIST_MLE,
    replace(OPEN_CLIP, tensors=5),
    Provider("linear_cross_entropy", LINEAR, "order 0"),
    Provider("cut-cross-entropy", CUT, "order 0"),
    Provider("Inf-CL", build_inf_cl, "order 0"),
)

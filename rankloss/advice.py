"""Warnings about silent mistakes: each is given once, and later steps never wait for a GPU."""

import warnings
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from rankloss.fusion.precision import can_read

CALLER = 7  # frames up from a warning to the line that calls a loss

LOG_SCALES = (2.0, 3.0)
"""Range where the logarithm that CLIP learns starts: ln(1/0.07) = 2.66, SigLIP's ln 10 = 2.30."""


def warn_unless_normalized(images: Tensor, texts: Tensor) -> None:
    """Warn when a norm is off by more than half precision explains."""
    for name, x in (("image_features", images), ("text_features", texts)):
        off = (x.detach().float().norm(dim=1) - 1).abs()
        if len(off) and off.max() > 0.02:
            warnings.warn(
                f"{name} are not unit-norm (a norm is off by {off.max().item():.3g}); pass "
                "torch.nn.functional.normalize(features, dim=1)",
                stacklevel=CALLER,
            )


def warn_if_log_scale(logit_scale: Tensor) -> None:
    """Warn when the scale lies where its logarithm usually does, and no graph shows an exp."""
    low, high = LOG_SCALES
    if low < logit_scale <= high and not any(
        "Exp" in x.name() for x in graph(logit_scale, limit=16)
    ):
        warnings.warn(
            f"logit_scale is {logit_scale.item():.3g}, which looks like the logarithm that CLIP "
            "learns; pass logit_scale.exp() (this warning is given once, ignore it if the scale "
            "is meant)",
            stacklevel=CALLER,
        )


class Adviser:
    """Looks at what a loss is given; reads values in its first call and a few later ones alone."""

    def __init__(self) -> None:
        self.inputs_seen = False
        self.untrained_keys = UntrainedKeys()

    def look(self, images: Tensor, texts: Tensor, scale: Tensor, keys: Sequence[Tensor]) -> None:
        """Warn of mistakes in features and scale; of `keys` of transitions that nobody trains."""
        if not can_read(images, texts, scale):
            return
        if not self.inputs_seen:
            self.inputs_seen = True
            warn_unless_normalized(images, texts)
            warn_if_log_scale(scale)
        if (
            keys
            and torch.is_grad_enabled()
            and self.untrained_keys.look(keys, scale, texts, images)
        ):
            warn_of_untrained_keys()


class UntrainedKeys:
    """Notices keys that take part in training and never change while the rest of the model does.

    Values are compared at the 8th, 16th, 32nd, ... call until the model has changed: the only
    calls that wait for a GPU. Without a change of the model (gradient accumulation, a learning
    rate of 0, skipped steps) nothing follows.
    """

    FIRST_LOOK = 8

    def __init__(self) -> None:
        self.calls, self.settled = 0, False
        self.keys: list[Tensor] = []
        self.learned: Tensor | None = None
        self.before: Tensor | None = None

    def look(self, keys: Sequence[Tensor], scale: Tensor, *features: Tensor) -> bool:
        """Return True, once, when the model has changed and `keys` have not.

        Args:
            keys: parameters, the same in every call.
            scale: the logit scale; watched if it is learned, else a parameter behind `features`.
        """
        if self.settled or not all(x.requires_grad for x in keys):
            return False
        self.calls += 1
        if self.calls == 1:
            self.learned = None if scale.requires_grad else learned_parameter(*features)
            self.before = _sample(scale if self.learned is None else self.learned)
            self.keys = [_sample(x, None) for x in keys]
        if self.calls < self.FIRST_LOOK or self.calls & (self.calls - 1):
            return False
        now = _sample(scale if self.learned is None else self.learned)
        if self.before is None or now.shape != self.before.shape:  # sharded away: cannot tell
            self.settled = True
        elif not torch.equal(now, self.before):
            self.settled = True
            unchanged = any(map(_has_not_moved, keys, self.keys))
            self.keys, self.learned, self.before = [], None, None
            return unchanged
        return False


def warn_of_untrained_keys() -> None:
    warnings.warn(
        "the model learns but the loss's transition keys never change: no optimizer holds them, "
        "and what trains is RankCLIP, the order-1 loss. Make the loss a submodule of the model "
        "before the optimizer is built, or add loss.parameters() to it; "
        "loss.requires_grad_(False) says that they are frozen on purpose",
        stacklevel=CALLER,
    )


def _has_not_moved(key: Tensor, before: Tensor) -> bool:
    """Compare a parameter with its earlier values; one whose gradient is zero has no reason to."""
    nothing_to_learn = key.grad is not None and not bool(_sample(key.grad, None).any())
    now = _sample(key, None)
    return now.numel() > 0 and not nothing_to_learn and torch.equal(now, before)


def learned_parameter(*tensors: Tensor) -> Tensor | None:
    """Return a parameter that `tensors` were computed from, None when none is near."""
    variables = (getattr(node, "variable", None) for node in graph(*tensors, limit=1000))
    return next((x for x in variables if isinstance(x, torch.nn.Parameter)), None)


def graph(*tensors: Tensor, limit: int) -> Iterator[Node]:
    """Walk the nodes that `tensors` were computed by, nearest first, at most `limit`."""
    nodes = deque(x.grad_fn for x in tensors if x.grad_fn is not None)
    seen = set(nodes)
    while nodes and limit > 0:
        node, limit = nodes.popleft(), limit - 1
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def _sample(x: Tensor, count: int | None = 1024) -> Tensor:
    """Copy the first values of `x`, of this process's part where it is sharded; none if freed."""
    x = x.detach()
    x = x.to_local() if hasattr(x, "to_local") else x
    if x.untyped_storage().nbytes() == 0:
        return x.new_empty(0)
    return x.flatten()[:count].clone()

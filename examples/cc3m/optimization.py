"""What the optimizer is told: groups of parameters, the schedule, and bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from examples.cc3m.towers import Towers

MAX_SCALE = math.log(100)


def parameter_groups(towers: Towers, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices only: not scale, biases, norms, nor what a part's `no_weight_decay` names."""
    spared = towers.no_weight_decay()
    named = [(name, p) for name, p in towers.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or name in spared]
    decayed = [p for name, p in named if not (p.ndim < 2 or name in spared)]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(step: int, total: int, peak: float, warmup_steps: int) -> float:
    """At 0-based `step` of `total`: linear warm-up, then a cosine to 0."""
    warmup = min(warmup_steps, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(module: nn.Module, largest: float) -> Tensor:
    """Scale gradients so that their norm is at most `largest`; the norm before, of all shards."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clamp_scale(model: nn.Module) -> None:
    """CLIP's bounds of the scale, 1 to 100."""
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, Tensor):
        scale.clamp_(0, MAX_SCALE)

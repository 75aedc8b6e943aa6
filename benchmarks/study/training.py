"""One training run in memory: the same optimizer, schedule and order of batches for every row."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.study.data import Batch, Data, batches
from benchmarks.study.objectives import objective_of
from benchmarks.study.settings import Scale, Trained
from examples.cc3m.recipe import build_towers, load_recipe
from examples.cc3m.step import clamp_scale, learning_rate, parameter_groups
from rankloss import DinoRankCLIP, TransitionHeads


@dataclass(frozen=True)
class Cost:
    """Price of a run.

    Attributes:
        parameters: trained, with those of losses and of modules that only training has.
        flops: operations of a step, forward and backward, of matrix products and convolutions.
        cpu_seconds: CPU time of a step, the mean over all.
        steps: number of them.
    """

    parameters: int
    flops: int
    cpu_seconds: float
    steps: int


def build(settings: Trained, scale: Scale, seed: int) -> tuple[DinoRankCLIP, nn.Module]:
    """Return towers and objective, drawn by the seed; rows of one seed share the towers' start."""
    torch.manual_seed(seed)
    towers = build_towers(
        load_recipe(settings.recipe, settings.overrides), scale.model, scale.student
    )
    for number, heads in enumerate(transition_heads(towers)):
        heads.reset_parameters(torch.Generator().manual_seed(2 * seed + number))
    return towers, objective_of(settings, towers)


def transition_heads(towers: DinoRankCLIP) -> list[TransitionHeads]:
    """Return the heads of the loss; none below order 2."""
    return [x for x in towers.loss.modules() if isinstance(x, TransitionHeads)]


def train(settings: Trained, scale: Scale, data: Data, seed: int) -> tuple[DinoRankCLIP, Cost]:
    """Train a row's model to the end of its schedule."""
    towers, objective = build(settings, scale, seed)
    source = batches(data, settings.batch, seed)
    first = next(source)
    flops = flops_of(objective, first)
    steps = settings.steps
    if settings.matched:
        _, plain = build(Trained(), scale, seed)
        steps = max(2, round(steps * flops_of(plain, first) / flops))
    groups = parameter_groups(towers, scale.weight_decay)
    inside = {id(p) for p in towers.parameters()}
    others = [p for p in objective.parameters() if id(p) not in inside]
    groups.append({"params": others, "weight_decay": scale.weight_decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    torch.manual_seed(seed)
    objective.train()
    started = time.process_time()
    for step, batch in zip(range(steps), itertools.chain([first], source), strict=False):
        towers.set_progress(step / max(1, steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, scale.learning_rate, scale.warmup)
        optimizer.zero_grad()
        torch.autograd.backward(objective(batch))
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        clamp_scale(towers.model)
    seconds = (time.process_time() - started) / steps
    parameters = sum(p.numel() for p in objective.parameters())
    return towers.eval(), Cost(parameters, flops, seconds, steps)


def flops_of(objective: nn.Module, batch: Batch) -> int:
    """Return the operations of one step, leaving no gradient and no changed buffer behind."""
    buffers: dict[str, Any] = {name: x.clone() for name, x in objective.named_buffers()}
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(objective(batch))
    objective.zero_grad()
    for name, buffer in objective.named_buffers():
        buffer.copy_(buffers[name])
    return int(counter.get_total_flops())

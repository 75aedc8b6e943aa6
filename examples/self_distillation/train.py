"""The training loop: resumable at any step, to the same weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from examples.cc3m.step import learning_rate
from examples.common.checkpoint import Checkpoints, restore_training, training_tensors
from examples.common.files import (
    RUN_FILES,
    claim_directory,
    read_json,
    write_atomically,
    write_json,
)
from examples.common.images import normalise
from examples.common.parallel import seed_generators
from examples.common.signals import Interrupted, StopRequest
from examples.demo.scene_shards import train_scenes
from examples.self_distillation.backbone import Network
from examples.self_distillation.crops import sample_views
from examples.self_distillation.measure import scene_pixels
from examples.self_distillation.objective import SelfDistillation
from examples.self_distillation.settings import Settings
from rankloss.fusion.teacher import IMAGENET_MEAN, IMAGENET_STD


def train(
    settings: Settings,
    out: Path,
    stop: StopRequest,
    *,
    end: int | None = None,
    fresh: bool = False,
) -> Path:
    """Train, or go on training; the file of the teacher's weights.

    Args:
        settings: the recipe.
        out: folder of the run.
        stop: asked after every step.
        end: take so many of the schedule's steps and no more; None takes all.
        fresh: discard a run of other settings.

    Raises:
        UserError: `out` holds a run of other settings.
        Interrupted: a signal asked to stop; what was done is in a checkpoint.
    """
    written = (*RUN_FILES, "teacher.safetensors", "teacher.json")
    claim_directory(out, asdict(settings), fresh=fresh, written=written)
    end = settings.steps if end is None else min(end, settings.steps)
    weights, told = out / "teacher.safetensors", out / "teacher.json"
    if weights.exists() and read_json(told)["steps_taken"] >= end:
        return weights
    seed_generators(settings.seed)
    network = Network(settings.model, settings.options, prototypes=settings.objective.prototypes)
    distillation = SelfDistillation(network, settings.objective, settings.steps)
    optimizer = build_optimizer(distillation.student, settings.weight_decay)
    checkpoints = Checkpoints(out / "checkpoints", keep=1)
    step, history = 0, dict[str, list[float]]()
    if (found := checkpoints.latest()) is not None:
        restore_training(distillation, optimizer, found)
        step, history = found.state["step"], found.state["history"]
    scenes = settings.scenes  # the demo compresses the same pictures
    purpose = f"{scenes.seed}/train/picture"
    images = scene_pixels(list(train_scenes(scenes)), purpose, scenes.image_size).contiguous()
    with tqdm(total=end, initial=step, unit="step", mininterval=2.0) as bar:
        while step < end:
            terms = update(distillation, optimizer, images, settings, step)
            step += 1
            bar.update()
            for name, value in terms.items():
                history.setdefault(name, []).append(round(value, 5))
            bar.set_postfix({k.removesuffix("_loss"): f"{v:.3f}" for k, v in terms.items()})
            asked = stop.signal_number
            if step % settings.checkpoint_steps == 0 or step == end or asked:
                state = {"step": step, "history": history}
                checkpoints.save(step, training_tensors(distillation, optimizer), state)
            if asked and step < end:
                raise Interrupted(f"stopped after step {step} of {end}", asked)
    means = {name: block_means(values) for name, values in history.items()}
    write_json(told, {"settings": asdict(settings), "steps_taken": step, "history": means})
    export(distillation.teacher.backbone.model, weights)
    return weights


def update(
    distillation: SelfDistillation,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    settings: Settings,
    step: int,
) -> dict[str, float]:
    """One optimizer step, whose randomness depends on the seed and the step alone."""
    seed_generators(settings.seed + 1_000_003 * (step + 1))
    batch = images[torch.randint(len(images), (settings.batch_size,))]
    size = images.shape[-1]
    views = sample_views(
        normalise(batch, IMAGENET_MEAN, IMAGENET_STD),
        global_size=size,
        local_size=settings.local_size,
        locals_=settings.locals_,
        with_high=distillation.needs_high(step),
    )
    warmup = max(1, round(settings.warmup * settings.steps))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings.steps, settings.learning_rate, warmup)
    terms = distillation(views, step)
    loss: Any = torch.stack(list(terms.values())).sum()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(distillation.student.parameters(), settings.clip_norm)
    optimizer.step()
    distillation.after_step(step)
    return {name: value.item() for name, value in terms.items()}


def build_optimizer(student: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that spares vectors (norms, biases, layer scales, tokens) from weight decay."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.squeeze().dim() > 1]
    vectors = [p for p in parameters if p.squeeze().dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def block_means(values: list[float]) -> list[float]:
    """Means of successive blocks of 50, the last one perhaps shorter."""
    blocks = [values[i : i + 50] for i in range(0, len(values), 50)]
    return [round(sum(x) / len(x), 4) for x in blocks]


def export(model: nn.Module, path: Path) -> None:
    """Write weights in float16, in timm's names."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(weights, temporary))

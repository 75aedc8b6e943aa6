"""dino.txt at the size of a laptop: a text tower aligned to a frozen DINOv3.

    python -m examples.self_distillation.text                    # a minute or two on one core

The text tower is the teacher of a student's text branch: its space is the vision teacher's own,
CLS and mean patch side by side. Writes <out>/text.safetensors, and retrieval on scenes that were
not trained on as text.json, text.md and text.png, beside a text tower aligned to random weights.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from examples.cc3m.step import clamp_scale
from examples.cc3m.step import learning_rate as rate_at
from examples.common.files import write_atomically
from examples.common.parallel import seed_generators
from examples.demo.captions import caption
from examples.demo.scene_shards import SceneSettings, heldout_scenes, train_scenes
from examples.demo.scenes import Scene
from examples.evaluation.report import Table, write_report
from examples.evaluation.retrieval import retrieval
from examples.self_distillation.measure import build_teacher, scene_images
from examples.self_distillation.settings import TEACHER
from rankloss import ClipLoss
from rankloss.fusion.teacher import Dinov3Teacher

CONTEXT_LENGTH = 32


class DinoText(nn.Module):
    """A frozen DINOv3 and a text tower trained against it (locked-image tuning).

    An image is its CLS token and its mean patch side by side, normalised once together; a text is
    the token at its end, by a causal Transformer and a linear map without bias. So the second
    half of a text embedding can be compared with single patches. Source: DINOv3 (2025), section
    5.3 (dino.txt), without its two trainable blocks on top of the vision tower.

    Args:
        teacher: frozen, and left out of state_dict.
        width, layers, heads: sizes of the text tower.
        context_length: most tokens of a text.
    """

    def __init__(
        self,
        teacher: Dinov3Teacher,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        context_length: int = CONTEXT_LENGTH,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "layers": layers, "heads": heads, "output_dim": 2 * teacher.dim}
        self.teacher, self.text = teacher, TextTransformer(context_length=context_length, **sizes)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """(B, 3, H, W) -> (B, 2 D) without gradient: CLS, then the mean patch."""
        tokens = self.teacher(images)
        features = torch.cat([tokens.cls, tokens.patches.mean(1)], 1)
        return F.normalize(features, dim=1) if normalize else features

    def encode_text(self, texts: Tensor, normalize: bool = True) -> Tensor:
        """(B, L) int64 tokens -> (B, 2 D)."""
        features: Tensor = self.text(texts)
        return F.normalize(features, dim=1) if normalize else features

    def patch_scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines (B, h w) of every patch with the patch half of the matching text."""
        patches = F.normalize(self.teacher(images).patches, dim=2)
        half = F.normalize(self.encode_text(texts)[:, self.teacher.dim :], dim=1)
        return torch.einsum("bpd,bd->bp", patches, half)


def align(
    model: DinoText,
    images: Tensor,
    texts: Tensor,
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
) -> list[float]:
    """Train the text tower on encoded images (N, 2 D) and their texts (N, L); the losses."""
    loss, losses = ClipLoss(), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in (bar := tqdm(range(steps), unit="step", mininterval=2.0)):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, learning_rate, 0)
        chosen = torch.randint(len(images), (batch_size,))
        text = model.encode_text(texts[chosen])
        value: Any = loss(images[chosen], text, model.logit_scale.exp())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        clamp_scale(model)
        losses.append(value.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Align, measure, write; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=TEACHER, help="of the vision teacher")
    parser.add_argument("--out", type=Path, default=Path("runs/self_distillation_text"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--scenes", type=int, default=4096, help="to train on")
    parser.add_argument("--heldout", type=int, default=512)
    options = parser.parse_args(arguments)
    if not options.weights.exists():
        print(f"error: {options.weights} does not exist; train it first", file=sys.stderr)
        return 2
    settings = SceneSettings(train=options.scenes, heldout=options.heldout)
    splits = {"train": list(train_scenes(settings)), "heldout": list(heldout_scenes(settings))}
    columns = {}
    for name, weights in (("self-distilled", options.weights), ("random", None)):
        seed_generators(0)
        model = DinoText(build_teacher(weights))
        encoded = {k: encode(model, scenes, k, settings) for k, scenes in splits.items()}
        losses = align(model, *encoded["train"], steps=options.steps)
        images, texts = encoded["heldout"]
        with torch.no_grad():
            found = torch.cat([model.encode_text(x) for x in torch.split(texts, 128)])
        columns[name] = {**retrieval(images, found), "training loss": losses[-1]}
        if weights is not None:
            own = model.state_dict()  # the teacher leaves itself out
            write_atomically(options.out / "text.safetensors", functools.partial(save_file, own))
    table = Table("teachers", columns, "Text aligned to a frozen teacher, held-out scenes")
    print(table.text())
    described = {"steps": options.steps, "scenes": options.scenes, "heldout": options.heldout}
    write_report(options.out, "text", table, described)
    return 0


@torch.no_grad()
def encode(
    model: DinoText, scenes: list[Scene], split: str, settings: SceneSettings
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, 2 D) of scenes' pictures, and tokens (N, L) of their captions."""
    tokenize: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(
        context_length=CONTEXT_LENGTH
    )
    images = scene_images(scenes, split, settings.image_size)
    omit = settings.omit if split == "train" else 0.0
    words = [caption(x, random.Random(f"{split}/{i}"), omit) for i, x in enumerate(scenes)]
    features = [model.encode_image(x) for x in torch.split(images, 128)]
    return torch.cat(features), tokenize(words)


if __name__ == "__main__":
    sys.exit(main())

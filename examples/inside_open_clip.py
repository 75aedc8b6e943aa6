"""A ranking loss as a part of an open_clip model: trained, saved, and left out when published.

    python -m examples.inside_open_clip

open_clip computes its loss outside the model, where DistributedDataParallel, the optimizer and the
checkpoint do not look. That is fine for CLIP (order 0) and RankCLIP (order 1), which have no
parameters: there, replacing open_clip's `ClipLoss()` by `RankCLIPLoss()` is all. From order 2 on
the loss has trained heads, so it has to live inside the model.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from examples.toy import TINY_CLIP, batches, log, recall
from rankloss import HighOrderPLLoss, attach, export


def build() -> nn.Module:
    """A model so small that this page runs in seconds.

    A real one: open_clip.create_model("ViT-B-16", pretrained=..., output_dict=True). With
    output_dict the outputs are named as the loss's arguments are.
    """
    model: nn.Module = open_clip.CLIP(**TINY_CLIP, output_dict=True)
    return model


class TrainingStep(nn.Module):
    """Model and loss in one forward pass: this is what to wrap in DistributedDataParallel.

    DDP averages the gradients of what its forward pass used. A loss called outside of it would be
    trained by each process on its own, and the copies would drift apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        attach(model, HighOrderPLLoss(embed_dim=64, order=3))  # as model.rank_loss

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        outputs = self.model(images, texts)  # image_features, text_features, logit_scale
        terms: dict[str, Tensor] = self.model.rank_loss(**outputs, output_dict=True)
        return terms


def main(steps: int = 60) -> tuple[float, float]:
    """Train, and return R@1 of the model and of a plain open_clip model with its weights."""
    torch.manual_seed(0)
    training = TrainingStep(build())  # then: DistributedDataParallel(training)
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-3)
    for step, (images, texts) in enumerate(batches(steps)):
        terms = training(images, texts)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        with torch.no_grad():  # open_clip's own bound; losses expect a scale of at most 100
            training.model.logit_scale.clamp_(0, 4.6052)
        log(step, terms)

    # Resume from a checkpoint with everything; publish one that plain open_clip loads strictly.
    with TemporaryDirectory() as folder:
        checkpoint, published = Path(folder) / "epoch_1.pt", Path(folder) / "weights.safetensors"
        torch.save({"epoch": 1, "state_dict": training.model.state_dict()}, checkpoint)
        export(checkpoint, published)
        plain = build()
        open_clip.load_checkpoint(plain, str(published))
    before, after = recall(training.model, encode), recall(plain, encode)
    print(f"R@1 among 216 pictures: {before:.0%}; of the published weights: {after:.0%}")
    return before, after


def encode(model: nn.Module, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    outputs = model(images, texts)
    return outputs["image_features"], outputs["text_features"]


if __name__ == "__main__":
    main()

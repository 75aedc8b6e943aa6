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

from examples.toy import CONTEXT, PIXELS, VOCABULARY, all_pairs, batches, recall_at_1
from rankloss import HighOrderPLLoss, attach, export

# Small, so that this page runs in seconds. Of a real model only the next function is different:
# open_clip.create_model_and_transforms("ViT-B-16", pretrained="laion2b_s34b_b88k").
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": PIXELS, "patch_size": 8, "width": 64, "layers": 1},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 64,
        "heads": 1,
        "layers": 1,
    },
}


def build() -> nn.Module:
    # output_dict=True: the outputs are then named as the loss's arguments are
    model: nn.Module = open_clip.CLIP(**CONFIG, output_dict=True)
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
        if step % 20 == 0 or step == steps - 1:
            told = ", ".join(f"{name} {value.item():.3f}" for name, value in terms.items())
            print(f"step {step}: {told}")

    # Resume from a checkpoint with everything; publish one that plain open_clip loads strictly.
    with TemporaryDirectory() as folder:
        checkpoint, published = Path(folder) / "epoch_1.pt", Path(folder) / "weights.safetensors"
        torch.save({"epoch": 1, "state_dict": training.model.state_dict()}, checkpoint)
        export(checkpoint, published)
        plain = build()
        open_clip.load_checkpoint(plain, str(published))
    before, after = recall(training.model), recall(plain)
    print(f"R@1 among 216 pictures: {before:.0%}; of the published weights: {after:.0%}")
    return before, after


@torch.no_grad()
def recall(model: nn.Module) -> float:
    model.eval()
    outputs = model(*all_pairs())
    return recall_at_1(outputs["image_features"], outputs["text_features"])


if __name__ == "__main__":
    main()

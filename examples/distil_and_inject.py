"""The whole method in one module: a ranking loss, and a student distilled from a vision teacher.

    python -m examples.distil_and_inject

`DinoRankCLIP` puts three things around a CLIP model: the third-order ranking loss; a small student
network that learns the *relations* between a frozen teacher's patch features (Gram matrices,
distances, angles); and an injection of the student's tokens into both towers' embeddings. Teacher
features are needed in training only. Here the teacher is a random convolution, so nothing is
downloaded; `rankloss.fusion.Dinov3Teacher` is the real one, and `examples/cc3m` writes its features
to disk once instead of computing them in every epoch.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from examples.toy import PIXELS, TINY_CLIP, batches, log, recall
from rankloss import DinoRankCLIP

PATCH = 8  # pixels; the teacher gives (32 / 8)^2 = 16 patch tokens
GRID = (PIXELS // PATCH, PIXELS // PATCH)


class TinyTeacher(nn.Module):
    """A frozen random network with a DINO's outputs: patch tokens and one CLS token."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.patches(images).tanh().flatten(2).transpose(1, 2)
        return tokens, tokens.mean(1)  # (B, 16, 24), (B, 24)


def build() -> DinoRankCLIP:
    """A ViT and a text Transformer of open_clip, as small as they come, and a student."""
    return DinoRankCLIP(
        architecture={"open_clip": TINY_CLIP},  # or DinoRankCLIP(model) around one you have
        loss={"HighOrderPLLoss": {"order": 3}},  # any loss of the library, by its class name
        student={
            "image_options": {"embed_dim": 48, "depth": 1, "num_heads": 1, "patch_size": 8},
            "text_options": {"width": 48, "depth": 1, "heads": 1},
        },
    )


def main(steps: int = 60) -> tuple[float, float]:
    """Train, and return R@1 of the trained model and of the one saved and loaded again."""
    torch.manual_seed(0)
    teacher, model = TinyTeacher(), build()
    # one module, so one call: the towers, the student, the injection and the loss's heads
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (images, texts) in enumerate(batches(steps)):
        patches, cls = teacher(images)
        terms = model(images, texts, patches, cls, teacher_grid=GRID)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        log(step, terms)

    # At inference there is no teacher, and each tower works alone.
    with TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))  # model.safetensors and config.json
        again = DinoRankCLIP.from_pretrained(folder)
    before, after = recall(model, encode), recall(again, encode)
    print(f"R@1 among 216 pictures: {before:.0%}; saved and loaded again: {after:.0%}")
    return before, after


def encode(model: DinoRankCLIP, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    return model.encode_image(images), model.encode_text(texts)


if __name__ == "__main__":
    main()

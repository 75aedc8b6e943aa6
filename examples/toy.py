"""Toy data for the one-page examples: pictures of attributes with captions that name them.

Nothing is downloaded, and a small model learns it in seconds. Replace it by your own loader: all
that a page needs is a batch of images and a batch of token ids.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

Model = TypeVar("Model", bound=nn.Module)
ATTRIBUTES, VALUES = 3, 6  # 6 x 6 x 6 = 216 kinds of pictures
PIXELS, CONTEXT, VOCABULARY = 32, 6, 64
START, END = 62, 63  # of a caption; END is the largest id, as in CLIP's vocabulary

TINY_CLIP: dict[str, Any] = {
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
"""An open_clip model for these pictures, in the format of open_clip's model_configs."""


def all_pairs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """One picture of every kind: images (216, 3, 32, 32) float32, captions (216, 6) int64."""
    kinds = torch.tensor(list(itertools.product(range(VALUES), repeat=ATTRIBUTES)))
    return _pictures(kinds, seed), _captions(kinds)


def batches(count: int, size: int = 64, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` random batches of images (size, 3, 32, 32) and captions (size, 6)."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        kinds = torch.randint(VALUES, (size, ATTRIBUTES), generator=generator)
        yield _pictures(kinds, seed + 1000 * (step + 1)), _captions(kinds)


def recall_at_1(images: Tensor, texts: Tensor) -> float:
    """Share of images whose own caption is the nearest of all, from (N, D) features."""
    nearest = (images @ texts.T).argmax(dim=1)
    return float((nearest == torch.arange(len(images))).float().mean())


@torch.no_grad()
def recall(model: Model, encode: Callable[[Model, Tensor, Tensor], tuple[Tensor, Tensor]]) -> float:
    """Image-to-text R@1 among all pairs, encoded in evaluation mode."""
    return recall_at_1(*encode(model.eval(), *all_pairs()))


def log(step: int, terms: Mapping[str, Tensor]) -> None:
    """Print the terms of a loss, every twentieth step."""
    if step % 20 == 0:
        told = ", ".join(f"{name} {value.item():.3f}" for name, value in terms.items())
        print(f"step {step}: {told}")


def _pictures(kinds: Tensor, seed: int) -> Tensor:
    """A fixed pattern for each value of each attribute, summed, and noise of the given seed."""
    patterns = torch.randn(ATTRIBUTES, VALUES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    chosen = torch.stack([patterns[i][kinds[:, i]] for i in range(ATTRIBUTES)]).sum(0)
    noise = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(seed))
    return interpolate(chosen + 0.5 * noise, size=PIXELS)


def _captions(kinds: Tensor) -> Tensor:
    """Start, a word for each attribute, end, padding."""
    words = 1 + kinds + VALUES * torch.arange(ATTRIBUTES)
    ends = torch.tensor([START, END]).expand(len(kinds), 2)
    padding = torch.zeros(len(kinds), CONTEXT - ATTRIBUTES - 2, dtype=torch.int64)
    return torch.cat([ends[:, :1], words, ends[:, 1:], padding], dim=1)

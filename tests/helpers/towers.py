"""A CLIP in miniature with its loss inside, and batches to share among processes."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss import HighOrderPLLoss, TransitionHeads

Batch = dict[str, Tensor]
Settings = dict[str, Any]
Gradients = dict[str, Tensor]

PAIRS = 12  # divisible by every world size
EMBED = 7
EXACT: list[Settings] = [
    {"local_loss": True, "gather_with_grad": True},
    {"local_loss": False, "gather_with_grad": True},
]
CUT: list[Settings] = [
    {"local_loss": True, "gather_with_grad": False},
    {"local_loss": False, "gather_with_grad": False},
]


class Towers(nn.Module):
    """A CLIP in miniature, in float64, with its loss inside; keys of the heads are not zero."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.image, self.text = nn.Linear(5, EMBED), nn.Linear(6, EMBED)
            self.loss = HighOrderPLLoss(EMBED, transition_dim=4, **settings)
            for heads in self.loss.transition_heads:
                assert isinstance(heads, TransitionHeads)
                nn.init.normal_(heads.key_weight)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.double()

    def forward(self, images: Tensor, texts: Tensor, **ids: Tensor) -> Tensor:
        loss: Tensor = self.loss(**self.features(images, texts), **ids)
        return loss

    def features(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.image(images), dim=1),
            "text_features": F.normalize(self.text(texts), dim=1),
            "logit_scale": self.log_scale.exp(),
        }

    def gradients(self) -> Gradients:
        return {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}


class FeatureTowers(Towers):
    """Returns its features; the loss inside is called by the training loop, as open_clip does."""

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return self.features(images, texts)


def make_batch(pairs: int = PAIRS, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randn(pairs, 5, generator=generator, dtype=torch.float64),
        "texts": torch.randn(pairs, 6, generator=generator, dtype=torch.float64),
    }


def with_duplicates(batch: Batch) -> Batch:
    """Some images and some captions occur several times, on different processes.

    Their inputs differ as views of one image do. Bit-equal inputs would tie up to the rounding of
    the towers, which depends on the number of rows, and with it the order of the tied candidates.
    """
    image_ids = torch.tensor([0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 3, 0])
    text_ids = torch.tensor([0, 1, 2, 3, 1, 5, 6, 7, 2, 9, 10, 0])
    pairs = len(batch["images"])
    return {**batch, "image_ids": image_ids[:pairs], "text_ids": text_ids[:pairs]}


def local(batch: Batch, sizes: list[int] | None = None) -> Batch:
    """This process's rows, of equal number unless `sizes` says otherwise."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = sizes or [len(batch["images"]) // world] * world
    return {name: torch.split(x, sizes)[rank] for name, x in batch.items()}


def in_one_process(settings: Settings, batch: Batch) -> tuple[Tensor, Gradients]:
    """Loss and gradients of the global batch; none of the gradients is trivial."""
    model = Towers(settings)
    value = model(**batch)
    value.backward()
    gradients = model.gradients()
    assert len(gradients) == len(list(model.parameters()))
    assert all(x.abs().max() > 1e-4 for x in gradients.values())
    return value.detach(), gradients


def assert_same(actual: Gradients, expected: Gradients, atol: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        error = (x - expected[name]).abs().max()
        assert error <= atol, f"{name} is off by {error:.3g}"


def towers_and_rest(gradients: Gradients) -> tuple[Gradients, Gradients]:
    towers = {n: x for n, x in gradients.items() if n.startswith(("image", "text"))}
    return towers, {n: x for n, x in gradients.items() if n not in towers}

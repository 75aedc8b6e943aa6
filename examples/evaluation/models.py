"""Models to evaluate, by open_clip's names, and what they make of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from examples.common.files import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Model:
    """A two-tower model ready to encode.

    Attributes:
        label: what reports call it.
        network: has encode_image and encode_text with `normalize`, and logit_scale.
        transform: PIL RGB -> (3, H, W).
        tokenize: texts -> (B, L) int64.
        device: where it computes.
    """

    label: str
    network: Any
    transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device

    @property
    def logit_scale(self) -> float:
        """The scale itself, not its logarithm."""
        return float(self.network.logit_scale.detach().exp())

    @torch.no_grad()
    def images(self, images: list[Tensor]) -> Tensor:
        """(B, D) float32 unit-norm, on the CPU."""
        features = self.network.encode_image(torch.stack(images).to(self.device), normalize=True)
        return nn.functional.normalize(features.float().cpu(), dim=1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """(B, D) float32 unit-norm, on the CPU."""
        tokens = self.tokenize(texts).to(self.device)
        features = self.network.encode_text(tokens, normalize=True)
        return nn.functional.normalize(features.float().cpu(), dim=1)


class Pairs(NamedTuple):
    """Encoded images (N, D), their texts (M, D), and the image of each text (M,)."""

    images: Tensor
    texts: Tensor
    image_of_text: Tensor

    def first_texts(self) -> Tensor:
        """(N, D): the first text of each image."""
        first = torch.full((len(self.images),), len(self.texts))
        places = torch.arange(len(self.texts))
        return self.texts[first.scatter_reduce(0, self.image_of_text, places, "amin")]


def load_model(spec: str, device: torch.device) -> Model:
    """A model of "[label=]name[@weights]", as open_clip.create_model takes name and weights.

    "local-dir:<folder>" is a folder that `examples/cc3m/train.py` exported.

    Raises:
        UserError: open_clip cannot make it.
    """
    label, _, rest = spec.rpartition("=")
    name, _, weights = rest.partition("@")
    try:
        network, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=weights or None, device=device
        )
        tokenize = open_clip.get_tokenizer(name)
    except (RuntimeError, FileNotFoundError, ValueError, KeyError) as error:
        raise UserError(f"open_clip cannot make the model {rest!r}: {error}") from error
    return Model(label or rest, network.eval(), transform, tokenize, device)


def encode_pairs(
    model: Model, samples: Iterable[tuple[Image.Image, list[str]]], batch_size: int
) -> Pairs:
    """Encode images with their captions, in the order given.

    Raises:
        UserError: there are no samples.
    """
    images, texts, owners, seen = [], [], [], 0
    for batch in batches(tqdm(samples, desc=model.label, unit="image"), batch_size):
        images.append(model.images([model.transform(image) for image, _ in batch]))
        captions = [(seen + i, text) for i, (_, many) in enumerate(batch) for text in many]
        seen += len(batch)
        for part in batches(captions, batch_size):
            texts.append(model.texts([text for _, text in part]))
            owners += [owner for owner, _ in part]
    if not images:
        raise UserError("no image with captions could be read")
    return Pairs(torch.cat(images), torch.cat(texts), torch.tensor(owners))


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one perhaps shorter."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

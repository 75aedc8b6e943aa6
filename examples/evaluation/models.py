"""Models to evaluate, by open_clip's names, and what they make of data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from examples.common.files import UserError
from examples.evaluation.reading import Reading, Shared


@dataclass(frozen=True)
class Model:
    """A two-tower model ready to encode.

    Attributes:
        label: what reports call it; progress bars are shown if there is one.
        network: has encode_image and encode_text with `normalize`, and logit_scale.
        transform: PIL RGB -> (3, H, W).
        tokenize: texts -> (B, L) int64.
        device: where it computes.
        dtype: autocast's; None computes in that of the weights.
    """

    label: str
    network: Any
    transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device
    dtype: torch.dtype | None = None

    @property
    def logit_scale(self) -> float:
        """The scale itself, not its logarithm."""
        return float(self.network.logit_scale.detach().exp())

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the network computes."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) as (B, D) float32 unit-norm, on the CPU."""
        with self.autocast():
            features = self.network.encode_image(images.to(self.device), normalize=True)
        return nn.functional.normalize(features.float().cpu(), dim=1)

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> Tensor:
        """Encode (B, L) int64 as (B, D) float32 unit-norm, on the CPU."""
        with self.autocast():
            features = self.network.encode_text(tokens.to(self.device), normalize=True)
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


def encode_pairs(model: Model, data: Shared, reading: Reading) -> Pairs:
    """Encode images with their captions, each process its share; all return all of them.

    Args:
        model: what encodes.
        data: gives (3, H, W) images with their tokens (k, L), as `Captioned` does.
        reading: how.

    Raises:
        Stopped: some process was to stop.
        UserError: there are no samples.
    """
    encoded = []
    for images, texts in tqdm(reading.batches(data, _joined), model.label, disable=not model.label):
        owners = torch.arange(len(images)).repeat_interleave(torch.tensor([len(x) for x in texts]))
        encoded.append(Pairs(model.images(images), model.texts(torch.cat(texts)), owners))
    everyones = [Pairs(*each) for share in reading.parallel.gather(encoded) for each in share]
    if not everyones:
        raise UserError("no image with captions could be read")
    first = torch.tensor([0, *(len(each.images) for each in everyones)]).cumsum(0)
    return Pairs(
        torch.cat([each.images for each in everyones]),
        torch.cat([each.texts for each in everyones]),
        torch.cat([each.image_of_text + n for each, n in zip(everyones, first, strict=False)]),
    )


def _joined(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    return torch.stack([image for image, _ in samples]), [tokens for _, tokens in samples]

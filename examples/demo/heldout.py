"""The demo's evaluation splits in memory, and their features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.cc3m.evaluation import class_embeddings, encode
from examples.cc3m.loader import ShardLoader
from examples.cc3m.towers import Towers
from examples.demo.captions import class_words, prompts
from examples.demo.scenes import ALL_PAIRS, ATTRIBUTES, Scene


@dataclass(frozen=True)
class HeldOut:
    """An evaluation split in memory."""

    images: Tensor
    """(N, 3, H, W)"""
    texts: Tensor
    """(N, L)"""
    scenes: list[Scene]


def read_heldout(loader: ShardLoader) -> HeldOut:
    """A whole split, in the files' order; the loader keeps records and does not shuffle."""
    batches = list(loader.epoch())
    return HeldOut(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.texts for batch in batches]),
        [Scene.from_json(record["scene"]) for batch in batches for record in batch.records],
    )


def encode_heldout(
    towers: Towers, heldout: HeldOut, probe: HeldOut, tokenize: Callable[[list[str]], Tensor]
) -> dict[str, Tensor]:
    """What `results.measure` needs: features of both splits and zero-shot classifiers."""
    images, texts = encode(towers, heldout.images, heldout.texts)
    probe_images, _ = encode(towers, probe.images, probe.texts)
    features = {"heldout_images": images, "heldout_texts": texts, "probe_images": probe_images}
    names = {
        attribute: [class_words(attribute, value) for value in values]
        for attribute, values in ATTRIBUTES.items()
    }
    names["pair"] = [f"{colour} {shape}" for colour, shape in ALL_PAIRS]
    for attribute, words in names.items():
        classes = [prompts(each) for each in words]
        features[f"classes_{attribute}"] = class_embeddings(towers, tokenize, classes)
    return features

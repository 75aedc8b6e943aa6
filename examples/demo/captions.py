"""Words for scenes: captions with varied templates, and prompts for zero-shot classification."""

from __future__ import annotations

import random
from collections.abc import Sequence

from examples.demo.scenes import INVERSE, Scene, Thing

WORDS = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""Ways to say an attribute; the others have their own name only."""
BESIDE = {
    "left of": "to its left",
    "right of": "to its right",
    "above": "above it",
    "below": "below it",
}
OPENINGS = ("{}", "a picture of {}", "there is {}", "an image with {}")
PROMPTS = ("a picture of {}", "there is {}", "an image with {}")
"""Prompts whose embeddings are averaged to make a zero-shot classifier."""


def caption(scene: Scene, rng: random.Random, omit: float = 0.0) -> str:
    """A sentence about a scene.

    Args:
        scene: what to describe.
        rng: chooses template, synonyms and order.
        omit: probability of leaving out each attribute of each thing, as people do.
    """
    names = [noun_phrase(thing, rng, omit) for thing in scene.things]
    return rng.choice(OPENINGS).format(_chain(names, scene.relations, rng))


def noun_phrase(thing: Thing, rng: random.Random, omit: float = 0.0) -> str:
    """For example "a tiny red striped circle"."""
    size, colour = rng.choice(WORDS[thing.size]), thing.colour
    # "plain" usually goes without saying.
    texture = thing.texture if thing.texture != "plain" or rng.random() < 0.25 else ""
    middle = [colour, texture] if rng.random() < 0.5 else [texture, colour]
    said = [word for word in [size, *middle] if word and rng.random() >= omit]
    shape = thing.shape if rng.random() >= omit / 3 else "shape"
    return with_article(" ".join([*said, shape]))


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def prompts(words: str) -> list[str]:
    """Zero-shot prompts for a class name, for example "red circle"."""
    return [template.format(with_article(words)) for template in PROMPTS]


def class_words(attribute: str, value: str) -> str:
    """A class name that can follow an article: "circle", "red shape", "striped shape"."""
    return value if attribute == "shape" else f"{value} shape"


def _chain(names: Sequence[str], relations: Sequence[str], rng: random.Random) -> str:
    """Join "A", "A left of B", or "A left of B, which is above C"."""
    if len(names) == 1:
        return names[0]
    first = f"{names[0]} {rng.choice(WORDS[relations[0]])} {names[1]}"
    if len(names) == 2:
        style = rng.randrange(3)
        if style == 0:
            return first
        if style == 1:
            return f"{names[1]} with {names[0]} {BESIDE[relations[0]]}"
        return f"{names[1]} {rng.choice(WORDS[INVERSE[relations[0]]])} {names[0]}"
    return f"{first}, which is {rng.choice(WORDS[relations[1]])} {names[2]}"

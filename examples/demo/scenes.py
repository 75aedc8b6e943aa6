"""Captioned scenes: a few objects with attributes and spatial relations, described in words.

A scene is structured data first; `captions.py` says it in words and `drawing.py` in pixels.
Captions of two scenes are similar *by degree* (`overlap`), so that ranking them means something.
Some colour-shape pairs never occur in training (`UNSEEN_PAIRS`).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}

RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
"""Relation of a thing to the next -> (columns, rows) from its cell to the next one's."""
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

UNSEEN_PAIRS = frozenset(
    (COLOURS[(i + shift) % len(COLOURS)], shape) for i, shape in enumerate(SHAPES) for shift in (3,)
)
"""6 of the 36 (colour, shape) pairs, one of every colour and one of every shape."""
ALL_PAIRS = tuple(itertools.product(COLOURS, SHAPES))
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in UNSEEN_PAIRS)
MAX_THINGS = 3


@dataclass(frozen=True)
class Thing:
    """One object of a scene, in one cell of a 2 x 2 grid."""

    shape: str
    colour: str
    size: str
    texture: str
    cell: tuple[int, int]
    """(column, row), each 0 or 1."""


@dataclass(frozen=True)
class Scene:
    """One to three things; `relations[i]` says how thing i lies to thing i + 1."""

    things: tuple[Thing, ...]
    relations: tuple[str, ...]

    def attributes(self) -> tuple[tuple[str, ...], ...]:
        """Facts that a full caption tells: attributes of every thing, then the relations."""
        told = tuple((t.shape, t.colour, t.size, t.texture) for t in self.things)
        return (*told, self.relations)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scene:
        things = tuple(Thing(**{**t, "cell": tuple(t["cell"])}) for t in data["things"])
        return cls(things, tuple(data["relations"]))


def sample_scene(rng: random.Random, things: int, *, unseen: bool) -> Scene:
    """Draw a scene of 1 to 3 things.

    Args:
        rng: source of every choice.
        things: how many.
        unseen: False takes every colour-shape pair from `SEEN_PAIRS`; True takes one thing's from
            `UNSEEN_PAIRS` and the others' from all pairs.
    """
    cells, relations = _place(rng, things)
    pairs = [rng.choice(ALL_PAIRS if unseen else SEEN_PAIRS) for _ in range(things)]
    if unseen:
        pairs[rng.randrange(things)] = rng.choice(sorted(UNSEEN_PAIRS))
    members = tuple(
        Thing(shape, colour, rng.choice(SIZES), rng.choice(TEXTURES), cell)
        for (colour, shape), cell in zip(pairs, cells, strict=True)
    )
    return Scene(members, relations)


def edit_scene(scene: Scene, rng: random.Random, facts: int) -> Scene:
    """A copy of `scene` in which `facts` attributes of its things have another value.

    Nothing is done about colour-shape pairs: an edit may make or break an unseen one.
    """
    things = list(scene.things)
    places = [(i, name) for i in range(len(things)) for name in ATTRIBUTES]
    for i, name in rng.sample(places, facts):
        others = [value for value in ATTRIBUTES[name] if value != getattr(things[i], name)]
        change: dict[str, Any] = {name: rng.choice(others)}
        things[i] = replace(things[i], **change)
    return Scene(tuple(things), scene.relations)


def _place(rng: random.Random, things: int) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    """Walk from cell to neighbouring cell without returning."""
    if not 1 <= things <= MAX_THINGS:
        raise ValueError(f"a scene holds 1 to {MAX_THINGS} things, got {things}")
    cells, relations = [(rng.randrange(2), rng.randrange(2))], []
    while len(cells) < things:
        relation = rng.choice(list(RELATIONS))
        column, row = (a + b for a, b in zip(cells[-1], RELATIONS[relation], strict=True))
        if column in (0, 1) and row in (0, 1) and (column, row) not in cells:
            cells.append((column, row))
            relations.append(relation)
    return cells, tuple(relations)


def overlap(rows: list[Scene], columns: list[Scene]) -> NDArray[np.float32]:
    """Share of one scene's facts that the other has, (len(rows), len(columns)), in [0, 1].

    Things are matched one to one so that most facts agree: four attributes a thing, and each
    relation between matched things. The count is divided by the facts of the richer scene.
    """
    a, b = _Encoded.of(rows), _Encoded.of(columns)
    facts = np.zeros((len(rows), len(columns)), np.float32)
    pairs = list(itertools.combinations(range(MAX_THINGS), 2))
    for order in itertools.permutations(range(MAX_THINGS)):
        shared = np.zeros_like(facts)
        for i, j in enumerate(order):
            x, y = a.things[:, None, i], b.things[None, :, j]
            shared += ((x == y) & (x >= 0)).sum(-1)
        for i, j in pairs:
            x, y = a.relations[:, None, i, j], b.relations[None, :, order[i], order[j]]
            shared += (x == y) & (x >= 0)
        facts = np.maximum(facts, shared)
    most: NDArray[np.float32] = np.maximum(a.facts[:, None], b.facts[None, :])
    return (facts / most).astype(np.float32)


@dataclass(frozen=True)
class _Encoded:
    """Scenes as integers, -1 where there is nothing."""

    things: NDArray[np.int8]
    """(N, 3, 4)"""
    relations: NDArray[np.int8]
    """(N, 3, 3), thing i's to thing j"""
    facts: NDArray[np.float32]
    """(N,)"""

    @classmethod
    def of(cls, scenes: list[Scene]) -> _Encoded:
        things = np.full((len(scenes), MAX_THINGS, len(ATTRIBUTES)), -1, np.int8)
        relations = np.full((len(scenes), MAX_THINGS, MAX_THINGS), -1, np.int8)
        names = list(RELATIONS)
        for row, scene in enumerate(scenes):
            for i, thing in enumerate(scene.things):
                things[row, i] = [
                    values.index(getattr(thing, name)) for name, values in ATTRIBUTES.items()
                ]
            for i, relation in enumerate(scene.relations):
                relations[row, i, i + 1] = names.index(relation)
                relations[row, i + 1, i] = names.index(INVERSE[relation])
        facts = [len(ATTRIBUTES) * len(s.things) + len(s.relations) for s in scenes]
        return cls(things, relations, np.asarray(facts, np.float32))

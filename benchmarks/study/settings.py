"""All that determines a row's result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from examples.cc3m.recipe import SMALL_CLIP, SMALL_STUDENT, Recipe, load_recipe
from examples.common.tiny import TINY_CLIP, TINY_STUDENT
from examples.demo.scene_shards import SceneSettings

Objective = Literal["recipe", "two-captions", "alip", "two-views", "ito"]
Teacher = Literal["self-distilled", "random", "none"]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Rankings drawn from a process of known order.

    Args:
        candidates, places: candidates, and how many of them each list ranks.
        dim, width: width of the candidates' embeddings, and of a transition term.
        order: the planted one.
        strength: root mean square of the scores and of each transition term.
        lists: rankings to fit to, a fifth of which chooses when to stop.
        held_out: rankings to measure on.
        steps: at most so many of the optimizer.
    """

    candidates: int = 12
    places: int = 6
    dim: int = 64
    width: int = 8
    order: int
    strength: float = 1.0
    lists: int
    held_out: int = 2048
    steps: int = 150


@dataclass(frozen=True)
class Trained:
    """A model trained on scenes or photographs.

    Args:
        recipe, overrides: as `examples.cc3m.recipe.load_recipe` takes them.
        objective: the recipe's own, or one that needs a second caption or view.
        teacher: the student's, where the recipe has one.
        batch, steps: pairs in a step, and number of steps.
        matched: scale the steps so that the run costs as many operations as CLIP's of `steps`.
        noise: share of the pairs whose captions are shuffled among them.
        omit: probability of leaving each attribute out of a training caption.
        ids: tell the loss which captions of a batch are equal.
        photos: train on the photographs instead of the scenes.
    """

    recipe: str = "clip"
    overrides: tuple[str, ...] = ()
    objective: Objective = "recipe"
    teacher: Teacher = "none"
    batch: int = 64
    steps: int = 240
    matched: bool = False
    noise: float = 0.0
    omit: float = 0.4
    ids: bool = False
    photos: bool = False

    def described(self) -> dict[str, Any]:
        """Return the settings with the recipe's content in the place of its name."""
        recipe = load_recipe(self.recipe, self.overrides)
        start = asdict(Recipe("", {"ClipLoss": {}}))
        content = {k: v for k, v in asdict(recipe).items() if k == "loss" or v != start[k]}
        content.pop("label")
        return {**asdict(self), "recipe": content, "overrides": list(self.overrides)}


@dataclass(frozen=True, eq=False)
class Scale:
    """Sizes that all rows of a study share.

    Args:
        name: told in the report.
        scenes: data; `omit` is the row's.
        model, student: architectures, as `examples.cc3m.recipe` has them.
        learning_rate, warmup, weight_decay: AdamW's, with a cosine after the warm-up.
        photo_margin: pixels by which a photograph is larger than its random crop.
        most_steps, most_batch, most_lists: limits of every row, for tests.
        probe_train, probe_test: scenes of each family that a probe learns from and is tested on.
        probe_iterations: iterations of a probe's L-BFGS, at most.
    """

    name: str = "cpu"
    scenes: SceneSettings = field(default_factory=SceneSettings)
    model: dict[str, Any] = field(default_factory=lambda: SMALL_CLIP)
    student: dict[str, Any] = field(default_factory=lambda: SMALL_STUDENT)
    learning_rate: float = 5e-4
    warmup: int = 40
    weight_decay: float = 0.1
    photo_margin: int = 8
    most_steps: int | None = None
    most_batch: int | None = None
    most_lists: int | None = None
    probe_train: int = 600
    probe_test: int = 300
    probe_iterations: int = 300

    def limited(self, settings: Planted | Trained) -> Planted | Trained:
        """Return settings within the limits."""
        steps = min(settings.steps, self.most_steps or settings.steps)
        if isinstance(settings, Planted):
            lists, held_out = (
                min(x, self.most_lists or x) for x in (settings.lists, settings.held_out)
            )
            return replace(settings, steps=steps, lists=lists, held_out=held_out)
        return replace(
            settings, steps=steps, batch=min(settings.batch, self.most_batch or settings.batch)
        )


CPU = Scale()
TOY = Scale(
    "toy",
    SceneSettings(image_size=32, train=48, heldout=32, probe=16, per_shard=24),
    TINY_CLIP,
    TINY_STUDENT,
    warmup=1,
    probe_train=30,
    probe_test=12,
    probe_iterations=5,
    most_steps=2,
    most_batch=16,
    most_lists=20,
)
"""Seconds for everything: shows that it runs, learns nothing."""
SCALES = {scale.name: scale for scale in (CPU, TOY)}

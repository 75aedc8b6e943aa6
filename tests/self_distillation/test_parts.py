"""Crops, masks and heads of self-distillation, and the committed teacher."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from examples.self_distillation.backbone import Backbone, Head
from examples.self_distillation.crops import crop, recolour, sample_regions, sample_views
from examples.self_distillation.measure import (
    FAMILIES,
    build_teacher,
    encode,
    family_scenes,
    scene_images,
)
from examples.self_distillation.settings import MODEL, OPTIONS, TEACHER

TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2}


def ramps() -> Tensor:
    """Images whose first two channels are their own coordinates in [-1, 1]."""
    places = torch.linspace(-1 + 1 / 32, 1 - 1 / 32, 32)
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).repeat(4, 1, 1, 1)


def test_a_crop_shows_its_region() -> None:
    regions = torch.tensor(
        [[0.0, 0, 1, 1], [0.5, -0.5, 0.5, 0.5], [0, 0, 0.5, 1], [-0.25, 0, 0.5, 0.5]]
    )
    for image, (x, y, width, height) in zip(
        crop(ramps(), regions, 8), regions.tolist(), strict=True
    ):
        centres = torch.linspace(-1 + 1 / 8, 1 - 1 / 8, 8)
        torch.testing.assert_close(image[0, 3], x + width * centres, atol=1e-5, rtol=0)
        torch.testing.assert_close(image[1, :, 3], y + height * centres, atol=1e-5, rtol=0)


def test_regions_lie_inside_the_image() -> None:
    torch.manual_seed(0)
    centre, half = torch.split(sample_regions(500, (0.1, 0.6)), 2, 1)
    assert (centre.abs() + half <= 1 + 1e-6).all()
    area = half.prod(1)
    assert 0.09 < area.min() < 0.15
    assert 0.5 < area.max() < 0.61
    assert (half[:, 0] / half[:, 1]).max() < 4 / 3 + 1e-4
    assert centre.std() > 0.2  # not always the same place


def test_views_are_the_same_region_at_two_resolutions() -> None:
    torch.manual_seed(0)
    views = sample_views(ramps(), global_size=16, local_size=8, locals_=3, with_high=True)
    assert views.high is not None
    assert views.globals.shape == (2, 4, 3, 16, 16)
    assert views.locals.shape == (3, 4, 3, 8, 8)
    smaller = F.avg_pool2d(views.high.flatten(0, 1), 2).view_as(views.globals)
    torch.testing.assert_close(smaller, views.globals, atol=1e-4, rtol=0)
    assert not torch.allclose(views.globals[0], views.globals[1])
    assert sample_views(ramps(), global_size=16, local_size=8, locals_=1).high is None


def test_recolouring_keeps_what_stands_out() -> None:
    images = torch.randn(2, 3, 4, 4)
    changed = recolour(images, torch.tensor([0.3, 0.0]), torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(changed[1], images[1])
    torch.testing.assert_close(changed[0].mean(), images[0].mean() + 0.3)
    expected = 0.5 * (images[0] - images[0].mean())
    torch.testing.assert_close(changed[0] - changed[0].mean(), expected)


# ---------------------------------------------------------------- network


def test_masked_patches_are_hidden() -> None:
    """Pixels of a masked patch change nothing, those of a visible one do. Copies too."""
    torch.manual_seed(0)
    backbone = Backbone(MODEL, TINY).eval()
    images, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[:, 0, 1] = True
    for network in (backbone, copy.deepcopy(backbone)):
        expected = network(images, mask)
        other = images.clone()
        other[:, :, :16, 16:] = 5.0
        assert all(map(torch.equal, network(other, mask), expected))
        assert not torch.equal(network(other).cls, network(images).cls)
        assert expected.patches.shape == (2, 4, 16)


def test_gradients_reach_the_mask_token_of_the_network_itself() -> None:
    backbone = Backbone(MODEL, TINY)
    twin = copy.deepcopy(backbone)
    twin(torch.randn(1, 3, 32, 32), torch.ones(1, 2, 2, dtype=torch.bool)).patches.sum().backward()
    assert twin.mask_token.grad is not None
    assert backbone.mask_token.grad is None


def test_heads_give_cosines() -> None:
    logits = Head(8, 6)(torch.randn(5, 8))
    assert logits.shape == (5, 6)
    assert logits.abs().max() <= 1 + 1e-6


# ---------------------------------------------------------------- measure


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_tested_on_new_combinations(family: str) -> None:
    parts = [family_scenes(family, 200, unseen=unseen) for unseen in (False, True)]
    pairs = [
        {frozenset((t.colour, t.shape) for t in scene.things) for scene in scenes}
        for scenes, _ in parts
    ]
    seen = frozenset().union(*pairs[0])
    assert all(not pair <= seen for pair in pairs[1])
    labels = [set(labels) for _, labels in parts]
    assert labels[0] == labels[1]
    assert len(labels[0]) >= 2


# ---------------------------------------------------------------- the committed teacher


def test_the_committed_teacher_is_its_recipes() -> None:
    """Small enough, of the settings beside it, and seen by timm as weights of that network."""
    told = json.loads(TEACHER.with_suffix(".json").read_text())
    assert (told["settings"]["model"], told["settings"]["options"]) == (MODEL, OPTIONS)
    assert told["steps_taken"] == told["settings"]["steps"]
    assert TEACHER.stat().st_size <= 2**20
    weights = load_file(TEACHER)
    loaded = build_teacher(TEACHER).model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name].half(), weights[name]) for name in weights)


@pytest.mark.parametrize(("family", "margin"), [("colour", 0.2), ("relation", 0.05)])
def test_the_committed_teacher_knows_more_than_random_weights(family: str, margin: float) -> None:
    """By a linear classifier on pairs of colour and shape that it has not seen together."""
    accuracy = []
    for weights in (TEACHER, None):
        torch.manual_seed(0)
        teacher = build_teacher(weights)
        parts = []
        for count, unseen in ((400, False), (200, True)):
            scenes, labels = family_scenes(family, count, unseen=unseen)
            features = encode(teacher, scene_images(scenes, f"{family}/{unseen}"))
            parts.append((features.numpy(), np.array(labels)))
        model = LogisticRegression(C=100.0, max_iter=1000).fit(*parts[0])
        accuracy.append(model.score(*parts[1]))
    assert accuracy[0] > accuracy[1] + margin

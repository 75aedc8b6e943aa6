"""Evaluation against values computed by hand or by brute force."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.demo.measures import (
    Metric,
    Outcomes,
    difference,
    match_ranks,
    mean_and_error,
    mean_and_spread,
    measure,
    metrics,
    spearman,
    zero_shot_hits,
)
from examples.demo.report import TrainedRow, report_text, results_json
from examples.demo.scenes import ALL_PAIRS, ATTRIBUTES, Scene, overlap, sample_scene
from examples.evaluation.gap import modality_gap
from examples.evaluation.retrieval import recall_at


def test_ranks_of_matches() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.1], [0.3, 0.2, 0.1]])
    assert match_ranks(similarity).tolist() == [1, 2, 3]
    assert recall_at(match_ranks(similarity), 1).tolist() == [True, False, False]
    assert recall_at(match_ranks(similarity), 2).tolist() == [True, True, False]


def test_a_collapsed_model_ranks_last() -> None:
    assert match_ranks(torch.ones(4, 4)).tolist() == [4, 4, 4, 4]


def test_gap_is_the_distance_of_centroids() -> None:
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    texts = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert modality_gap(images, texts) == pytest.approx(math.sqrt(2))
    assert modality_gap(images, images) == 0
    mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert modality_gap(images, mixed) == pytest.approx(math.sqrt(0.5))


def test_rank_correlation_of_hand_made_rows() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    relevance = torch.tensor([[10.0, 20.0, 30.0, 99.0]]).expand(3, 4)
    assert spearman(scores, relevance).tolist() == pytest.approx([1, -1, 0])
    # ties share places: (1, 2.5, 2.5, 4) against (1, 2, 3, 4) is 4.5 / sqrt(4.5 * 5)
    tied = spearman(torch.tensor([[0.0, 5.0, 5.0, 9.0]]), relevance[:1])
    assert tied.item() == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_rank_correlation_equals_a_direct_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (6, 9), generator=generator).float()
    relevance = torch.randint(0, 3, (6, 9), generator=generator).float()

    def places(row: Tensor) -> list[float]:
        return [float((row < x).sum()) + float((row == x).sum() + 1) / 2 for x in row]

    for value, a, b in zip(spearman(scores, relevance), scores, relevance, strict=True):
        expected = np.corrcoef(places(a), places(b))[0, 1]
        assert value.item() == pytest.approx(expected)


def test_zero_shot_takes_the_nearest_class() -> None:
    classes = torch.eye(3)
    images = torch.tensor([[0.9, 0.1, 0], [0, 0.2, 0.9], [0, 1, 0]])
    assert zero_shot_hits(images, classes, torch.tensor([0, 1, 1])).tolist() == [True, False, True]


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_error(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])


def test_one_seed_compares_examples_and_several_compare_seeds() -> None:
    ours, base = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    value, error = difference([ours], [base])
    assert (value, error) == pytest.approx((0.5, math.sqrt(1 / 3) / 2))
    value, error = difference([ours, base], [base, base])
    assert (value, error) == pytest.approx((0.25, math.sqrt(0.125) / math.sqrt(2)))
    mean, spread = mean_and_spread([ours, base])
    assert mean == 0.5
    assert spread == pytest.approx(math.sqrt(0.125))
    assert mean_and_spread([ours]) == (0.75, None)


def held_out(seed: int) -> tuple[list[Scene], list[Scene]]:
    rng = random.Random(seed)
    scenes = [sample_scene(rng, rng.randint(2, 3), unseen=True) for _ in range(20)]
    return scenes, [sample_scene(rng, 1, unseen=i % 2 == 0) for i in range(30)]


def oracle_features(heldout: list[Scene], probe: list[Scene]) -> dict[str, Tensor]:
    """Features of a model that recognises everything: one-hot facts."""
    things = [scene.things[0] for scene in probe]

    def one_hot(name: str, values: tuple[str, ...]) -> Tensor:
        return torch.eye(len(values))[[values.index(getattr(t, name)) for t in things]]

    widths = {name: len(values) for name, values in ATTRIBUTES.items()}
    blocks = {name: one_hot(name, values) for name, values in ATTRIBUTES.items()}
    features = {"probe_images": torch.cat(list(blocks.values()), dim=1) / 2}
    start = 0
    for name, width in widths.items():
        features[f"classes_{name}"] = torch.zeros(width, sum(widths.values()))
        features[f"classes_{name}"][:, start : start + width] = torch.eye(width)
        start += width
    colour, shape = features["classes_colour"], features["classes_shape"]
    rows = [
        colour[ATTRIBUTES["colour"].index(c)] + shape[ATTRIBUTES["shape"].index(s)]
        for c, s in ALL_PAIRS
    ]
    features["classes_pair"] = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    features["heldout_images"] = features["heldout_texts"] = torch.eye(len(heldout))
    return features


def test_a_model_that_knows_everything_scores_everything() -> None:
    heldout, probe = held_out(0)
    outcomes = measure(oracle_features(heldout, probe), heldout, probe)
    assert set(outcomes) == {metric.key for metric in metrics(20)}
    for key, values in outcomes.items():
        if key not in ("gap", "correlation"):
            assert values.mean() == 1, key
    assert outcomes["gap"].item() == 0
    assert outcomes["correlation"].mean() > 0
    assert (len(outcomes["zs_seen"]), len(outcomes["zs_unseen"])) == (15, 15)


def test_relevance_itself_has_a_perfect_correlation() -> None:
    heldout, probe = held_out(1)
    features = oracle_features(heldout, probe)
    relevance = torch.from_numpy(overlap(heldout, heldout))
    features |= {"heldout_images": relevance.double(), "heldout_texts": torch.eye(20).double()}
    assert measure(features, heldout, probe)["correlation"].tolist() == pytest.approx([1.0] * 20)


def row(label: str, seeds: list[Tensor]) -> TrainedRow:
    outcomes: list[Outcomes] = [{"x": value, "y": value} for value in seeds]
    history = [{"loss": [2.0, 1.0]} for _ in seeds]
    return TrainedRow(label, outcomes, [0.1, 0.2, 0.9], history, 1_230_000, 4_560_000_000)


def ones_but(zeros: int) -> Tensor:
    return torch.ones(100).index_fill(0, torch.arange(zeros), 0)


METRICS = [Metric("x", "recall (%)", 0.1, compared=True), Metric("y", "other")]


def test_the_report_tells_differences_and_no_verdict() -> None:
    text = report_text(METRICS, [row("CLIP", [torch.zeros(100)]), row("ours", [ones_but(3)])], [])
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["recall (%)", "10.0", "0.0", "97.0"] in table
    assert ["CPU seconds per step", "", "0.200", "0.200"] in table
    assert "- ours minus CLIP: +97.0 ± 3.4 recall." in text
    assert "One seed proves nothing" in text
    for verdict in ("helped", "hurt", "better", "worse", "improve"):
        assert verdict not in text.lower()


def test_several_seeds_are_compared_with_each_other() -> None:
    base = row("CLIP", [torch.zeros(100), ones_but(90)])
    rows = [base, row("ours", [ones_but(50), ones_but(60)])]
    text = report_text(METRICS, rows, ["a note"])
    assert "over 2 seeds" in text
    assert "One seed" not in text
    assert "45.0 ± 7.1" in text
    assert "ours minus CLIP: +40.0 ± 20.0 recall." in text
    assert text.endswith("- a note\n")
    data = results_json(METRICS, rows, {"a": 1})
    assert data["models"]["ours"]["metrics"]["x"] == pytest.approx([0.5, 0.4])
    assert data["models"]["ours"]["parameters"] == 1_230_000
    assert data["chance"] == {"x": 0.1, "y": None}

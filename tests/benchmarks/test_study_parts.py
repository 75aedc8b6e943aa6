"""Parts of the study: data, objectives, cost, photographs, and looks into a trained model."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.study.data import Batch, SceneData, batches, numbered, second_view
from benchmarks.study.learnt import likelihood, offset_share
from benchmarks.study.photos import PhotoFiles, load_photos, read_captions, read_grades
from benchmarks.study.planted import planted_model, transition_terms
from benchmarks.study.rows import Row, all_rows, chosen, in_order, of_order, weighted
from benchmarks.study.settings import TOY, Planted, Trained
from benchmarks.study.training import build, flops_of, train, transition_heads
from examples.cc3m.recipe import load_recipe
from examples.common.files import UserError
from rankloss import TransitionHeads, plackett_luce_nll, rankings

CAPTIONS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("star", "ring")]


@pytest.fixture
def data() -> SceneData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    texts = torch.randint(1, 49406, (2, 12, 32), generator=generator)
    texts[:, :, 6] = 49407
    texts[:, :, 7:] = 0
    return SceneData(pixels, texts[0], texts[1], numbered(CAPTIONS * 3))


def batch_of(data: SceneData, size: int = 6) -> Batch:
    return next(batches(data, size, seed=3))


# ---------------------------------------------------------------- data


def test_batches_are_the_seed_s_and_every_pair_comes_once_an_epoch(data: SceneData) -> None:
    def ids(seed: int) -> list[int]:
        plain = replace(data, text_ids=torch.arange(12))
        return torch.cat(
            [b.text_ids for b in itertools.islice(batches(plain, 4, seed), 6)]
        ).tolist()

    first = ids(0)
    assert first == ids(0) != ids(1)
    assert sorted(first[:12]) == sorted(first[12:]) == list(range(12))


def test_equal_captions_share_an_id(data: SceneData) -> None:
    assert data.text_ids.tolist() == [0, 1, 2, 3] * 3


def test_noise_shuffles_captions_of_its_share_alone(data: SceneData) -> None:
    noisy = data.shuffled(0.5, seed=1)
    moved = (noisy.texts != data.texts).any(1)
    assert 0 < moved.sum() <= 6
    assert Counter(map(tuple, noisy.texts.tolist())) == Counter(map(tuple, data.texts.tolist()))
    assert torch.equal(noisy.pixels, data.pixels)


def test_a_second_view_is_the_image_a_little_shifted_and_lit() -> None:
    pixels = torch.full((8, 3, 16, 16), 100, dtype=torch.uint8)
    view = second_view(pixels, torch.Generator().manual_seed(0))
    assert view.shape == pixels.shape
    assert view.dtype == torch.uint8
    assert 80 <= view.min() < view.max() <= 120


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("objective", ["recipe", "two-captions", "alip", "two-views", "ito"])
def test_every_objective_reaches_both_towers(objective: str, data: SceneData) -> None:
    settings = replace(Trained(), objective=objective)  # type: ignore[arg-type]
    towers, loss = build(settings, TOY, seed=0)
    torch.autograd.backward(loss(batch_of(data)))
    for name in ("visual.conv1.weight", "token_embedding.weight", "logit_scale"):
        gradient = towers.model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_rows_of_a_seed_share_towers_and_heads_follow_the_seed() -> None:
    starts = {row: [build(row, TOY, seed)[0] for seed in (0, 1)] for row in map(of_order, (0, 3))}
    plain, ranked = starts.values()
    for a, b in zip(plain, ranked, strict=True):
        for name, value in a.model.state_dict().items():
            assert torch.equal(value, b.model.state_dict()[name]), name
    first, second = (transition_heads(x)[0].predecessor_weight for x in ranked)
    assert not torch.equal(first, second)
    assert not torch.equal(
        plain[0].model.get_parameter("visual.conv1.weight"),
        plain[1].model.get_parameter("visual.conv1.weight"),
    )


def test_matched_rows_cost_what_clip_does(data: SceneData) -> None:
    settings = Trained(objective="two-views", matched=True, steps=12, batch=4)
    _, cost = train(settings, TOY, data, seed=0)
    _, plain = train(replace(settings, objective="recipe", matched=False), TOY, data, seed=0)
    assert cost.flops > 1.2 * plain.flops
    assert cost.steps < plain.steps
    assert cost.steps * cost.flops == pytest.approx(plain.steps * plain.flops, rel=0.1)


def test_counting_operations_changes_nothing(data: SceneData) -> None:
    towers, objective = build(Trained(objective="alip"), TOY, seed=0)
    before = {name: x.clone() for name, x in objective.state_dict().items()}
    flops_of(objective, batch_of(data))
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None or not p.grad.any() for p in towers.parameters())


def test_orders_and_weights_are_those_named() -> None:
    for order in range(6):
        settings = of_order(order)
        ((name, loss),) = load_recipe(settings.recipe, settings.overrides).loss.items()
        assert (name == "ClipLoss") if order == 0 else (loss["order"] == order)
    heavy = weighted(3, 4)
    loss = load_recipe(heavy.recipe, heavy.overrides).loss["HighOrderPLLoss"]
    assert loss["cross_modal_weight"] == loss["in_modal_weight"] == 0.25


def test_runs_come_stage_by_stage_and_seed_by_seed() -> None:
    rows = [
        Row("a", Planted(order=1, lists=9), "x"),
        Row("b", Planted(order=2, lists=9), "x"),
        Row("c", Trained(), "y"),
    ]
    order = [(row.name, seed) for row, seed in in_order(rows, [0, 1])]
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("c", 0), ("c", 1)]


def test_rows_have_names_of_their_own_and_questions_ask_of_rows_that_exist() -> None:
    from benchmarks.study.questions import METRICS, QUESTIONS

    names = [row.name for row in all_rows()]
    assert len(set(names)) == len(names)
    for question in QUESTIONS:
        assert set(question.rows()) <= set(names), question.key
        assert set(question.metrics) <= set(METRICS), question.key
    default = {row.name for row in chosen(all_rows(), [], everything=False)}
    assert {"order-0", "order-1", "order-3", "injection", "planted-3-4096"} <= default


# ---------------------------------------------------------------- transitions


def trained_heads(dim: int, order: int) -> TransitionHeads:
    heads = TransitionHeads(dim, order, 4, generator=torch.Generator().manual_seed(5))
    torch.nn.init.normal_(heads.key_weight)
    return heads


def test_gain_by_place_adds_up_and_is_the_definition_s() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = F.normalize(torch.randn(2, 8, 16, generator=generator), dim=2)
    heads = trained_heads(16, 3)
    numbers, curve = likelihood(images, texts, 5.0, [heads], batch=8)
    scores = 5 * images @ texts.T
    pairs = ((scores, scores.T, texts), (scores.T.contiguous(), scores, images))
    losses = torch.zeros(2)
    with torch.no_grad():
        for own, target, candidates in pairs:
            for row, tables in enumerate((heads(candidates), None)):
                losses[row] += plackett_luce_nll(own, rankings(target), tables) / 2
    with_transitions, alone = losses.tolist()
    assert numbers["ranking_nll"] == pytest.approx(with_transitions, rel=1e-5)
    assert numbers["ranking_gain"] == pytest.approx(alone - with_transitions, abs=1e-5)
    ends = [0.0, *curve["places"]]
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    summed = sum(n * x for n, x in zip(lengths, curve["gain"], strict=True))
    assert summed / 8 == pytest.approx(numbers["ranking_gain"], rel=1e-4)
    assert curve["gain"][0] == pytest.approx(0, abs=1e-6)  # nothing was taken before the first


def test_the_mean_predecessor_gains_all_that_offsets_do() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = F.normalize(torch.randn(2, 8, 16, generator=generator), dim=2)
    heads = trained_heads(16, 2)
    numbers, _ = likelihood(images, texts, 5.0, [heads], batch=8)
    assert abs(numbers["offset_gain"] - numbers["ranking_gain"]) > 1e-3
    with torch.no_grad():  # candidates that differ in columns which the predecessors' map ignores
        heads.predecessor_weight[:, 1:] = 0
        images[:, 0] = texts[:, 0] = 0.5
    numbers, _ = likelihood(images, texts, 5.0, [heads], batch=8)
    assert abs(numbers["ranking_gain"]) > 1e-3
    assert numbers["offset_gain"] == pytest.approx(numbers["ranking_gain"], rel=1e-4)


@torch.no_grad()
def test_terms_are_those_of_the_likelihood() -> None:
    tables = trained_heads(8, 3)(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)))
    beta, gamma = transition_terms(tables)
    for a, b, d in itertools.permutations(range(5), 3):  # b, then a, then d
        rest = [x for x in range(5) if x not in (a, b)]
        utility = beta[a] + gamma[a, b]
        expected = float(utility[rest].logsumexp(0) - utility[d])
        ranking = torch.tensor([[b, a, d]])
        first_two = 2 * plackett_luce_nll(torch.zeros(1, 5), ranking[:, :2], tables)
        all_three = 3 * plackett_luce_nll(torch.zeros(1, 5), ranking, tables)
        assert float(all_three - first_two) == pytest.approx(expected, abs=1e-5)


def test_offset_share_tells_offsets_from_transitions() -> None:
    offsets = [[1.0, 2.0, 6.0], [4.0, 5.0, 9.0]]  # the second row is the first, 3 higher
    swapped = [[1.0, -1.0], [-1.0, 1.0]]
    assert offset_share(offsets) == pytest.approx(1)
    assert offset_share(swapped) == pytest.approx(0)
    assert offset_share([[2.0, -2.0], [0.0, 0.0]]) == pytest.approx(0.5)


def test_planted_terms_have_the_strength_asked_for() -> None:
    generator = torch.Generator().manual_seed(2)
    candidates = F.normalize(torch.randn(12, 64, generator=generator), dim=1)
    model = planted_model(Planted(order=3, lists=64, strength=1.5), candidates, generator)
    scores, tables = model(candidates)
    assert tables is not None
    for term in (scores, *transition_terms(tables)):
        assert float(term.square().mean().sqrt()) == pytest.approx(1.5, rel=1e-4)


# ---------------------------------------------------------------- photographs


@pytest.fixture
def files(tmp_path: Path) -> PhotoFiles:
    rng = random.Random(0)
    names = [f"{i}.jpg" for i in range(6)]
    lines = ["image,caption"]
    for name in names:
        colour = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (50, 40), colour).save(tmp_path / name)
        lines += [f'{name},"a thing, number {name}, line {i}"' for i in range(2)]
    (tmp_path / "captions.txt").write_text("\n".join(lines) + "\n")
    grades = "0.jpg\t1.jpg#1\t1\t2\t4\n1.jpg\t0.jpg#0\t3\t3\t4\n1.jpg\t1.jpg#0\t4\t4\t4\n"
    (tmp_path / "grades.txt").write_text(grades)
    return PhotoFiles(tmp_path, tmp_path / "captions.txt", tmp_path / "grades.txt")


def test_graded_photographs_are_held_out_and_own_captions_left_out(files: PhotoFiles) -> None:
    data = load_photos(files, TOY)
    assert (len(data), len(data.held), len(data.held_texts)) == (4, 2, 4)
    assert data.image_of_text.tolist() == [0, 0, 1, 1]
    rows, texts, values = data.graded
    assert rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert values.tolist() == [1, 2, 4, 3, 3, 4]
    assert torch.equal(texts[0], data.held_texts[3])  # 1.jpg#1
    batch = data.batch(torch.tensor([0, 3]), torch.Generator().manual_seed(0))
    assert batch.images.shape == (2, 3, 32, 32)
    assert any(torch.equal(batch.texts[1], known) for known in data.texts[3])


@pytest.mark.parametrize("line", ["0.jpg\t9.jpg#0\t1", "0.jpg\t1.jpg#7\t1", "0.jpg 1.jpg#0 1"])
def test_a_grade_of_nothing_is_refused(files: PhotoFiles, line: str) -> None:
    files.grades.write_text(f"{line}\n")
    with pytest.raises(UserError, match="line 1"):
        read_grades(files.grades, read_captions(files.captions))

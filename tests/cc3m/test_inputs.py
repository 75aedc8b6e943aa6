"""Data of a run: what is found by itself, what reading costs, and options on their way."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.cc3m.data import inputs, loader
from examples.cc3m.data.inputs import (
    find_evaluation,
    open_loader,
    told_roofline,
    told_shared_memory,
)
from examples.cc3m.evaluation import Evaluator
from examples.cc3m.recipe import build_tokenizer, build_transform, load_recipe
from examples.cc3m.settings import EvaluationSettings, RunSettings
from examples.common.parallel import Parallel
from examples.common.tiny import TINY_CLIP
from tests.helpers.shards import write_classes, write_pairs


def evaluator(settings: EvaluationSettings) -> Evaluator:
    return Evaluator(
        settings, build_transform(TINY_CLIP), build_tokenizer(TINY_CLIP), Parallel(), workers=0
    )


def test_what_lies_beside_the_data_is_measured_and_what_is_missing_is_named(tmp_path: Path) -> None:
    settings = RunSettings(data=write_pairs(tmp_path / "cc3m", [2]))
    shards = [str(tmp_path / "cc3m" / "00000.tar")]
    missing = evaluator(find_evaluation(settings, shards)).missing()
    assert [each.partition(":")[0] for each in missing] == [
        "retrieval, modality gap, alignment, uniformity",
        "zero-shot classification",
    ]
    assert "--evaluation.pairs" in missing[0]
    assert "--evaluation.images" in missing[1]
    write_pairs(tmp_path / "cc3m-val", [2, 2])
    write_classes(tmp_path / "imagenet" / "val")
    found = evaluator(find_evaluation(settings, shards))
    assert found.missing() == []
    assert found.pairs is not None
    assert found.pairs.shards == [str(tmp_path / "cc3m-val" / f"0000{i}.tar") for i in (0, 1)]
    named = RunSettings(evaluation=EvaluationSettings(pairs="x", images="y"))
    assert find_evaluation(named, shards) == named.evaluation


def opened(folder: Path, **options: Any) -> loader.ShardLoader:
    settings = RunSettings(data=write_pairs(folder, [8, 8]), shuffle=0, **options)
    return open_loader(settings, load_recipe("clip"), TINY_CLIP, None, 4, Parallel())


def test_options_of_reading_reach_the_data_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def noting(*_: Any, **options: Any) -> list[Any]:
        asked.update(options)
        return []

    monkeypatch.setattr(loader, "DataLoader", noting)
    data = opened(tmp_path / "data", workers=2, prefetch=3, read_timeout=5.0)
    with pytest.raises(ValueError, match="no batch of 4"):
        next(data.epoch())
    assert (asked["num_workers"], asked["prefetch_factor"], asked["timeout"]) == (2, 3, 5.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_readers_say_what_decoding_costs_them(tmp_path: Path, workers: int) -> None:
    data = opened(tmp_path / "data", workers=workers)
    spent = os.times()
    batches = sum(1 for _ in data.epoch())
    assert (batches, data.images) == (4, 16)
    now = os.times()
    most = now.user - spent.user + now.system - spent.system + 0.02
    most += now.children_user - spent.children_user + now.children_system - spent.children_system
    assert 0 < data.cpu_seconds <= most


def test_the_speed_is_compared_with_what_the_cores_can_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four cores for two processes of six readers each: two cores each."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    data: Any = SimpleNamespace(workers=6, images=1000, cpu_seconds=2.0)
    assert told_roofline(data, Parallel(0, 2), 0.25, 812.4) == (
        "waited for data 25% of the time at 812 images/s; the readers decode at most 2000 images/s:"
        " 4 cores x 500"
    )


def test_too_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inputs, "SHARED_MEMORY", tmp_path)
    for needed, enough in ((1 << 20, True), (1 << 60, False)):
        data: Any = SimpleNamespace(workers=6, prefetch=2, shared_memory=lambda n=needed: n)
        told = told_shared_memory(data, 2)
        assert ("that is too little" in told) != enough
        assert ("up to 2 MiB for 2 x 6 readers" in told) == enough

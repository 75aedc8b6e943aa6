"""Measures taken after every epoch, against the definitions spelled out."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from examples.cc3m.monitor import RunLog, line, save_curves
from examples.cc3m.recipe import (
    build_tokenizer,
    build_towers,
    build_transform,
    load_recipe,
)
from examples.common.files import UserError
from examples.common.tiny import TINY_CLIP
from examples.evaluation.data import Classification
from examples.evaluation.models import Model
from examples.evaluation.reading import Reading, Stopped
from examples.evaluation.zero_shot import zero_shot
from rankloss import DinoRankCLIP


def pairs(n: int, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(n, d, generator=g)
    t = v + torch.randn(n, d, generator=g)
    return normalize(v, dim=1), normalize(t, dim=1)


# ---------------------------------------------------------------- zero-shot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("red_thing", (255, 0, 0)), ("blue_thing", (0, 0, 255))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), colour).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "red_thing" / "broken.png").write_bytes(b"not a picture")
    return tmp_path / "images"


class Painter(DinoRankCLIP):
    """Knows one axis a class, by an image's colour and by a prompt's words."""

    def __init__(self, tokenize: object) -> None:
        model = build_towers(load_recipe("clip"), TINY_CLIP).model
        super().__init__(model, loss={"ClipLoss": {}}, variant="none")
        reader = tokenize
        assert callable(reader)
        self.red = int(reader(["red"])[0, 1])

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        is_red = images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2))
        return torch.stack([is_red, ~is_red], 1).float()

    def encode_text(
        self, texts: Tensor, normalize: bool = True, *, text_mask: Tensor | None = None
    ) -> Tensor:
        is_red = (texts == self.red).any(1)
        return torch.stack([is_red, ~is_red], 1).float()


def model(towers: DinoRankCLIP, tokenize: Callable[[list[str]], Tensor]) -> Model:
    return Model("", towers, build_transform(TINY_CLIP), tokenize, torch.device("cpu"))


def test_zero_shot_on_a_folder_with_open_clips_templates(folder: Path) -> None:
    transform, tokenize = build_transform(TINY_CLIP), build_tokenizer(TINY_CLIP)
    data = Classification(str(folder), None, transform)
    assert data.names == ["blue thing", "red thing"]
    asked: list[str] = []

    def listening(texts: list[str]) -> Tensor:
        asked.extend(texts)
        return tokenize(texts)

    towers = Painter(tokenize)
    measured = zero_shot(model(towers, listening), data, Reading(4))
    assert measured == {
        "zeroshot-top1": 1.0,
        "zeroshot-top5": 1.0,
        "zeroshot-mean-class-recall": 1.0,
    }
    assert len(asked) == 2 * len(open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert "a bad photo of a red thing." in asked
    assert (
        sum(len(labels) for _, labels in Reading(4).batches(data)) == 6
    )  # the broken one is left out


def test_wrong_names_lower_the_accuracy(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red thing\nblue thing\n")
    transform, tokenize = build_transform(TINY_CLIP), build_tokenizer(TINY_CLIP)
    data = Classification(str(folder), names, transform)
    measured = zero_shot(model(Painter(tokenize), tokenize), data, Reading(4))
    assert measured == {
        "zeroshot-top1": 0.0,
        "zeroshot-top5": 1.0,
        "zeroshot-mean-class-recall": 0.0,
    }


def test_zero_shot_on_shards(folder: Path, tmp_path: Path) -> None:
    import webdataset as wds

    with (tmp_path / "0.tar").open("wb") as file, wds.TarWriter(file, encoder=False) as tar:
        for i, image in enumerate(sorted(folder.glob("*/?.png"))):
            label = str(int("red" in str(image))).encode()
            tar.write({"__key__": f"{i}", "png": image.read_bytes(), "cls": label})
    names = tmp_path / "names.txt"
    names.write_text("blue thing\nred thing")
    transform, tokenize = build_transform(TINY_CLIP), build_tokenizer(TINY_CLIP)
    data = Classification(str(tmp_path / "0.tar"), names, transform)
    measured = zero_shot(model(Painter(tokenize), tokenize), data, Reading(4))
    assert measured == {
        "zeroshot-top1": 1.0,
        "zeroshot-top5": 1.0,
        "zeroshot-mean-class-recall": 1.0,
    }


def test_an_evaluation_that_is_asked_to_stop_says_so(folder: Path) -> None:
    transform, tokenize = build_transform(TINY_CLIP), build_tokenizer(TINY_CLIP)
    data = Classification(str(folder), None, transform)
    towers = Painter(tokenize)
    with pytest.raises(Stopped):
        zero_shot(model(towers, tokenize), data, Reading(4, stopping=lambda: True))


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    transform = build_transform(TINY_CLIP)
    with pytest.raises(UserError, match="give a folder of folders of images, or shards"):
        Classification(str(tmp_path / "none.tar"), None, transform)
    names = tmp_path / "names.txt"
    names.write_text("only one")
    with pytest.raises(UserError, match="has 1 names for 2 folders"):
        Classification(str(folder), names, transform)
    with pytest.raises(UserError, match="does not exist"):
        Classification(str(folder), tmp_path / "nothing", transform)


# ---------------------------------------------------------------- what is told


VALUES = {
    "loss": 3.25,
    "images_per_second": 812.4,
    "loading_share": 0.02,
    "model_share": 0.7,
    "loss_share": 0.1,
    "optimizer_share": 0.05,
    "communication_share": 0.04,
    "peak_memory": 3.0 * (1 << 30),
    "skipped": 0.0,
}


def test_a_line_tells_speed_shares_memory_and_faults() -> None:
    told = line(20, 90, VALUES, {"broken image": 2})
    assert told == (
        "step 20/90: loss 3.250, 812 images/s, loading 2%, model 70%, loss 10%, optimizer 5%, "
        "communication 4%, memory 3.00 GiB, faults: 2 broken image"
    )
    assert "1 steps skipped" in line(20, 90, {**VALUES, "skipped": 1.0}, {})


def test_wandb_goes_on_with_the_run_of_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    run = SimpleNamespace(log=lambda v, step: logged.append((step, v)), finish=lambda: None)

    def init(**options: Any) -> SimpleNamespace:
        asked.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for folder, step in (("a", 0), ("a", 7), ("b", 0)):
        (tmp_path / folder).mkdir(exist_ok=True)
        log = RunLog(
            tmp_path / folder, {"x": 1}, tensorboard=False, wandb="p", total_steps=9, step=step
        )
        log.values(step + 1, VALUES, {})
        log.close()
    first, again, other = asked
    assert first == again
    assert (first["project"], first["resume"], first["config"]) == ("p", "allow", {"x": 1})
    assert first["id"] != other["id"]
    assert [step for step, _ in logged] == [1, 8, 1]
    assert logged[0][1]["loss"] == VALUES["loss"]


def test_results_are_written_whole(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {}, tensorboard=False, wandb=None, total_steps=9)
    entries: list[dict[str, float]] = []
    for epoch in (1, 2):
        entries.append({"epoch": epoch, "step": 4 * epoch, "modality_gap": 0.5})
        log.evaluation(entries)
    log.close()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(each) for each in lines] == entries


def test_curves_of_a_run_without_evaluations(tmp_path: Path) -> None:
    history = {"step": [1.0, 2.0], "loss": [3.0, 2.0], "loading_share": [0.1, 0.2]}
    save_curves(tmp_path / "curves.png", history, [])
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000

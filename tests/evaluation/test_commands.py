"""Every command on a tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from examples.cc3m.model import export
from examples.cc3m.recipe import build_towers, load_recipe
from examples.evaluation.__main__ import main
from examples.evaluation.report import Table

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 16, "patch_size": 16, "image_size": 16},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 1, "layers": 1},
}
COLOURS = ("red", "lime", "blue", "white", "black", "yellow")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    export(folder, build_towers(load_recipe("clip"), CONFIG), CONFIG)
    return f"tiny=local-dir:{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of coloured squares for training and test, and a table about the latter."""
    root = tmp_path_factory.mktemp("data")
    rows = ["image\tcaption\tscore"]
    for split, sizes in (("train", range(8, 14)), ("test", range(14, 18))):
        for number, colour in enumerate(COLOURS):
            (root / split / colour).mkdir(parents=True)
            for size in sizes:
                file = f"{split}/{colour}/{size}.png"
                Image.new("RGB", (size, size), colour).save(root / file)
                rows += [f"{file}\t{colour}\t{number}", f"{file}\tsize {size}\t{size}"]
    (root / "pairs.tsv").write_text("\n".join(rows))
    return root


@pytest.mark.parametrize(
    ("command", "numbers"),
    [
        ("retrieval", {"image_to_text_R@1", "text_to_image_R@10"}),
        ("gap", {"modality_gap", "image_cone", "separability"}),
        ("zero_shot", {"colours top1", "colours mean-class-recall"}),
        ("probe", {"colours linear top1", "colours knn top1"}),
        ("agreement", {"tau_b", "tau_c"}),
    ],
)
def test_command(command: str, numbers: set[str], model: str, data: Path, tmp_path: Path) -> None:
    pairs = str(data / "pairs.tsv")
    arguments = {
        "retrieval": ["--pairs", pairs],
        "gap": ["--pairs", pairs],
        "zero_shot": [f"colours={data / 'test'}", "imagenet-r=/nowhere"],
        "probe": [f"colours={data}"],
        "agreement": ["--judgements", pairs],
    }[command]
    out = ["--out", str(tmp_path), "--batch-size", "16", "--device", "cpu"]
    assert main([command, "--model", model, *out, *arguments]) == 0
    report = json.loads((tmp_path / f"{command}.json").read_text())
    measured = report["models"]["tiny"]
    assert numbers <= set(measured)
    assert all(math.isfinite(value) for value in measured.values())
    assert " tiny |" in (tmp_path / f"{command}.md").read_text()
    with Image.open(tmp_path / f"{command}.png") as picture:
        assert picture.width > 300
    if command == "zero_shot":
        assert report["notes"] == ["imagenet-r: not found at /nowhere."]
    if command == "gap":
        assert [point["shift"] for point in report["curves"]["tiny"]][::8] == [-1.0, 0.0, 1.0]
    if command == "probe":
        assert measured["colours linear top1"] > 0.9  # colours are easy, even for a random tower


def test_mistakes_are_told(model: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["zero_shot", "--model", model, "x=/nowhere"], "none of the data sets is there"),
        (["zero_shot", "--model", model, "/nowhere"], "give data sets as name=path"),
        (["gap", "--model", "no-such-model", "--pairs", "x.csv"], "cannot make the model"),
        (["gap", "--model", model, "--pairs", str(data / "0.tar")], "shards of"),
    ):
        assert main([*arguments, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err


def test_tables_have_a_dash_where_a_number_is_missing() -> None:
    table = Table("model", {"a": {"x": 0.5}, "b": {"y": math.nan}}, "Title", ["Note."])
    assert table.text().splitlines()[2:] == [
        "| measure |      a |   b |",
        "| ------- | -----: | --: |",
        "| x       | 0.5000 |   - |",
        "| y       |      - |   - |",
        "",
        "Note.",
    ]

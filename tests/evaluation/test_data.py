"""Sources of captions, grades and classes."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from examples.common.files import UserError
from examples.evaluation.data import Captioned, classification, numbers_of, read_rows, synsets
from examples.evaluation.reading import Reading


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)


def captions_of(path: Path) -> Iterator[tuple[Image.Image, list[str]]]:
    return Captioned(str(path), as_tensor, lambda texts: torch.zeros(len(texts), 1)).samples()


def test_captions_of_a_table(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub/b.png", "blue")
    rows = ["filepath\ttitle", "a.png\tred, mostly", "sub/b.png\tblue", "a.png\ta square"]
    (tmp_path / "t.tsv").write_text("\n".join(rows))
    found = [(image.getpixel((0, 0)), texts) for image, texts in captions_of(tmp_path / "t.tsv")]
    expected = [((255, 0, 0), ["red, mostly", "a square"]), ((0, 0, 255), ["blue"])]
    assert found == expected


def test_captions_of_shards(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("0.png", buffer.getvalue()), ("0.txt", b"one\n\ntwo\n")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [texts for _, texts in captions_of(tmp_path / "0.tar")] == [["one", "two"]]


def test_a_table_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(path)
    for text in ("picture,caption\na,b", "image,caption,score\na,b,good"):
        path.write_text(text)
        with pytest.raises(UserError, match="needs columns filepath"):
            read_rows(path)
    path.write_text("image,caption\nmissing.png,b")
    with pytest.raises(UserError, match="no image that can be read"):
        list(captions_of(path))


# ---------------------------------------------------------------- classes


def test_published_subsets() -> None:
    """Facts of the data sets: their sizes, an overlap, and classes known to be (not) in them."""
    r, a = (numbers_of(f"imagenet-{x}") or [] for x in "ra")
    assert len(set(r)) == len(r) == len(set(a)) == len(a) == 200
    names = open_clip.IMAGENET_CLASSNAMES
    assert names[r[0]] == "goldfish"  # n01443537, the first folder of both papers' lists
    assert synsets([r[0]]) == ["n01443537"]
    assert {"great white shark", "hammerhead shark"} <= {names[i] for i in r}
    assert "hammerhead shark" not in {names[i] for i in a}
    assert synsets([0, 999]) == ["n01440764", "n15075141"]


@pytest.mark.parametrize(
    ("name", "folders", "labels", "classes"),
    [
        ("imagenet-r", ["n01443537", "n12267677"], [0, 199], ["goldfish", "acorn"]),
        ("imagenet-1k", ["n01440764", "n15075141"], [0, 999], ["tench", "toilet paper"]),
        ("imagenet-v2", ["10", "9"], [10, 9], ["brambling", "ostrich"]),
        ("mine", ["a_b", "c"], [0, 1], ["a b", "c"]),
    ],
)
def test_folders_are_numbered_as_the_data_set_does(
    name: str, folders: list[str], labels: list[int], classes: list[str], tmp_path: Path
) -> None:
    """Even when most classes have no image here, and where names sort unlike numbers."""
    for folder in folders:
        picture(tmp_path / folder / "x.png")
    data = classification(name, str(tmp_path), as_tensor)
    ((_, found),) = Reading(8).batches(data)
    assert found.tolist() == labels
    assert [data.names[label] for label in labels] == classes


def test_objectnet_keeps_the_classes_it_shares(tmp_path: Path) -> None:
    for folder in ("banana", "bench", "plastic_cup"):
        picture(tmp_path / "images" / folder / "x.png")
    mappings = tmp_path / "mappings"
    with pytest.raises(UserError, match="as published"):
        classification("objectnet", str(tmp_path), as_tensor)
    mappings.mkdir()
    labels = {"plastic_cup": "Plastic cup", "banana": "Banana", "bench": "Bench"}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Banana": "banana", "Bench": "park bench"}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    data = classification("objectnet", str(tmp_path), as_tensor)
    assert data.names == ["banana", "bench"]
    ((images, found),) = Reading(8).batches(data)
    assert (len(images), found.tolist()) == (2, [0, 1])


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "x.png")
    for name in ("imagenet-a", "imagenet-v2"):
        with pytest.raises(UserError, match=f"is not {name}: it has a folder 'cat'"):
            classification(name, str(tmp_path), as_tensor)

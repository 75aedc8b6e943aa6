"""The generated data: what it holds, how it is laid out, and that it is made once."""

import gc
import itertools
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from PIL import Image

from examples.common.files import UserError
from examples.demo.captions import BESIDE, WORDS, caption
from examples.demo.drawing import draw
from examples.demo.scene_shards import (
    SceneSettings,
    has_unseen_pair,
    heldout_scenes,
    prepare_scenes,
    probe_scenes,
    train_scenes,
)
from examples.demo.scenes import (
    ATTRIBUTES,
    COLOURS,
    RELATIONS,
    SEEN_PAIRS,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    Thing,
    edit_scene,
    overlap,
    sample_scene,
)

TINY = SceneSettings(image_size=32, train=25, heldout=12, probe=6, per_shard=10)


def samples(shards: list[str]) -> list[dict[str, Any]]:
    """Read by webdataset alone, as any other program would."""
    data = list(wds.WebDataset(shards, shardshuffle=False, seed=0))
    gc.collect()  # webdataset leaves the files open
    return data


def thing(**changes: Any) -> Thing:
    return Thing(**{"shape": "ring", "colour": "red", "size": "small", "texture": "plain",
                    "cell": (0, 0), **changes})  # fmt: skip


def some_scenes(count: int) -> list[Scene]:
    rng = random.Random(0)
    return [sample_scene(rng, rng.randint(1, 3), unseen=i % 2 == 0) for i in range(count)]


def test_same_settings_give_the_same_bytes_and_other_seeds_others(tmp_path: Path) -> None:
    first, second = (prepare_scenes(TINY, tmp_path / name) for name in ("a", "b"))
    other = prepare_scenes(SceneSettings(**{**vars(TINY), "seed": 1}), tmp_path / "c")
    for split, shards in first.items():
        contents = [Path(x).read_bytes() for x in shards]
        assert contents == [Path(x).read_bytes() for x in second[split]]
        assert contents != [Path(x).read_bytes() for x in other[split]]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of wds.WebDataset
def test_layout_is_that_of_img2dataset(tmp_path: Path) -> None:
    shards = prepare_scenes(TINY, tmp_path / "data")
    assert [Path(x).name for x in shards["train"]] == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(shards["train"][1]) as tar:
        assert sorted(tar.getnames())[:3] == ["000010000.jpg", "000010000.json", "000010000.txt"]
    for split, count in (("train", 25), ("heldout", 12), ("probe", 6)):
        found = samples(shards[split])
        assert len(found) == count
        for sample in found:
            record = json.loads(sample["json"])
            for thing in Scene.from_json(record["scene"]).things:  # nothing is left out
                assert thing.colour in record["synthetic_caption"]
                assert thing.shape in record["synthetic_caption"]
            assert record["key"] == sample["__key__"]
            assert len(record["key"]) == 9
            assert record["caption"] == sample["txt"].decode()
            assert (record["width"], record["height"], record["status"]) == (32, 32, "success")
    stats = json.loads(Path(shards["train"][2].replace(".tar", "_stats.json")).read_text())
    assert (stats["count"], stats["successes"]) == (5, 5)


def test_data_are_made_once_and_anew_for_other_settings(tmp_path: Path) -> None:
    shards = prepare_scenes(TINY, tmp_path / "data")
    before = Path(shards["train"][0]).stat().st_mtime_ns
    prepare_scenes(TINY, tmp_path / "data")
    assert Path(shards["train"][0]).stat().st_mtime_ns == before
    smaller = prepare_scenes(SceneSettings(**{**vars(TINY), "train": 5}), tmp_path / "data")
    assert len(smaller["train"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interrupted_generation_leaves_no_half_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> Image.Image:
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.demo.scene_shards.draw", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_scenes(TINY, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="choose an empty folder"):
        prepare_scenes(TINY, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("change", [{"train": 0}, {"per_shard": 10_001}, {"image_size": 8}])
def test_impossible_settings_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(change))} must be at (least|most)"):
        SceneSettings(**change)


def test_unseen_pairs_never_occur_in_training_and_always_in_heldout_scenes() -> None:
    settings = SceneSettings(train=2000, heldout=400, probe=100)
    assert len(UNSEEN_PAIRS) == 6
    assert {colour for colour, _ in UNSEEN_PAIRS} == set(COLOURS)
    assert {shape for _, shape in UNSEEN_PAIRS} == set(SHAPES)
    train = list(train_scenes(settings))
    assert not any(has_unseen_pair(scene) for scene in train)
    assert {(t.colour, t.shape) for scene in train for t in scene.things} == set(SEEN_PAIRS)
    heldout = list(heldout_scenes(settings))
    assert len({scene.attributes() for scene in heldout}) == len(heldout) == 400
    assert all(has_unseen_pair(scene) for scene in heldout)
    assert sum(has_unseen_pair(scene) for scene in probe_scenes(settings)) == 50


def test_relations_agree_with_places() -> None:
    for scene in some_scenes(200):
        cells = [thing.cell for thing in scene.things]
        assert len(set(cells)) == len(cells)
        for relation, (a, b) in zip(scene.relations, itertools.pairwise(cells), strict=True):
            assert (b[0] - a[0], b[1] - a[1]) == RELATIONS[relation]


def test_full_captions_tell_every_attribute() -> None:
    rng = random.Random(0)
    for scene in some_scenes(300):
        words = caption(scene, rng).replace(",", "").split()
        for t in scene.things:
            assert t.shape in words
            assert t.colour in words
            assert any(word in words for word in WORDS[t.size])
            assert t.texture == "plain" or t.texture in words
        names = ("colour", "shape", "texture")
        others = {x for name in names for x in ATTRIBUTES[name]}
        others -= {getattr(t, name) for t in scene.things for name in names}
        assert not others & set(words)


def test_captions_vary_and_omission_leaves_attributes_out() -> None:
    scene = some_scenes(1)[0]
    rng = random.Random(0)
    assert len({caption(scene, rng) for _ in range(50)}) > 5
    bare = Scene((thing(colour="red", shape="ring"),), ())
    assert {caption(bare, rng, omit=1.0).split("a ")[-1] for _ in range(20)} <= {"ring", "shape"}


def test_a_two_thing_caption_says_the_relation_either_way() -> None:
    scene = Scene((thing(), thing(shape="star", cell=(1, 0))), ("left of",))
    said = {caption(scene, random.Random(i)) for i in range(60)}
    assert any("star" in x.split("left of")[1] for x in said if "left of" in x)
    assert any("ring" in x.split("right of")[1] for x in said if "right of" in x)
    assert any(x.endswith(BESIDE["left of"]) for x in said)


def test_json_round_trip() -> None:
    for scene in some_scenes(20):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_overlap_counts_shared_facts() -> None:
    a = Scene((thing(), thing(shape="star", cell=(1, 0))), ("left of",))
    mirrored = Scene((thing(shape="star", cell=(1, 0)), thing()), ("right of",))
    recoloured = Scene((thing(colour="blue"), thing(shape="star", cell=(1, 0))), ("left of",))
    alone = Scene((thing(),), ())
    values = overlap([a], [a, mirrored, recoloured, alone])
    assert values[0].tolist() == pytest.approx([1, 1, 8 / 9, 4 / 9])


def test_overlap_is_symmetric_and_falls_with_edits() -> None:
    scenes = some_scenes(40)
    values = overlap(scenes, scenes)
    assert (values == values.T).all()
    assert (values.diagonal() == 1).all()
    rng = random.Random(0)
    for scene in scenes:
        facts = 4 * len(scene.things) + len(scene.relations)
        shared = overlap([scene], [edit_scene(scene, rng, 2)])[0, 0]
        # renaming two facts can at best be undone by matching things otherwise
        assert (facts - 2) / facts <= shared + 1e-6
        assert shared < 1 or len(scene.things) > 1


def test_pictures_show_the_colour_of_a_thing() -> None:
    scene = Scene((thing(shape="square", size="large", colour="green"),), ())
    red, green, blue = draw(scene, random.Random(0), 64).resize((2, 2)).getpixel((0, 0))  # type: ignore[misc]
    assert green > red
    assert green > blue


def test_a_scene_has_one_to_three_things() -> None:
    with pytest.raises(ValueError, match="1 to 3"):
        sample_scene(random.Random(0), 4, unseen=False)

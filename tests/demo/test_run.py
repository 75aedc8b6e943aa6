"""The demo from end to end at its tiny size: its files, and resuming after SIGKILL and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.cc3m.batches import Batch
from examples.cc3m.checkpoint import load_tensors
from examples.cc3m.features import FeatureFolder
from examples.cc3m.files import UserError
from examples.cc3m.recipe import load_recipe
from examples.cc3m.training import Trainer
from examples.demo.run import main
from examples.demo.scene_shards import prepare_scenes
from examples.demo.settings import FAST, RECIPES
from examples.demo.teacher import TeacherSettings, describe, extract_features
from rankloss.fusion.optional import require

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "examples.demo"
KILLED_AT, STOPPED_AT = 19, 44  # of 4 x 12 steps: in the second and in the fourth model
LABELS = [load_recipe(name).label for name in RECIPES]

KILL = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from examples.cc3m.training import Trainer
update, calls = Trainer.update, []
def killed(self, batch):
    calls.append(1)
    if len(calls) == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch)
Trainer.update = killed
runpy.run_module({SCRIPT!r}, run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An uninterrupted run, and one that was killed; each in a process of its own."""
    work = tmp_path_factory.mktemp("runs")
    commands = {"whole": ["-m", SCRIPT], "killed": ["-c", KILL]}
    running = {
        name: subprocess.Popen(
            [sys.executable, *command, "--fast", "--out", name],
            cwd=work,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in commands.items()
    }
    said = {name: process.communicate()[0] for name, process in running.items()}
    assert running["whole"].returncode == 0, said["whole"]
    assert running["killed"].returncode == -signal.SIGKILL, said["killed"]
    assert "| image to text R@1 (%)" in said["whole"]
    assert "CLIP: epoch 2/2, mean loss" in said["whole"], "no progress without a terminal"
    return work / "whole", work / "killed"


def newest(run: Path) -> dict[str, Any]:
    """The state in a run's newest checkpoint."""
    return load_tensors(sorted((run / "seed0/checkpoints").glob("*.safetensors"))[-1])[1]


def test_the_report_is_whole(folders: tuple[Path, Path]) -> None:
    whole, _ = folders
    results = json.loads((whole / "results.json").read_text())
    assert list(results["models"]) == LABELS
    assert len(LABELS) == 4
    for model in results["models"].values():
        assert 0 <= model["metrics"]["i2t_r1"]["mean"] <= 1
        assert model["seconds_per_step"]["median"] > 0
        assert len(model["training"][0]["loss"]) == 12
    assert results["settings"]["scenes"]["train"] == FAST.scenes.train
    assert results["versions"]["torch"] == torch.__version__
    text = (whole / "results.md").read_text()
    assert all(label in text for label in LABELS)
    assert "third order vs CLIP: " in text
    assert "third order + distillation + injection vs CLIP: " in text
    assert "with RANDOM weights: its features carry no semantics" in text
    assert results["settings"]["features"]["random_weights"] is True
    counts = [results["parameters"][label] for label in LABELS]
    assert counts[0] == counts[1] < counts[2] < counts[3]
    assert set(results["settings"]["recipes"]) == set(LABELS)
    last = results["models"][LABELS[-1]]["training"][0]
    for term in ("gram_loss", "distance_loss", "angle_loss", "gate_loss"):
        assert len(last[term]) == 12
        assert min(last[term]) > 0
    summed = [sum(last[k][i] for k in last if k.endswith("_loss")) for i in range(12)]
    assert summed == pytest.approx(last["loss"])
    with Image.open(whole / "report.png") as picture:
        assert picture.width > 1000


def test_all_start_alike(folders: tuple[Path, Path]) -> None:
    results = json.loads((folders[0] / "results.json").read_text())
    first = [model["training"][0]["contrastive_loss"][0] for model in results["models"].values()]
    assert first[1:] == pytest.approx([first[0]] * 3), "other weights or another batch"


def test_killed_and_stopped_runs_resume_exactly(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = folders
    assert not (parts / "results.json").exists()
    done = len(newest(parts / "rankclip")["progress"]["history"]["loss"])
    assert done == 6, "the last multiple of 3 before step 19 - 12"
    update = Trainer.update

    def stopped(self: Trainer, parts: list[Batch]) -> dict[str, Tensor]:
        if self.step == STOPPED_AT - 36 and "dinorankclip" in str(self.checkpoints.folder):
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stopped)
        assert main(["--fast", "--out", str(parts)]) == 130
    said = capsys.readouterr().out
    assert "CLIP: finished before" in said
    assert "RankCLIP: going on after step 6 of 12" in said
    assert "stopped after step 9 of 12; run the same command to go on" in said
    assert main(["--fast", "--out", str(parts)]) == 0
    assert f"{LABELS[-1]}: going on after step 9 of 12" in capsys.readouterr().out
    for recipe in RECIPES:
        name = f"{recipe}/seed0/checkpoints/step_00000012.safetensors"
        (one, _), (two, _) = load_tensors(whole / name), load_tensors(parts / name)
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
    metrics = [
        {name: model["metrics"] for name, model in json.loads(path.read_text())["models"].items()}
        for path in (whole / "results.json", parts / "results.json")
    ]
    assert metrics[0] == metrics[1]


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int) -> None:
    """Ctrl-C just before the given call of a method."""
    original, calls = getattr(owner, method), []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, method, interrupted)


def test_interrupted_extraction_resumes_exactly(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, FeatureFolder, "write", call=2)
        assert main(["--fast", "--out", str(tmp_path)]) == 130
    assert "interrupted; run the same command to go on" in capsys.readouterr().out
    made = tmp_path / "data/train/features"
    assert (made / "00000.tar").exists()
    assert not (made / "00001.tar").exists()
    with monkeypatch.context() as patch:
        stop_at(patch, Trainer, "update", call=1)
        assert main(["--fast", "--out", str(tmp_path)]) == 130
    assert "1 of 2 shards were done before" in capsys.readouterr().out
    whole = folders[0] / "data/train/features"
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    assert files == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_other_settings_do_not_resume(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = replace(FAST, training=replace(FAST.training, learning_rate=0.5))
    monkeypatch.setattr("examples.demo.run.FAST", changed)
    assert main(["--fast", "--out", str(folders[0])]) == 2
    assert "training.learning_rate: 0.0005 -> 0.5" in capsys.readouterr().err


def test_another_teacher_is_not_mixed_in(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = replace(FAST, teacher=replace(FAST.teacher, dim=4))
    monkeypatch.setattr("examples.demo.run.FAST", changed)
    assert main(["--fast", "--out", str(folders[0])]) == 2
    assert "pca.dim: 8 -> 4" in capsys.readouterr().err


def test_a_teacher_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TeacherSettings] = []

    def stop(settings: TeacherSettings, *_: object, **__: object) -> None:
        asked.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.demo.run.extract_features", stop)
    for teacher in ([], ["--teacher", "some/model"]):
        assert main(["--fast", "--out", str(tmp_path), *teacher]) == 130
    named = replace(FAST.teacher, model="some/model", options={}, random_weights=False)
    assert asked == [FAST.teacher, named]


def test_a_teacher_with_weights_is_named_as_such(tmp_path: Path) -> None:
    """From a folder as transformers saves it; nothing is downloaded."""
    require("transformers.activations")  # hides this checkout's folder `kernels`
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    DINOv3ViTModel(config).save_pretrained(tmp_path / "teacher")
    shards = prepare_scenes(FAST.scenes, tmp_path / "data")["train"]
    settings = TeacherSettings(f"{tmp_path}/teacher", {}, random_weights=False, dim=8)
    features = extract_features(settings, shards, FAST.scenes.image_size, fresh=False)
    assert features.grid == (2, 2)
    assert "RANDOM" not in describe(features.manifest)
    assert "with its trained weights" in describe(features.manifest)
    with pytest.raises(UserError, match=r"random_weights: False -> True.*--fresh"):
        extract_features(FAST.teacher, shards, FAST.scenes.image_size, fresh=False)

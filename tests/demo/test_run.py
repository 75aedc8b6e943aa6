"""The demo from end to end at its tiny size: its files, and resuming after SIGKILL and Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from examples.cc3m.data.batch import Batch
from examples.cc3m.loop import Trainer
from examples.cc3m.recipe import load_recipe
from examples.common.files import UserError
from examples.demo.run import FAST, RECIPES, DemoSettings, main
from examples.demo.scene_shards import prepare_scenes
from examples.demo.teacher import TeacherSettings, describe, extract_features

ROOT = Path(__file__).resolve().parents[2]
STEPS = FAST.training.epochs * (FAST.scenes.train // FAST.training.batch_size)
KILLED_AT = STEPS + 3  # counted over all rows: in the second one, after its first checkpoint
STOPPED_AT = 3  # of the last row
LABELS = [load_recipe(name).label for name in RECIPES]

ANYWHERE = """
import runpy, sys
missing = ["resource", "fcntl"]  # as on Windows
missing += ["tensorboard", "transformers", "lightly"]  # the extra `demo` does not install them
sys.modules |= dict.fromkeys(missing)
sys.argv[0] = "demo"
"""
RUN = 'runpy.run_module("examples.demo", run_name="__main__")'
KILL = f"""
import os, signal
from examples.cc3m.loop import Trainer
update, calls = Trainer.update, []
def killed(self, batch):
    calls.append(1)
    if len(calls) == {KILLED_AT}:
        self.saved.checkpoints.wait()  # it is written while training goes on
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch)
Trainer.update = killed
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An uninterrupted run, and one that was killed; each in a process of its own."""
    work = tmp_path_factory.mktemp("runs")
    programs = {"whole": ANYWHERE + RUN, "killed": "import runpy\n" + KILL + RUN}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", program, "--fast", "--out", name],
            cwd=work,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
                "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, program in programs.items()
    }
    said = {name: process.communicate()[0] for name, process in running.items()}
    assert running["whole"].returncode == 0, said["whole"]
    assert running["killed"].returncode == -signal.SIGKILL, said["killed"]
    assert "| image to text R@1 (%)" in said["whole"]
    assert "CLIP: epoch 2/2, mean loss" in said["whole"], "no progress without a terminal"
    first = said["whole"].index("s] CLIP: image to text R@1 (%) ")
    assert first < said["whole"].index("RankCLIP: epoch 1"), "each row's result as soon as it is"
    return work / "whole", work / "killed"


def test_the_report_is_whole(folders: tuple[Path, Path]) -> None:
    whole, _ = folders
    results = json.loads((whole / "results.json").read_text())
    assert list(results["models"]) == LABELS
    assert len(LABELS) == 4
    for model in results["models"].values():
        assert 0 <= model["metrics"]["i2t_r1"][0] <= 1
        assert model["cpu_seconds_per_step"] > 0
        assert len(model["training"][0]["loss"]) == STEPS
    assert results["settings"]["scenes"]["train"] == FAST.scenes.train
    assert results["versions"]["torch"] == torch.__version__
    text = (whole / "results.md").read_text()
    assert all(label in text for label in LABELS)
    assert "third order minus CLIP: " in text
    assert "One seed proves nothing" in text
    assert f"({STEPS} steps), the same random crops, initial weights and order" in text
    assert "8 x 8 patches of 8 dimensions" in text
    assert "with the weights that examples/self_distillation made by DINOv3's recipe" in text
    assert not re.search("helps|helped|better", text)
    counts = [model["parameters"] for model in results["models"].values()]
    assert counts[0] == counts[1] < counts[2] < counts[3]
    flops = [model["flops_per_step"] for model in results["models"].values()]
    assert 1e8 < flops[0] <= flops[1] <= flops[2] < flops[3]
    last = results["models"][LABELS[-1]]["training"][0]
    for term in ("gram", "distance", "angle", "gate", "text_distance", "text_angle"):
        assert len(last[f"{term}_loss"]) == STEPS
        assert min(last[f"{term}_loss"]) > 0
    assert last["anchor_loss"][0] == 0 < last["anchor_loss"][-1]
    with Image.open(whole / "report.png") as picture:
        assert picture.width > 1000


def test_all_rows_start_alike_and_have_the_same_budget(folders: tuple[Path, Path]) -> None:
    """Same weights, crops, batches and number of steps."""
    models = json.loads((folders[0] / "results.json").read_text())["models"].values()
    first = [model["training"][0]["contrastive_loss"][0] for model in models]
    assert first[1:] == pytest.approx([first[0]] * 3), "other weights or another batch"
    for name in RECIPES:
        settings = (folders[0] / name / "seed0" / "config.yaml").read_text()
        assert "augment: true" in settings
        assert f"epochs: {FAST.training.epochs}" in settings


def test_killed_and_stopped_runs_resume_exactly(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = folders
    assert not (parts / "results.json").exists()
    update = Trainer.update

    def stopped(self: Trainer, parts: list[Batch]) -> dict[str, Tensor]:
        if self.step == STOPPED_AT - 1 and self.towers.distillation is not None:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stopped)
        assert main(["--fast", "--out", str(parts)]) == 130
    said = capsys.readouterr().out
    assert "not measured" not in said  # by the training script: the demo measures its rows itself
    assert f"going on after step {STEPS} of {STEPS}" in said, "CLIP was not finished before"
    assert f"going on after step 2 of {STEPS}" in said, "RankCLIP's checkpoint was not used"
    assert f"stopped after step {STOPPED_AT} of {STEPS}; run the same command to go on" in said
    assert main(["--fast", "--out", str(parts)]) == 0
    assert f"going on after step {STOPPED_AT} of {STEPS}" in capsys.readouterr().out
    for exported in whole.glob("*/seed0/export/*.safetensors"):
        one, two = load_file(exported), load_file(parts / exported.relative_to(whole))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
    metrics = [
        {name: model["metrics"] for name, model in json.loads(path.read_text())["models"].items()}
        for path in (whole / "results.json", parts / "results.json")
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"training": replace(FAST.training, learning_rate=0.5)}, "learning_rate: 0.0005 -> 0.5"),
        ({"teacher": replace(FAST.teacher, dim=4)}, "pca.dim: 8 -> 4"),
    ],
)
def test_other_settings_or_another_teacher_do_not_resume(
    change: dict[str, object],
    told: str,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("examples.demo.run.FAST", replace(FAST, **change))  # type: ignore[arg-type]
    monkeypatch.setattr("examples.demo.run.RECIPES", RECIPES[-1:])
    assert main(["--fast", "--out", str(folders[0])]) == 2
    assert told in capsys.readouterr().err


def test_a_teacher_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TeacherSettings] = []

    def stop(settings: TeacherSettings, *_: object, **__: object) -> None:
        asked.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.demo.run.RECIPES", RECIPES[-1:])
    monkeypatch.setattr("examples.demo.run.extract_features", stop)
    for teacher in ([], ["--teacher", "some/model"], ["--teacher", "random"]):
        assert main(["--fast", "--out", str(tmp_path), *teacher]) == 130
    named = replace(FAST.teacher, model="some/model", options={}, weights="published")
    assert asked == [FAST.teacher, named, replace(FAST.teacher, weights="random")]
    assert FAST.teacher.weights == DemoSettings().teacher.weights == "self-distilled"


def test_a_teacher_is_named_by_its_weights(tmp_path: Path) -> None:
    """Published ones are taken from a folder as transformers saves it; nothing is downloaded."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    DINOv3ViTModel(config).save_pretrained(tmp_path / "teacher")
    scenes = replace(FAST.scenes, train=4, heldout=4, probe=4)
    shards = prepare_scenes(scenes, tmp_path / "data")["train"]
    settings = TeacherSettings(f"{tmp_path}/teacher", {}, "published", dim=2)
    text = describe(extract_features(settings, shards, scenes.image_size, fresh=False))
    assert "RANDOM" not in text
    assert "8 x 8 patches of 2 dimensions" in text
    assert text.endswith("with its published weights.")
    with pytest.raises(UserError, match=r"model: .*--fresh"):
        extract_features(FAST.teacher, shards, scenes.image_size, fresh=False)
    control = replace(FAST.teacher, weights="random")
    text = describe(extract_features(control, shards, scenes.image_size, fresh=True))
    assert "with RANDOM weights: its features carry no semantics" in text

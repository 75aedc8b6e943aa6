"""The training script as its users run it: killed, stopped, resumed, misused; what it leaves."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.cc3m import extract_dinov3
from examples.cc3m.checkpoint import Checkpoint, Checkpoints
from examples.cc3m.files import UserError
from examples.cc3m.run_settings import parse
from examples.cc3m.train import main
from examples.demo.train_on_scenes import main as train_on_scenes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "examples.demo.train_on_scenes"
SMALL = [
    *("--scenes", "64", "--shuffle", "32"),
    *("--train.batch-size", "16", "--train.epochs", "2", "--train.warmup-steps", "2"),
    *("--train.checkpoint-steps", "2", "--train.log-steps", "1"),
]
TOTAL = 8

ACT = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from examples.cc3m.training import Trainer
update, acts = Trainer.update, {{int(k): int(v) for k, v in
                                 (x.split("=") for x in sys.argv.pop(1).split(",") if x)}}
def acting(self, parts):
    if self.step in acts and os.environ.get("RANK", "0") == "0":
        kill = os.kill if "RANK" in os.environ else os.killpg  # with the processes that read
        kill(os.getpid(), acts[self.step])
    if os.environ.get("HANG") == str(self.step):
        os.kill(os.getpid(), signal.SIGTERM)
        print("hanging", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        while True: pass
    return update(self, parts)
Trainer.update = acting
runpy.run_module({SCRIPT!r}, run_name="__main__")
"""


def command(acts: dict[int, int], *arguments: str, world: int = 1) -> list[str]:
    """The script, which sends itself signals before some steps."""
    told = ",".join(f"{step}={number}" for step, number in acts.items())
    if world == 1:
        return [sys.executable, "-c", ACT, told, *SMALL, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return [sys.executable, *launcher, "act.py", told, *SMALL, *arguments]


def start(cwd: Path, arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    (cwd / "act.py").write_text(ACT)
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(cwd: Path, arguments: list[str], **environment: str) -> tuple[int, str]:
    process = start(cwd, arguments, **environment)
    said = process.communicate(timeout=200)[0]
    return process.returncode, said


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(work: Path) -> Path:
    """A run that nobody disturbed."""
    code, said = run(work, command({}, "--out", "whole"))
    assert code == 0, said
    return work / "whole"


def last(folder: Path) -> Checkpoint:
    found = Checkpoints(folder / "checkpoints").latest()
    assert found is not None
    return found


def assert_same(a: Path, b: Path) -> None:
    """Losses and everything that was saved at the end, bit for bit."""
    one, two = last(a), last(b)
    losses = [x.state["progress"]["history"]["loss"] for x in (one, two)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == TOTAL
    assert one.tensors.keys() == two.tensors.keys()
    for name, value in one.tensors.items():
        assert torch.equal(value, two.tensors[name]), name
    names = [name for name in one.tensors if name.startswith(("module.loss", "optimizer."))]
    assert names
    results = [(folder / "results.jsonl").read_text() for folder in (a, b)]
    assert results[0] == results[1]


# ---------------------------------------------------------------- killed and stopped


def test_killed_and_stopped_it_resumes_bit_for_bit(work: Path, whole: Path) -> None:
    """Killed at a random step, then twice asked to stop, which saves within a step."""
    out, killed = work / "parts", random.Random(7).randrange(1, 4)
    code, said = run(work, command({killed: signal.SIGKILL}, "--out", "parts"))
    assert code == -signal.SIGKILL, said
    for step, number in ((5, signal.SIGTERM), (6, signal.SIGINT)):
        code, said = run(work, command({step: number}, "--out", "parts"))
        assert code == 0, said
        assert f"stopped after step {step + 1} of {TOTAL}; run the same command to go on" in said
        assert last(out).state["progress"]["step"] == step + 1
    code, said = run(work, command({}, "--out", "parts"))
    assert code == 0, said
    assert f"going on after step 7 of {TOTAL}" in said
    assert_same(whole, out)


def test_a_second_signal_ends_it_at_once_with_143(work: Path) -> None:
    code, said = run(work, command({}, "--out", "twice"), HANG="1")
    assert "hanging" in said
    assert code == 143, said


def test_two_processes_resume_at_another_number_of_them(work: Path) -> None:
    """The same global batch, so that the schedule stays; steps go on where they were."""
    options = ("--out", "worlds", "--train.accumulate", "2")
    code, said = run(work, command({1: signal.SIGTERM}, *options, world=2))
    assert code == 0, said
    assert f"stopped after step 2 of {TOTAL}" in said
    positions = last(work / "worlds").state["positions"]
    assert len(positions) == 2
    code, said = run(work, command({}, "--out", "worlds"))
    assert code == 0, said
    assert f"going on after step 2 of {TOTAL}" in said
    state = last(work / "worlds").state
    assert len(state["positions"]) == 1
    assert [entry["epoch"] for entry in state["progress"]["evaluations"]] == [1, 2]


# ---------------------------------------------------------------- what it leaves


def test_everything_is_there(whole: Path) -> None:
    results = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in results] == [1, 2]
    for entry in results:
        recalls = [entry[f"{way}_R@{k}"] for way in WAYS for k in (1, 5, 10)]
        assert all(0 <= value <= 1 for value in recalls)
        assert 0 <= entry["zeroshot-top1"] <= entry["zeroshot-top5"] <= 1
        assert 0 < entry["modality_gap"] < 2
        assert 0 < entry["alignment"] < 4
        assert -8 < entry["uniformity"] < 0
    with Image.open(whole / "curves.png") as picture:
        assert picture.width > 1000
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["recipe"]["loss"]["order"] == 3
    assert config["train"]["batch_size"] == 16
    history = last(whole).state["progress"]["history"]
    shares = [history[f"{name}_share"] for name in ("loading", "model", "loss", "optimizer")]
    sums = [sum(step) for step in zip(*shares, strict=True)]
    assert max(sums) > 0.5
    assert all(total <= 1.01 for total in sums)
    assert min(history["peak_memory"]) > 0


WAYS = ("image_to_text", "text_to_image")


def test_tensorboard_has_the_losses(whole: Path) -> None:
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    expected = last(whole).state["progress"]["history"]["loss"]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len(events.Scalars("evaluation/modality_gap")) == 2


def test_open_clip_loads_the_weights(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and file, as CLIP_benchmark does, and as a folder of its own."""
    trained = last(whole).tensors
    config = json.loads((whole / "export/open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "rankloss-tiny", config)
    weights = str(whole / "export/open_clip_model.safetensors")
    by_name = open_clip.create_model("rankloss-tiny", pretrained=weights)
    by_folder = open_clip.create_model(f"local-dir:{whole / 'export'}")
    for model in (by_name, by_folder):
        state = model.state_dict()
        assert state
        for name, value in state.items():
            assert torch.equal(value, trained[f"module.model.{name}"]), name


# ---------------------------------------------------------------- the command line


def test_recipes_and_overrides() -> None:
    settings = parse(["--recipe", "rankclip", "--recipe.loss.cross-modal-weight", "0.5"])
    assert (settings.recipe.loss.name, settings.train.epochs) == ("high_order", 30)
    assert settings.as_json()["recipe"]["loss"]["cross_modal_weight"] == 0.5
    assert settings.as_json()["recipe"]["loss"]["order"] == 1
    assert parse(["--recipe", "siglip"]).recipe.loss.name == "siglip"
    assert parse(["--recipe", "dinorankclip"]).recipe.distillation is not None


BAD: dict[str, tuple[list[str], str]] = {
    "unknown recipe": (["--recipe", "clipp"], "clipp"),
    "no data": ([], "no image-text shards to train on; pass --data 'folder/{00000..00331}.tar'"),
    "no such shards": (["--data", "none/{0..3}.tar"], "4 of 4 shards .* are missing"),
    "no features": (["--recipe", "dinorankclip"], "extract_dinov3, then pass --features"),
    "wrong features": (
        ["--recipe", "dinorankclip", "--features", "nowhere"],
        "nowhere has no manifest.json; run examples.cc3m.extract_dinov3",
    ),
    "indivisible batch": (["--train.accumulate", "3"], "choose a multiple of 3 from 6 on"),
    "fp16 and fsdp2": (
        ["--train.precision", "amp_fp16", "--train.sharding", "fsdp2"],
        "use amp_bf16",
    ),
}


@pytest.mark.parametrize(("arguments", "told"), BAD.values(), ids=BAD)
def test_bad_settings_are_told_before_anything_is_built(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("examples.cc3m.train.build_clip", None)
    try:
        code = main([*arguments, "--out", str(tmp_path / "out")])
    except SystemExit as error:  # what the command line's parser refuses
        code = int(str(error.code))
    assert code == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


MISFITS: dict[str, tuple[list[str], str]] = {
    "other settings": (["--train.learning-rate", "1"], r"train\.learning_rate: 0\.0005 -> 1\.0"),
    "other recipe": (["--recipe", "clip"], r"recipe\.label"),
    "too few samples": (["--train.batch-size", "256"], "64 samples are fewer than one batch"),
    "too many workers": (["--workers", "30"], r"8 shards cannot feed .* \(--workers\)"),
    "no evaluation shards": (["--evaluation.pairs", "x{0..1}.tar"], "evaluation.pairs: 2 of 2"),
    "no class names": (["--evaluation.images", "{data}/probe/{00000..00000}.tar"], "their names"),
}


@pytest.mark.parametrize(("arguments", "told"), MISFITS.values(), ids=MISFITS)
def test_settings_that_do_not_fit_the_run_or_its_data(
    arguments: list[str],
    told: str,
    work: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("examples.cc3m.train.build_clip", None)
    data = str(work / "whole-data")
    given = [x.replace("{data}", data) for x in arguments]
    code = train_on_scenes([*SMALL, *given, "--out", str(whole)])
    assert code == 2
    assert re.search(told, capsys.readouterr().err)


def test_features_of_another_teacher_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the start of a run and its continuation; of the wrong size, at once."""
    monkeypatch.setattr("examples.cc3m.train.Run.train", lambda *_: None)
    arguments = [*SMALL, "--recipe", "dinorankclip", "--out", str(tmp_path / "run")]
    assert train_on_scenes(arguments) == 0
    assert train_on_scenes(arguments) == 0
    capsys.readouterr()
    marker = tmp_path / "run" / "settings.json"
    claimed = json.loads(marker.read_text())
    for changes in ({"model": "another"}, {"dim": 8}):
        marker.write_text(json.dumps({**claimed, "teacher": {**claimed["teacher"], **changes}}))
        assert train_on_scenes(arguments) == 2
        told = capsys.readouterr().err
        assert f"teacher.{next(iter(changes))}: " in told
    features = tmp_path / "run-data" / "train" / "features"
    data = str(tmp_path / "run-data" / "train" / "{00000..00007}.tar")
    other = ["--recipe", "dinorankclip", "--data", data, "--features", str(features)]
    assert main([*other, "--out", str(tmp_path / "other")]) == 2  # the model sees 224 pixels
    assert "'resolution': 64" in capsys.readouterr().err


def test_wandb_is_asked_for_only_by_flag(
    work: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train_on_scenes([*SMALL, "--wandb", "--out", str(whole)]) == 2
    assert "pip install wandb" in capsys.readouterr().err


def test_help_names_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert "highorder_r3" in told
    assert "--train.batch-size" in told


def test_unknown_model_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe"):
        parse(["--recipe", str(tmp_path / "none.yaml")])


def test_the_commands_of_the_readme_are_the_scripts() -> None:
    """Their options exist; the third trains what the second extracts from what the first loads."""
    readme = (ROOT / "README.md").read_text()
    block = readme[readme.index("## Train on CC3M") :].split("```")[1]
    download, extract, train = [shlex.split(x) for x in block.strip().splitlines()[1:]]
    assert download[download.index("--output_folder") + 1] == "cc3m"
    _, _, script, *arguments = extract
    assert script == "examples.cc3m.extract_dinov3"
    assert extract_dinov3.parse(arguments).shards == ["cc3m/{00000..00331}.tar"]
    at = train.index("examples.cc3m.train")
    settings = parse(train[at + 1 :])
    assert (settings.data, settings.features) == (arguments[0], Path("cc3m/features"))
    assert settings.train.part_size(int(train[at - 2])) == 512

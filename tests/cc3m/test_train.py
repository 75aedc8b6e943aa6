"""The training script as its users run it: killed, stopped, resumed, misused; what it leaves."""

import json
import os
import random
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.cc3m import extract_dinov3
from examples.cc3m.evaluation import Evaluator
from examples.cc3m.recipe import build_tokenizer, build_transform
from examples.cc3m.settings import EvaluationSettings, parse
from examples.cc3m.train import main
from examples.common.checkpoint import Checkpoint, Checkpoints
from examples.common.files import UserError
from examples.common.parallel import Parallel
from examples.common.signals import StopRequest
from examples.common.tiny import TINY_CLIP
from rankloss import DinoRankCLIP
from tests.helpers.programs import Programs, Running
from tests.helpers.shards import write_classes, write_pairs

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--model", "tiny", "--device", "cpu", "--workers", "1", "--shuffle", "32"),
    *("--no-augment", "--no-tensorboard"),
    *("--train.batch-size", "16", "--train.epochs", "2", "--train.warmup-steps", "2"),
    *("--train.checkpoint-steps", "2", "--train.log-steps", "1", "--train.precision", "fp32"),
]
TOTAL = 8  # steps
ACT = """
import os, signal
from examples.cc3m import recipe
from examples.cc3m.loop import Trainer
from examples.cc3m import train
from examples.common import tiny
recipe.SMALL_CLIP.update(tiny.TINY_CLIP)
if "CURVES" not in os.environ:
    train.save_curves = lambda *_: None
update, rank = Trainer.update, int(os.environ.get("RANK", 0))
acts = dict(x.split("=") for x in os.environ.get("ACTS", "").split(",") if x)
def acting(self, parts):
    act = acts.get(f"{rank}:{self.step}", "")
    if acts:
        self.saved.checkpoints.wait()  # which is written while training goes on
        self.parallel.agree(False)
    if act.isdigit():
        os.killpg(os.getpid(), int(act))  # with the processes that read
    if act == "raise":
        raise RuntimeError("something broke")
    return update(self, parts)
Trainer.update = acting
"""
"""Code that makes a process act before some steps: ACTS="rank:step=signal or raise"."""


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with Programs("examples.cc3m.train") as started:
        yield started


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_pairs(folder / "data", [8] * 8)
    write_pairs(folder / "heldout", [8, 5])
    write_classes(folder / "classes")
    return folder


def arguments(work: Path, out: str, *more: str) -> list[str]:
    data = str(work / "data" / "{00000..00007}.tar")
    return [*SMALL, "--data", data, "--out", str(work / out), *more]


def evaluated(work: Path) -> list[str]:
    pairs = str(work / "heldout" / "{00000..00001}.tar")
    data = ["--evaluation.pairs", pairs, "--evaluation.images", str(work / "classes")]
    return [*data, "--train.ema-decay", "0.9"]


@pytest.fixture(scope="module")
def whole(work: Path, programs: Programs) -> Path:
    """A run that nobody disturbed."""
    command = arguments(work, "whole", *evaluated(work), "--tensorboard")
    code, said = programs.run(command, work, ACT, CURVES="1")
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
    results = [folder / "results.jsonl" for folder in (a, b)]
    assert results[0].exists() == results[1].exists()
    if results[0].exists():
        assert results[0].read_text() == results[1].read_text()


def status(folder: Path) -> str:
    return (folder / "status").read_text().strip()


# ---------------------------------------------------------------- killed and stopped


def test_killed_and_stopped_it_resumes_bit_for_bit(
    work: Path, whole: Path, programs: Programs
) -> None:
    """Killed at a random step, then asked to stop by each signal, which saves within a step."""
    out, killed = work / "parts", random.Random(7).randrange(1, 4)
    command = arguments(work, "parts", *evaluated(work))
    code, said = programs.run(command, work, ACT, ACTS=f"0:{killed}={signal.SIGKILL:d}")
    assert code == -signal.SIGKILL, said
    assert status(out) == "running"
    for step, number in enumerate(("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"), 4):
        code, said = programs.run(command, work, ACT, ACTS=f"0:{step}={getattr(signal, number):d}")
        assert code == 75, said
        assert status(out) == "preempted"
        if step < TOTAL - 1:
            told = f"stopped after step {step + 1} of {TOTAL}; run the same command to go on"
            assert told in said
        assert last(out).state["progress"]["step"] == step + 1
    code, said = programs.run(command, work, ACT)
    assert code == 0, said
    assert f"going on after step {TOTAL} of {TOTAL}" in said
    assert status(out) == "finished"
    assert_same(whole, out)


SLOW = (
    ACT
    + """
import time
from examples.common import checkpoint
save_tensors = checkpoint.save_tensors
def slow(*arguments):
    print("saving", flush=True)
    time.sleep(0.5)
    save_tensors(*arguments)
checkpoint.save_tensors = slow
"""
)


def test_further_signals_while_it_saves_do_not_lose_the_checkpoint(
    work: Path, programs: Programs
) -> None:
    """A cluster sends SIGTERM to every process, and torchrun sends it once more."""
    command = arguments(work, "twice", "--train.checkpoint-steps", "100")
    process = programs.start(command, work, SLOW, ACTS=f"0:1={signal.SIGTERM:d}")
    process.wait_for("saving")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.kill(number)
    assert process.wait() == 75, process.said()
    assert last(work / "twice").state["progress"]["step"] == 2


def finish(processes: list[Running], seconds: float = 60) -> list[int]:
    return [process.wait(seconds) for process in processes]


def said_by(processes: list[Running]) -> str:
    return "\n".join(process.said() for process in processes)


def test_two_processes_killed_and_resumed_with_sharded_parameters(
    work: Path, programs: Programs
) -> None:
    """One of them is killed and the other ends too; afterwards they go on bit for bit."""
    more = ("--train.sharding", "fsdp2", *evaluated(work))
    undisturbed = programs.start_all(2, arguments(work, "fsdp", *more), work, ACT)
    assert finish(undisturbed) == [0, 0], said_by(undisturbed)
    command = arguments(work, "fsdp_parts", *more)
    kill = ACT + 'acts = {"1:5": "9"}\n'
    killed = programs.start_all(2, command, work, kill)
    codes = finish(killed)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None), said_by(killed)
    resumed = programs.start_all(2, command, work, ACT)
    assert finish(resumed) == [0, 0], said_by(resumed)
    assert "going on after step 4 of 8" in resumed[0].said()
    assert_same(work / "fsdp", work / "fsdp_parts")
    exported = DinoRankCLIP.from_pretrained(work / "fsdp" / "export")
    trained = last(work / "fsdp").tensors
    for name, value in exported.state_dict().items():
        assert torch.equal(value.reshape(-1), trained[f"module.{name}"].reshape(-1)), name


def test_another_number_of_processes_goes_on_with_the_samples_that_are_left(
    work: Path, programs: Programs
) -> None:
    """The same global batch; in the first epoch, every sample but those of the last batches."""
    note = (
        ACT
        + """
from examples.cc3m.data.positions import Position
after = Position.after
def noting(self, batch, streams):
    with open("keys.txt", "a") as file:
        file.writelines(f"{self.epoch} {key}\\n" for key in batch.keys)
    return after(self, batch, streams)
Position.after = noting
"""
    )
    (work / "keys.txt").unlink(missing_ok=True)
    command = arguments(work, "worlds", "--train.accumulate", "2")
    stopped = programs.start_all(2, command, work, note + 'acts = {"0:1": "15"}\n')
    assert finish(stopped) == [75, 75], said_by(stopped)
    assert "stopped after step 2 of 8" in stopped[0].said()
    assert len(last(work / "worlds").state["positions"]) == 2
    code, said = programs.run(arguments(work, "worlds"), work, note)
    assert code == 0, said
    assert "going on after step 2 of 8" in said
    state = last(work / "worlds").state
    assert len(state["positions"]) == 1
    keys = [
        line.split()[1] for line in (work / "keys.txt").read_text().splitlines() if line[0] == "0"
    ]
    assert len(keys) == len(set(keys)) == 64
    assert state["progress"]["step"] == TOTAL


# ---------------------------------------------------------------- never hang


@pytest.mark.parametrize("world", [1, 2])
def test_an_exception_ends_every_process_though_readers_ignore_signals(
    work: Path, programs: Programs, world: int
) -> None:
    command = arguments(work, f"raises{world}", "--workers", "2")
    processes = programs.start_all(
        world, command, work, ACT + f'acts = {{"{world - 1}:2": "raise"}}\n'
    )
    assert all(code not in (0, 75) for code in finish(processes, 30)), said_by(processes)
    assert "RuntimeError: something broke" in processes[-1].said()
    assert status(work / f"raises{world}") == "failed"
    for process in processes:  # nobody is left, readers neither
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_a_reader_that_is_killed_ends_the_run(work: Path, programs: Programs) -> None:
    """As by the system when memory runs out."""
    kill = (
        ACT
        + """
import multiprocessing
def killing(self, parts):
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    return update(self, parts)
Trainer.update = killing
"""
    )
    process = programs.start(arguments(work, "reader"), work, kill)
    assert process.wait(30) == 1, process.said()
    assert "worker" in process.said()


def test_processes_go_on_from_one_checkpoint_or_not_at_all(work: Path, programs: Programs) -> None:
    """An input error in one process must not let it start from another step."""
    command = arguments(work, "torn")
    assert finish(programs.start_all(2, command, work, ACT + 'acts = {"0:3": "15"}\n')) == [75, 75]
    broken = (
        ACT
        + """
from examples.cc3m import resume
if rank == 1:
    def broken(path):
        raise resume.UserError("input/output error")
    resume.load_checkpoint = broken
"""
    )
    processes = programs.start_all(2, command, work, broken)
    assert finish(processes, 60) == [2, 2], said_by(processes)
    for process in processes:
        told = r"step_00000004\.safetensors, which the first process goes on from, cannot be read"
        assert re.search(told, process.said()), process.said()


def test_a_folder_that_not_all_processes_share_is_an_error_at_once(
    work: Path, programs: Programs
) -> None:
    elsewhere = (
        ACT
        + """
import sys
if rank == 1:
    sys.argv[sys.argv.index("--out") + 1] += "-of-another-machine"
"""
    )
    processes = programs.start_all(2, arguments(work, "apart"), work, elsewhere)
    assert finish(processes, 60) == [2, 2], said_by(processes)
    assert "is not the folder that the first process sees" in processes[0].said()


def test_one_run_at_a_time_writes_into_a_folder(work: Path, programs: Programs) -> None:
    wait = (
        ACT
        + """
import time
def waiting(self, parts):
    print("training", flush=True)
    time.sleep(60)
Trainer.update = waiting
"""
    )
    process = programs.start(arguments(work, "locked"), work, wait)
    process.wait_for("training")
    code, said = programs.run(arguments(work, "locked"), work, ACT)
    assert code == 2
    assert "another process is writing to" in said
    process.kill(signal.SIGKILL)
    process.wait()


def test_a_full_disk_for_curves_costs_no_step(work: Path, programs: Programs) -> None:
    full = (
        ACT
        + """
from torch.utils.tensorboard.writer import SummaryWriter
def full(*_, **__):
    raise OSError(28, "No space left on device")
SummaryWriter.add_scalar = full
"""
    )
    code, said = programs.run(
        arguments(work, "full", "--train.epochs", "1", "--tensorboard"), work, full
    )
    assert code == 0, said
    assert said.count("TensorBoard cannot be written") == 1


def test_other_settings_go_on_by_a_flag_and_are_noted(work: Path, programs: Programs) -> None:
    """Rate, batch, and where the data are; the schedule ends where it should."""
    command = arguments(work, "changed")
    code, said = programs.run(command, work, ACT, ACTS=f"0:3={signal.SIGTERM:d}")
    assert code == 75, said
    (work / "data").rename(work / "moved")
    try:
        moved = [x.replace(str(work / "data"), str(work / "moved")) for x in command]
        moved += ["--train.learning-rate", "1e-4", "--train.batch-size", "8"]
        code, said = programs.run(moved, work, ACT)
        assert code == 2
        assert "train.batch_size: 16 -> 8" in said
        code, said = programs.run([*moved, "--change"], work, ACT)
        assert code == 0, said
    finally:
        (work / "moved").rename(work / "data")
    noted = json.loads((work / "changed" / "settings_changed.jsonl").read_text())
    assert noted["train.batch_size"] == [16, 8]
    assert noted["data"][1].startswith(str(work / "moved"))
    history = last(work / "changed").state["progress"]["history"]
    assert last(work / "changed").state["progress"]["step"] == 4 + 8  # half the data, twice
    assert history["learning_rate"][-1] < 0.05 * 1e-4


def test_it_rolls_back_on_request_and_leaves_the_samples_out(
    work: Path, programs: Programs
) -> None:
    bad = (
        ACT
        + """
import torch
def spoiling(self, parts):
    if "bad" in os.environ and 4 <= self.step < 7 and not self.progress.rolled_back:
        parts = [type(p)(**{**p.__dict__, "images": p.images * torch.nan}) for p in parts]
    return update(self, parts)
Trainer.update = spoiling
"""
    )
    more = ("--train.most-skipped", "1", "--train.epochs", "3")
    code, said = programs.run(arguments(work, "back", *more), work, bad, bad="1")
    assert code == 2
    assert "--train.roll-back 1" in said
    code, said = programs.run(
        arguments(work, "back", *more, "--train.roll-back", "1"), work, bad, bad="1"
    )
    assert code == 0, said
    assert "weights are again those of step_00000004" in said
    assert all(torch.isfinite(x).all() for x in last(work / "back").tensors.values())
    assert last(work / "back").state["progress"]["rolled_back"] == 1


# ---------------------------------------------------------------- what it leaves


def test_everything_is_there(whole: Path) -> None:
    results = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in results] == [1, 2]
    for entry in results:
        recalls = [entry[f"{way}_R@{k}"] for way in WAYS for k in (1, 5, 10)]
        assert all(0 <= value <= 1 for value in recalls)
        assert 0 <= entry["zeroshot-top1"] <= entry["zeroshot-top5"] <= 1
        assert 0 < entry["modality_gap"] < 2
        assert 0 <= entry["ema/image_to_text_R@1"] <= 1
        assert 0 < entry["alignment"] < 4
        assert -8 < entry["uniformity"] < 0
    with Image.open(whole / "curves.png") as picture:
        assert picture.width > 1000
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["recipe"] == "highorder_r3"
    assert config["train"]["batch_size"] == 16
    history = last(whole).state["progress"]["history"]
    shares = [history[f"{name}_share"] for name in ("loading", "model", "loss", "optimizer")]
    sums = [sum(step) for step in zip(*shares, strict=True)]
    assert max(sums) > 0.3
    assert all(total <= 1.01 for total in sums)
    assert min(history["peak_memory"]) > 0
    told = (whole / "train.log").read_text()
    assert "step 8/8: loss" in told
    assert "faults in the data: none; 0 steps skipped" in told
    assert "shared memory: up to" in told
    assert "waited for data" in told


WAYS = ("image_to_text", "text_to_image")


def test_tensorboard_has_the_losses(whole: Path) -> None:
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    expected = last(whole).state["progress"]["history"]["loss"]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len(events.Scalars("evaluation/modality_gap")) == 2


def test_open_clip_and_rankloss_load_the_weights(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name and file, as CLIP_benchmark does, and as a folder; the whole model in one call."""
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
    everything = DinoRankCLIP.from_pretrained(whole / "export").state_dict()
    assert {f"module.{name}" for name in everything} == {x for x in trained if x[:7] == "module."}
    for name, value in everything.items():
        assert torch.equal(value, trained[f"module.{name}"]), name
    averaged = DinoRankCLIP.from_pretrained(whole / "export_ema")
    for i, (name, p) in enumerate(averaged.named_parameters()):
        assert torch.equal(p, trained[f"average.module.{i}"]), name


def test_uneven_shards_are_told_and_the_schedule_ends_where_it_should(
    work: Path, programs: Programs
) -> None:
    """One of two processes has half as much data as the other."""
    data = write_pairs(work / "uneven", [24, 8, 24, 8], stats=True)
    command = [*arguments(work, "uneven_run", "--shuffle", "0"), "--data", data]
    processes = programs.start_all(2, command, work, ACT)
    assert finish(processes) == [0, 0], said_by(processes)
    said = processes[0].said()
    assert "uneven shards: an epoch has 2 of 4 possible steps, and leaves out 32 of 64" in said
    progress = last(work / "uneven_run").state["progress"]
    assert (progress["step"], progress["total_steps"]) == (4, 4)
    assert progress["history"]["learning_rate"][-1] == pytest.approx(5e-4)


def test_faults_of_all_processes_are_summed(work: Path, programs: Programs) -> None:
    data = write_pairs(work / "faulty", [17, 17])
    for number in (0, 1):  # one broken image in each process's shard
        path = work / "faulty" / f"{number:05d}.tar"
        path.write_bytes(path.read_bytes().replace(b"\xff\xd8\xff", b"XXX", 1))
    command = [*arguments(work, "faulty_run", "--train.epochs", "1"), "--data", data]
    processes = programs.start_all(2, command, work, ACT)
    assert finish(processes) == [0, 0], said_by(processes)
    assert 'faults in the data: {"broken image": 2}' in processes[0].said()


def test_the_whole_recipe_trains_on_features_and_is_exported(
    work: Path, programs: Programs
) -> None:
    teacher = ["--model", "vit_small_patch16_dinov3", "--random-weights", "--device", "cpu"]
    teacher += ["--model-options", '{"depth": 1, "embed_dim": 24, "num_heads": 2}', "--dim", "8"]
    shards = str(work / "data" / "{00000..00007}.tar")
    assert extract_dinov3.main([shards, *teacher, "--resolution", "64"]) == 0
    small = ACT + "recipe.SMALL_STUDENT.update(tiny.TINY_STUDENT)\n"
    features = ("--recipe", "dinorankclip", "--features", str(work / "data" / "features"))
    pairs = str(work / "heldout" / "{00000..00001}.tar")
    measured = ("--train.epochs", "1", "--augment", "--evaluation.pairs", pairs)
    command = arguments(work, "whole_recipe", *features, *measured)
    code, said = programs.run(command, work, small)
    assert code == 0, said
    assert "4 x 4 patches of 8 dimensions from 64 pixels, seen as 2 x 2" in said
    assert "also distilled: the text branch from CLS and mean patch; the image branch from" in said
    trained = DinoRankCLIP.from_pretrained(work / "whole_recipe" / "export")
    assert trained.student is not None
    transform, tokenize = build_transform(TINY_CLIP), build_tokenizer(TINY_CLIP)
    evaluator = Evaluator(EvaluationSettings(pairs=pairs), transform, tokenize, Parallel())
    reported = json.loads((work / "whole_recipe" / "results.jsonl").read_text())
    again = evaluator(trained.eval(), StopRequest())
    assert again == pytest.approx({name: reported[name] for name in again}, abs=1e-5)
    assert again.keys() | {"epoch", "step"} == reported.keys()
    history = last(work / "whole_recipe").state["progress"]["history"]
    for term in ("gram", "distance", "angle", "gate", "text_distance", "text_angle"):
        assert min(history[f"{term}_loss"]) > 0
    anchored = history["anchor_loss"]  # taken after steps 1, 2 and 3 of 4; as it was, in step 2
    assert anchored[:2] == [0, 0]
    assert min(anchored[2:]) > 0
    assert int(last(work / "whole_recipe").tensors["module.anchor.refreshes"]) == 3
    marker = work / "whole_recipe" / "settings.json"
    claimed = json.loads(marker.read_text())
    marker.write_text(json.dumps({**claimed, "teacher": {**claimed["teacher"], "dim": 9}}))
    code, said = programs.run(command, work, small)
    assert code == 2
    assert "teacher.dim: " in said


# ---------------------------------------------------------------- the command line


def test_recipes_and_overrides() -> None:
    settings = parse(["--recipe", "rankclip", "--override", "loss.HighOrderPLLoss.top_k=9"])
    recipe = settings.identity()["recipe"]
    assert recipe["loss"]["HighOrderPLLoss"]["top_k"] == 9
    assert recipe["loss"]["HighOrderPLLoss"]["order"] == 1
    assert settings.train.epochs == 30


BAD: dict[str, tuple[list[str], str]] = {
    "unknown recipe": (["--recipe", "clipp"], "clipp"),
    "no data": (["--data", ""], "no image-text shards .* pass --data 'folder/{00000..00331}.tar'"),
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
    "too few samples": (["--train.batch-size", "256"], "64 samples are fewer than one batch"),
    "too many workers": (["--workers", "30"], r"8 shards cannot feed .* \(--workers\)"),
    "no evaluation shards": (["--evaluation.pairs", "x{0..1}.tar"], "evaluation.pairs: 2 of 2"),
    "clip norm 0": (["--train.clip-norm", "0"], "clip_norm must be above 0"),
    "a negative rate": (["--train.learning-rate=-1"], "learning_rate must be at least 0"),
    "a rate that is not a number": (["--train.learning-rate", "nan"], "learning_rate"),
    "no epochs": (["--train.epochs", "0"], "epochs must be at least 1"),
    "negative workers": (["--workers=-1"], "workers must be at least 0"),
    "a model that is not there": (["--model", "ViT-Z"], "open_clip has no model 'ViT-Z'"),
    "out is a file": (["--out", "{file}"], "cannot be written to .*; choose another --out"),
    "out holds others' files": (["--out", "{others}"], "no run of this script wrote"),
}


@pytest.mark.parametrize(("given", "told"), BAD.values(), ids=BAD)
def test_bad_settings_are_told_before_anything_is_built(
    given: list[str],
    told: str,
    work: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sentence, exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("examples.cc3m.train.build_towers", None)
    (tmp_path / "file").write_text("x")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "config.yaml").write_text("x")
    places = {"{file}": str(tmp_path / "file"), "{others}": str(tmp_path / "others")}
    out = ["--out", str(tmp_path / "out")]
    data = ["--data", str(work / "data" / "{00000..00007}.tar")]
    try:
        code = main([*SMALL, *data, *out, *(places.get(x, x) for x in given)])
    except SystemExit as error:  # what the command line's parser refuses
        code = int(str(error.code))
    assert code == 2
    assert re.search(told, capfd.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out").exists()


def test_wandb_is_asked_for_only_by_flag(
    work: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(arguments(work, "whole", "--wandb")) == 2
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
        parse(["--recipe", str(tmp_path / "none.yaml")]).identity()


def test_the_commands_of_the_readme_are_the_scripts() -> None:
    """Their options exist; the third trains what the second extracts from what the first loads."""
    readme = (ROOT / "README.md").read_text()
    block = readme[readme.index("## Train on CC3M") :].split("```")[1]
    download, extract, train = [shlex.split(x) for x in block.strip().splitlines()[1:]]
    assert download[download.index("--output_folder") + 1] == "cc3m"
    _, _, script, *options = extract
    assert script == "examples.cc3m.extract_dinov3"
    assert extract_dinov3.parse(options).shards == ["cc3m/{00000..00331}.tar"]
    at = train.index("examples.cc3m.train")
    settings = parse(train[at + 1 :])
    assert (settings.data, settings.features) == (options[0], Path("cc3m/features"))
    assert settings.train.part_size(int(train[at - 2])) == 512

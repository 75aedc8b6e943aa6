"""The loop: what is optimised, saved, restored, refused, and how it stops."""

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from examples.cc3m.data.batch import Batch
from examples.cc3m.data.positions import Position, ShardOrder
from examples.cc3m.loop import Trainer
from examples.cc3m.settings import TrainSettings
from examples.cc3m.step import MAX_SCALE, NotFinite, learning_rate, parameter_groups
from examples.common.checkpoint import Checkpoints, load_checkpoint, save_tensors, whole_state
from examples.common.files import (
    SettingsChanged,
    UserError,
    claim_directory,
    locked,
    write_atomically,
)
from examples.common.parallel import running, seed_generators
from examples.common.signals import Interrupted, StopRequest
from rankloss import ClipLoss, DinoRankCLIP, HighOrderPLLoss

WIDTH, STEPS = 4, 6
SETTINGS = TrainSettings(
    epochs=2, batch_size=3, warmup_steps=2, checkpoint_steps=2, learning_rate=0.01, ema_decay=0.5
)


class Model(nn.Module):
    """Two tiny towers, one of them a channels_last convolution, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, WIDTH, 2)
        weight = self.image.weight.detach().contiguous(memory_format=torch.channels_last)
        self.image.weight = nn.Parameter(weight)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.text = nn.Embedding(20, WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        image = self.dropout(self.norm(self.image(images).flatten(1)))
        text = self.text(texts).mean(1)
        return {
            "image_features": nn.functional.normalize(image, dim=1),
            "text_features": nn.functional.normalize(text, dim=1),
            "logit_scale": self.logit_scale.exp(),
        }

    def no_weight_decay(self) -> set[str]:
        return {"text.weight"}


class Batches:
    """Stands for a ShardLoader: six batches an epoch, a function of the epoch."""

    streams, resample, order = 1, False, ShardOrder(1, 0, False)
    faults: ClassVar[dict[str, int]] = {}

    def epoch(self, position: Position) -> Iterator[Batch]:
        done = position.consumed[0] // 3 if position.consumed else 0
        generator = torch.Generator().manual_seed(position.epoch)
        for i in range(STEPS):
            images = torch.randn(3, 3, 2, 2, generator=generator)
            texts = torch.randint(0, 20, (3, 5), generator=generator)
            if i >= done:
                origins = [(0, 3 * i + k) for k in range(3)]
                yield Batch(images, texts, 0, 3 * (i + 1), origins=origins)


def towers(loss: nn.Module) -> DinoRankCLIP:
    return DinoRankCLIP(Model(), loss=loss, variant="none", embed_dim=WIDTH)


def trainer(path: Path, settings: TrainSettings = SETTINGS, order: int = 3) -> Trainer:
    seed_generators(0)
    loss = HighOrderPLLoss(WIDTH, order=order) if order else ClipLoss()
    planned = [STEPS] * settings.epochs
    return Trainer(towers(loss), Batches(), settings, planned, path)  # type: ignore[arg-type]


def test_decay_spares_vectors_and_named_parameters_and_loss_parameters() -> None:
    made = towers(HighOrderPLLoss(WIDTH, order=3))
    decayed, plain = parameter_groups(made, 0.3)
    names = {id(p): name for name, p in made.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["model.image.weight"]
    spared = {names[id(p)] for p in plain["params"]}
    assert {"model.logit_scale", "model.text.weight", "model.norm.weight"} < spared
    assert any(name.startswith("loss.") for name in spared)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 20, 8.0, 4) for step in range(21)]
    assert rates[:4] == [2.0, 4.0, 6.0, 8.0]
    assert rates[4] == 8.0
    assert rates[12] == pytest.approx(4.0)
    assert rates[20] == pytest.approx(0.0, abs=1e-12)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_every_part_is_trained_and_the_ramp_is_driven_by_epochs(tmp_path: Path) -> None:
    run = trainer(tmp_path / "checkpoint")
    before = {name: p.detach().clone() for name, p in run.towers.named_parameters()}
    factors: list[float] = []
    run.towers.loss.register_forward_hook(
        lambda module, *_: factors.append(float(module.ranking_ramp))
    )
    run.fit("test", StopRequest())
    assert run.finished
    unmoved = [n for n, p in run.towers.named_parameters() if torch.equal(p, before[n])]
    # A bias before batch normalisation has no gradient but rounding.
    assert [name for name in unmoved if name != "model.image.bias"] == []
    assert factors == [0.0] * STEPS + [2.0] * STEPS
    assert len(run.history["loss"]) == 2 * STEPS
    assert run.history["loss"][0] == pytest.approx(
        run.history["contrastive_loss"][0] + run.history["ranking_loss"][0]
    )


def assert_same(a: Path, b: Path) -> None:
    """Two runs end with the same bits: weights, optimizer, generators, and losses."""
    (one, state), (two, other) = (newest(each) for each in (a, b))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert state["progress"]["history"]["loss"] == other["progress"]["history"]["loss"]
    assert state["positions"] == other["positions"]


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found = load_checkpoint(Checkpoints(folder).paths()[-1])
    return found.tensors, found.state


@pytest.mark.parametrize("stop_at", [1, 5, STEPS, STEPS + 1])
def test_a_signal_stops_after_the_step_and_resuming_is_exact(tmp_path: Path, stop_at: int) -> None:
    whole = trainer(tmp_path / "whole")
    whole.fit("whole", StopRequest())
    run = trainer(tmp_path / "parts")
    update, calls = run.update, []

    def interrupted(parts: list[Batch]) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return update(parts)

    run.update = interrupted  # type: ignore[method-assign]
    stop = StopRequest()
    with stop.listening(), pytest.raises(Interrupted, match=f"stopped after step {stop_at} of 12"):
        run.fit("parts", stop)
    assert stop.signal_number == signal.SIGINT
    resumed = trainer(tmp_path / "parts")
    assert resumed.step == stop_at
    resumed.fit("parts", StopRequest())
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """SIGINT that is ignored (background jobs, some CI runners) has no usual effect."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_signals")
def test_a_second_ctrl_c_has_its_usual_effect_unless_it_disturbs_saving() -> None:
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt), stop.listening():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted
        stop.saving = True
        os.kill(os.getpid(), signal.SIGINT)
        stop.saving = False
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_other_signals_ask_to_stop_any_number_of_times(name: str) -> None:
    """A cluster sends one to every process, and torchrun passes it on."""
    stop, number = StopRequest(), getattr(signal, name)
    before = signal.getsignal(number)
    with stop.listening():
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert signal.getsignal(number) is before


def test_a_worker_of_torchrun_stops_when_torchrun_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    stop = StopRequest()
    assert not stop.wanted
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.wanted
    assert not StopRequest().wanted


@pytest.mark.parametrize("address", [True, False])
def test_processes_that_srun_started_find_each_other(
    monkeypatch: pytest.MonkeyPatch, address: bool
) -> None:
    """By its variables, unless it has not started the script itself."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "x")  # so that what is set below is undone
        monkeypatch.delenv(name)
    for name, value in (("PROCID", 5), ("NTASKS", 8), ("LOCALID", 1)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    if address:
        monkeypatch.setenv("MASTER_ADDR", "node0")
    joined: list[tuple[str | None, ...]] = []
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

    def join(backend: str, **_: object) -> None:
        joined.append((backend, *map(os.environ.get, names)))

    monkeypatch.setattr("torch.distributed.init_process_group", join)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    with running("cpu") as parallel:
        assert (parallel.rank, parallel.world_size) == ((5, 8) if address else (0, 1))
    assert joined == ([("gloo", "5", "8", "1", "node0", "29500")] if address else [])


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def crash(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, crash)
    assert path.read_text() == "old"
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_other_training_settings_do_not_resume(tmp_path: Path) -> None:
    run = trainer(tmp_path / "checkpoint")
    run.saved.save(run.progress, wait=True)
    trainer(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="other settings"):
        trainer(tmp_path / "checkpoint", replace(SETTINGS, learning_rate=0.5))
    with pytest.raises(UserError, match="another model"):
        trainer(tmp_path / "checkpoint", order=0)


def test_a_folder_belongs_to_its_settings(tmp_path: Path) -> None:
    """--fresh removes what a run wrote there, and nothing else."""
    run = tmp_path / "run"
    claim_directory(run, {"a": {"b": 1, "c": (2, 3)}})
    (run / "checkpoints").mkdir()
    written = [run / "checkpoints" / "step_00000001.safetensors", run / "results.jsonl"]
    others = [run / "00000.tar", run / "checkpoints" / "notes.txt"]
    for path in (*written, *others):
        path.write_text("x")
    claim_directory(run, {"a": {"b": 1, "c": [2, 3]}})
    with pytest.raises(SettingsChanged, match=r"a\.b: 1 -> 5\).*--fresh"):
        claim_directory(run, {"a": {"b": 5, "c": [2, 3]}})
    assert all(path.exists() for path in written)
    claim_directory(run, {"a": {"b": 5, "c": [2, 3]}}, fresh=True)
    assert not any(path.exists() for path in written)
    assert all(path.exists() for path in others)
    claim_directory(run, {"a": {"b": 6, "c": [2, 3]}}, changeable=["a.b"])
    assert json.loads((run / "settings_changed.jsonl").read_text()) == {"a.b": [5, 6]}
    with pytest.raises(SettingsChanged, match=r"a\.c: \[2, 3\] -> \[4\]"):
        claim_directory(run, {"a": {"b": 6, "c": [4]}}, changeable=["a.b"])


def test_a_folder_that_cannot_be_the_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "settings.json").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "others" / "checkpoints").mkdir(parents=True)
    (tmp_path / "others" / "checkpoints" / "step_1.safetensors").write_text("x")
    with pytest.raises(UserError, match=r"step_1\.safetensors, which no run of this script wrote"):
        claim_directory(tmp_path / "others", {}, fresh=True)
    for name in ("data", "file"):
        with pytest.raises(UserError, match=r"cannot be written to .*; choose another --out"):
            claim_directory(tmp_path / name, {})
    with (
        locked(tmp_path / "run"),
        pytest.raises(UserError, match="another process is writing to"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


def test_optimizer_state_keeps_the_memory_layout(tmp_path: Path) -> None:
    run = trainer(tmp_path / "checkpoint")
    run.fit("test", StopRequest())
    again = trainer(tmp_path / "checkpoint")
    weight = again.towers.get_parameter("model.image.weight")
    assert again.train_step.optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    for name, p in run.towers.named_parameters():
        restored = again.train_step.optimizer.state[again.towers.get_parameter(name)]
        for key, value in run.train_step.optimizer.state[p].items():
            assert torch.equal(restored[key], value), (name, key)


def test_the_scale_stays_within_its_bounds(tmp_path: Path) -> None:
    run = trainer(tmp_path / "checkpoint")
    batch = next(Batches().epoch(Position()))
    for start, bound in ((-5.0, 0.0), (9.0, MAX_SCALE)):
        with torch.no_grad():
            run.towers.get_parameter("model.logit_scale").fill_(start)
        run.update([batch])
        assert run.towers.get_parameter("model.logit_scale").item() == pytest.approx(bound)


def test_the_average_of_the_weights_follows_them(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    batch = next(Batches().epoch(Position()))
    name, expected = "model.text.weight", torch.zeros(())
    for i in range(4):
        spoilt = replace(batch, images=batch.images * (math.nan if i == 2 else 1))
        run.update([spoilt])
        weight = run.towers.get_parameter(name).detach()
        if i != 2:  # a step that is left out does not count
            expected = (expected + weight) / 2 if i else weight.clone()
    state = whole_state(run.towers)
    averaged = run.train_step.averaged(state)
    assert averaged.keys() == state.keys()
    assert torch.allclose(averaged[name], expected, rtol=1e-6)
    assert not torch.allclose(averaged[name], state[name], rtol=1e-3)


def test_a_step_without_a_finite_gradient_changes_nothing_and_many_stop(tmp_path: Path) -> None:
    """Neither weights nor running statistics; the samples of each such step are named."""
    run = trainer(tmp_path, replace(SETTINGS, most_skipped=2))
    batch = replace(next(Batches().epoch(Position())), keys=["a", "b", "c"])
    broken = replace(batch, images=batch.images * math.nan)
    before = {name: x.clone() for name, x in run.towers.state_dict().items()}
    assert "model.norm.running_mean" in before
    for _ in range(2):
        run.update([broken])
    with pytest.raises(NotFinite, match=r"3 steps in a row.*skipped_0\.jsonl"):
        run.update([broken])
    after = run.towers.state_dict()
    assert [name for name in after if not torch.equal(after[name], before[name])] == []
    lines = [json.loads(x) for x in (tmp_path / "skipped_0.jsonl").read_text().splitlines()]
    assert [line["keys"] for line in lines] == [["a", "b", "c"]] * 3
    assert lines[0]["terms"]["contrastive_loss"] == "nan"


def test_a_good_step_ends_the_row(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(SETTINGS, most_skipped=1))
    batch = next(Batches().epoch(Position()))
    broken = replace(batch, images=batch.images * math.inf)
    for _ in range(3):
        run.update([broken])
        run.update([batch])
    assert (run.train_step.guard.in_a_row, run.train_step.guard.total) == (0, 3)


def test_gradients_are_clipped_after_they_are_unscaled(tmp_path: Path) -> None:
    """In float16 the loss is multiplied by 65,536: clipped before that is undone, a gradient ends
    smaller than it should by as much."""
    norms = []
    for scale in (1.0, 65536.0):
        run = trainer(tmp_path / str(scale), replace(SETTINGS, clip_norm=1e-3))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        run.train_step.scaler = run.train_step.gradients.cached.scaler = scaler
        seen: list[float] = []

        def look(optimizer: torch.optim.Optimizer, *_: object, seen: list[float] = seen) -> None:
            found = [p.grad for group in optimizer.param_groups for p in group["params"]]
            seen.append(float(torch.cat([g.flatten() for g in found if g is not None]).norm()))

        run.train_step.optimizer.register_step_pre_hook(look)
        run.towers.eval()  # no dropout
        run.update([next(Batches().epoch(Position()))])
        norms += seen
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(3)}
    save_tensors(tmp_path / "file", tensors, {"x": 0.1 + 0.2})
    found = load_checkpoint(tmp_path / "file")
    assert torch.equal(found.tensors["a"], tensors["a"])
    assert found.state == {"x": 0.1 + 0.2}


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"checkpoint_steps": 0}])
def test_impossible_training_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TrainSettings(**change)  # type: ignore[arg-type]

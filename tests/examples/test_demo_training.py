"""The loop: what is optimised, saved, restored, refused, and how it stops."""

import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples.batches import Batch, Position
from examples.checkpoint import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from examples.files import SettingsChanged, UserError, claim_directory, write_atomically
from examples.towers import Towers
from examples.training import (
    MAX_SCALE,
    MAX_SKIPPED,
    Interrupted,
    StopRequest,
    Trainer,
    TrainSettings,
    learning_rate,
    parameter_groups,
)
from rankloss import ClipLoss, HighOrderPLLoss

WIDTH, STEPS = 4, 6
SETTINGS = TrainSettings(
    epochs=2, batch_size=3, warmup_steps=2, checkpoint_steps=2, learning_rate=0.01
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

    streams = 1

    def epoch(self, position: Position) -> Iterator[Batch]:
        done = position.consumed[0] // 3 if position.consumed else 0
        generator = torch.Generator().manual_seed(position.epoch)
        for i in range(STEPS):
            images = torch.randn(3, 3, 2, 2, generator=generator)
            texts = torch.randint(0, 20, (3, 5), generator=generator)
            if i >= done:
                yield Batch(images, texts, [], 0, 3 * (i + 1))


def trainer(path: Path, settings: TrainSettings = SETTINGS, order: int = 3) -> Trainer:
    torch.manual_seed(0)
    loss = HighOrderPLLoss(WIDTH, order=order) if order else ClipLoss()
    return Trainer(Towers(Model(), loss), Batches(), settings, STEPS, path)  # type: ignore[arg-type]


def test_decay_spares_vectors_and_named_parameters_and_loss_parameters() -> None:
    towers = Towers(Model(), HighOrderPLLoss(WIDTH, order=3))
    decayed, plain = parameter_groups(towers, 0.3)
    names = {id(p): name for name, p in towers.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["model.image.weight"]
    spared = {names[id(p)] for p in plain["params"]}
    assert {"model.logit_scale", "model.text.weight", "model.norm.weight"} < spared
    assert any(name.startswith("loss.") for name in spared)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    settings = TrainSettings(warmup_steps=4, learning_rate=8.0)
    rates = [learning_rate(step, 20, settings) for step in range(21)]
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
    """Two checkpoints hold the same bits: weights, optimizer, generators, and losses."""
    (one, state), (two, other) = load_tensors(a), load_tensors(b)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert state["history"]["loss"] == other["history"]["loss"]
    assert state["position"] == other["position"]


@pytest.mark.parametrize("stop_at", [1, 5, STEPS, STEPS + 1])
def test_a_signal_stops_after_the_step_and_resuming_is_exact(tmp_path: Path, stop_at: int) -> None:
    whole = trainer(tmp_path / "whole")
    whole.fit("whole", StopRequest())
    run = trainer(tmp_path / "parts")
    update, calls = run.update, []

    def interrupted(batch: Batch) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return update(batch)

    run.update = interrupted  # type: ignore[method-assign]
    stop = StopRequest()
    with stop.listening(), pytest.raises(Interrupted, match=f"stopped after step {stop_at} of 12"):
        run.fit("parts", stop)
    assert stop.signal_number == signal.SIGINT
    resumed = trainer(tmp_path / "parts")
    assert resumed.step == stop_at
    resumed.fit("parts", StopRequest())
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_the_second_signal_has_its_usual_effect() -> None:
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt), stop.listening():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
    trainer(tmp_path / "checkpoint").save()
    trainer(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="other settings"):
        trainer(tmp_path / "checkpoint", replace(SETTINGS, learning_rate=0.5))
    with pytest.raises(UserError, match="another model"):
        trainer(tmp_path / "checkpoint", order=0)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    trainer(path).save()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"checkpoint is not readable .*remove it"):
        trainer(path)


def test_a_folder_belongs_to_its_settings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim_directory(run, {"a": {"b": 1, "c": (2, 3)}})
    (run / "weights").write_text("x")
    claim_directory(run, {"a": {"b": 1, "c": [2, 3]}})
    with pytest.raises(SettingsChanged, match=r"a\.b: 1 -> 5\).*--fresh"):
        claim_directory(run, {"a": {"b": 5, "c": [2, 3]}})
    claim_directory(run, {"a": {"b": 5, "c": [2, 3]}}, fresh=True)
    assert [x.name for x in run.iterdir()] == ["settings.json"]


def test_optimizer_state_keeps_the_memory_layout(tmp_path: Path) -> None:
    run = trainer(tmp_path / "checkpoint")
    run.fit("test", StopRequest())
    again = trainer(tmp_path / "checkpoint")
    weight = again.towers.get_parameter("model.image.weight")
    assert again.optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    for name, p in run.towers.named_parameters():
        restored = again.optimizer.state[again.towers.get_parameter(name)]
        for key, value in run.optimizer.state[p].items():
            assert torch.equal(restored[key], value), (name, key)


def test_the_scale_stays_within_its_bounds(tmp_path: Path) -> None:
    run = trainer(tmp_path / "checkpoint")
    batch = next(Batches().epoch(Position()))
    for start, bound in ((-5.0, 0.0), (9.0, MAX_SCALE)):
        with torch.no_grad():
            run.towers.get_parameter("model.logit_scale").fill_(start)
        run.update(batch)
        assert run.towers.get_parameter("model.logit_scale").item() == pytest.approx(bound)


def test_a_step_without_a_finite_gradient_changes_nothing_and_many_stop(tmp_path: Path) -> None:
    run = trainer(tmp_path / "checkpoint")
    batch = next(Batches().epoch(Position()))
    broken = replace(batch, images=batch.images * math.nan)
    before = {name: p.detach().clone() for name, p in run.towers.named_parameters()}
    for _ in range(MAX_SKIPPED):
        run.update(broken)
    with pytest.raises(FloatingPointError, match="11 steps in a row"):
        run.update(broken)
    assert all(torch.equal(p, before[name]) for name, p in run.towers.named_parameters())


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(3)}
    save_tensors(tmp_path / "file", tensors, {"x": 0.1 + 0.2})
    loaded, state = load_tensors(tmp_path / "file")
    assert torch.equal(loaded["a"], tensors["a"])
    assert state == {"x": 0.1 + 0.2}


def test_a_checkpoint_restores_the_random_generator(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path / "file", model, optimizer, {})
    expected = torch.rand(3)
    load_checkpoint(tmp_path / "file", model, optimizer)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"checkpoint_steps": 0}])
def test_impossible_training_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TrainSettings(**change)  # type: ignore[arg-type]

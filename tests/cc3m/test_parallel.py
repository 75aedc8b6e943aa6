"""Several processes, or a batch in parts, must train as one process with the whole batch does."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.cc3m.data.batch import Batch
from examples.cc3m.data.features import Features
from examples.cc3m.data.positions import Position, ShardOrder
from examples.cc3m.distilled import DistilledCLIP
from examples.cc3m.loop import Trainer
from examples.cc3m.monitor import Clock
from examples.cc3m.recipe import build_towers, load_recipe
from examples.cc3m.settings import TrainSettings
from examples.cc3m.step import Gradients, TrainStep
from examples.common.checkpoint import Checkpoint, Checkpoints
from examples.common.files import UserError
from examples.common.parallel import Parallel, distribute, running
from examples.common.signals import Interrupted, StopRequest
from rankloss import DinoRankCLIP
from tests.helpers.processes import ProcessGroup

PAIRS, STEPS, IMAGE, WORDS = 8, 3, 32, 8
VIT: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {
        "layers": 2,
        "width": 16,
        "head_width": 8,
        "image_size": IMAGE,
        "patch_size": 16,
    },
    "text_cfg": {"context_length": WORDS, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
}
STUDENT: dict[str, Any] = {
    "token_dim": 8,
    "image_options": {"embed_dim": 12, "depth": 1, "num_heads": 1},
    "text_options": {"width": 8, "depth": 1, "heads": 1},
}


def towers(recipe: str, dtype: torch.dtype = torch.float64) -> DinoRankCLIP:
    torch.manual_seed(0)
    loaded = load_recipe(recipe)
    built = build_towers(loaded, VIT, STUDENT).to(dtype)
    for name, parameter in built.loss.named_parameters():
        if "key" in name:  # they start at zero, where nothing reaches the other tables
            nn.init.normal_(parameter, std=0.3)
    if isinstance(built, DistilledCLIP):
        take_anchor(built)
    return built


def take_anchor(module: DistilledCLIP) -> None:
    """Let a model of which no step was done have an anchor: other weights than the student's."""
    assert module.anchor is not None
    module.anchor.refreshes += 1
    for parameter in module.anchor.parameters():
        nn.init.normal_(parameter, std=0.3)


def batch(seed: int = 1, pairs: int = PAIRS, dtype: torch.dtype = torch.float64) -> Batch:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(pairs, 3, IMAGE, IMAGE, generator=g, dtype=torch.float64).to(dtype)
    texts = torch.randint(1, 49, (pairs, WORDS), generator=g)
    texts[:, -1] = 49  # the largest id ends a text
    teacher = Features(*(torch.randn(pairs, *x, generator=g).to(dtype) for x in ((4, 6), (5,))))
    keys = [f"{seed}-{i}" for i in range(pairs)]
    return Batch(images, texts, 0, 0, keys=keys, teacher=teacher)


def seen_by(recipe: str, whole: Batch) -> Batch:
    """Return the batch with the views and captions that the recipe takes."""
    if recipe == "ito":
        return replace(whole, images=torch.stack([whole.images, whole.images.flip(3)], 1))
    if recipe == "alip":
        return replace(whole, texts=torch.stack([whole.texts, whole.texts.roll(1, 0)], 1))
    return whole


def pieces(whole: Batch, parts: int) -> list[Batch]:
    n = len(whole.images) // parts
    assert whole.teacher is not None
    return [
        replace(
            whole,
            images=whole.images[i * n : (i + 1) * n],
            texts=whole.texts[i * n : (i + 1) * n],
            keys=whole.keys[i * n : (i + 1) * n],
            teacher=Features(*(x[i * n : (i + 1) * n] for x in whole.teacher)),
        )
        for i in range(parts)
    ]


def gradients(
    module: DinoRankCLIP, parts: list[Batch], sharding: str | None = None
) -> dict[str, Tensor]:
    """After the processes have shared them; of whole parameters."""
    parallel = Parallel()
    if sharding is not None:
        parallel = Parallel(dist.get_rank(), dist.get_world_size())
    scaler, clock = torch.amp.GradScaler("cpu", enabled=False), Clock(torch.device("cpu"))
    settings = TrainSettings(sharding=sharding or "ddp")  # type: ignore[arg-type]
    Gradients(module, settings, parallel, scaler, clock)(parts)
    found = {}
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    for name, p in trained:
        assert p.grad is not None, name
        whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name] = whole.detach().clone()
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = float((actual[name].reshape(value.shape) - value).abs().max())
        assert error <= 1e-12 + 1e-9 * float(value.abs().max()), f"{name} is off by {error:.3g}"


RECIPES = ("clip", "siglip", "cyclip", "highorder_r3")


# ---------------------------------------------------------------- parts of a batch


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_have_the_gradient_of_the_whole(recipe: str, parts: int) -> None:
    expected = gradients(towers(recipe), [batch()])
    assert all(float(g.abs().max()) > 0 for n, g in expected.items() if "bias" not in n)
    assert_close(gradients(towers(recipe), pieces(batch(), parts)), expected)


def test_summing_the_parts_gradients_would_be_wrong() -> None:
    expected = gradients(towers("clip"), [batch()])
    of_parts = [gradients(towers("clip"), [part]) for part in pieces(batch(), 2)]
    name = "model.visual.proj"
    mean = (of_parts[0][name] + of_parts[1][name]) / 2
    assert float((mean - expected[name]).abs().max()) > 0.01 * float(expected[name].abs().max())


def test_parts_see_the_same_noise_twice() -> None:
    """Dropout of the second encoding is that of the first: else the gradient is of other data."""
    module = towers("clip")
    seen: list[Tensor] = []

    def note(_: nn.Module, __: object, output: Tensor) -> Tensor:
        dropped = nn.functional.dropout(output, 0.5)
        seen.append(dropped.detach())
        return dropped

    module.model.get_submodule("visual").register_forward_hook(note)
    torch.manual_seed(3)
    gradients(module, pieces(batch(), 2))
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
@pytest.mark.parametrize("parts", [1, 2])
def test_how_the_model_is_computed_does_not_change_the_gradient(how: str, parts: int) -> None:
    expected = gradients(towers("highorder_r3"), pieces(batch(), parts))
    module = towers("highorder_r3")
    if how == "compiled":
        torch.compiler.reset()
        module.model.compile(backend="aot_eager")
    else:
        prepare: Any = module.model.set_grad_checkpointing
        prepare(True)
    assert_close(gradients(module, pieces(batch(), parts)), expected)


def test_the_loss_scale_of_float16_is_resumed(tmp_path: Path) -> None:
    """It halves at each overflow, which float16 has at first, and is saved like all else."""
    settings: dict[str, Any] = {"precision": "amp_fp16", "epochs": 2}
    first = trainer(str(tmp_path / "parts"), **settings)
    first.train_step.scaler.load_state_dict(
        {**first.train_step.scaler.state_dict(), "scale": 2.0**40}
    )  # overflows
    stop, update = StopRequest(), first.update

    def stopping(parts: list[Batch]) -> dict[str, Tensor]:
        stop.signal_number = 15
        return update(parts)

    first.update = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        first.fit("test", stop)
    again = trainer(str(tmp_path / "parts"), **settings)
    assert first.train_step.guard.total == 1
    assert again.train_step.scaler.get_scale() == first.train_step.scaler.get_scale() == 2.0**39
    assert again.train_step.guard.total == 1


def test_epochs_of_endless_data_have_the_planned_number_of_steps(tmp_path: Path) -> None:
    run = trainer(str(tmp_path), count=1000)
    run.loader.resample = True
    epochs: list[int] = []

    def after_epoch(trainer: Trainer) -> bool:
        epochs.append(trainer.step)
        return True

    run.fit("test", StopRequest(), after_epoch)
    assert epochs == [STEPS, 2 * STEPS]
    assert run.progress.evaluated == 2


# ---------------------------------------------------------------- processes


def share_of(whole: Batch, parts: int = 1) -> list[Batch]:
    mine = pieces(whole, dist.get_world_size())[dist.get_rank()]
    return pieces(mine, parts)


def gradients_of_a_share(recipe: str, sharding: str, parts: int) -> dict[str, Tensor]:
    return gradients(towers(recipe), share_of(seen_by(recipe, batch()), parts), sharding)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recipe", ["siglip", "dinorankclip", "alip", "ito"])
def test_processes_have_the_gradient_of_one(
    two: ProcessGroup, recipe: str, sharding: str, parts: int
) -> None:
    """DinoRankCLIP, scale and loss heads alike."""
    expected = gradients(towers(recipe), [seen_by(recipe, batch())])
    for actual in two.run(gradients_of_a_share, recipe, sharding, parts):
        assert_close(actual, expected)


def trained_after_sharding() -> list[str]:
    module = towers("clip")
    lock: Any = module.model.lock_image_tower
    lock()
    parallel = Parallel(dist.get_rank(), dist.get_world_size())
    distribute(module, parallel, "fsdp2")
    return [name for name, p in module.named_parameters() if p.requires_grad]


def test_sharding_leaves_a_locked_tower_locked(two: ProcessGroup) -> None:
    """Its convolution too, whose memory layout sharding changes."""
    for trained in two.run(trained_after_sharding):
        assert "model.token_embedding.weight" in trained
        assert [name for name in trained if name.startswith("model.visual.")] == []


class Batches:
    """Stands for a ShardLoader whose processes have unequal numbers of batches."""

    streams, resample = 1, False

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.order = count, size, ShardOrder(4, 0, False)
        self.faults: dict[str, int] = {}

    def epoch(self, position: Position) -> Iterator[Batch]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        done = position.consumed[0] // self.size if position.consumed else 0
        for i in range(done, self.count):
            origins = [(rank, i * self.size + k) for k in range(self.size)]
            seed = 100 * position.epoch + 10 * i + rank
            yield replace(
                batch(seed, self.size, torch.float32), consumed=(i + 1) * self.size, origins=origins
            )


def trainer(
    folder: str, count: int = STEPS, recipe: str = "highorder_r3", **settings: Any
) -> Trainer:
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    chosen = TrainSettings(
        **{"epochs": 2, "batch_size": PAIRS, "warmup_steps": 2, "learning_rate": 0.01, **settings}
    )
    module = towers(recipe, torch.float32)
    torch.manual_seed(rank)
    loader = Batches(count * chosen.accumulate, chosen.part_size(world))
    parallel = Parallel(rank, world)
    planned = [STEPS] * chosen.epochs
    return Trainer(module, loader, chosen, planned, Path(folder), parallel)  # type: ignore[arg-type]


def losses_and_weights(run: Trainer) -> tuple[list[float], dict[str, Tensor]]:
    whole = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in run.towers.named_parameters()
    }
    average = run.train_step.averaged({}, everywhere=True)
    return run.history["loss"], whole | {f"average.{k}": v for k, v in average.items()}


def train(folder: str, settings: dict[str, Any], stop_after: int = 0) -> Any:
    """To the end, or as far as a signal to the second process allows."""
    run, stop = trainer(folder, **settings), StopRequest()
    update = run.update

    def stopping(parts: list[Batch]) -> dict[str, Tensor]:
        if run.step + 1 == stop_after and dist.get_rank() == 1:
            stop.signal_number = 15
        return update(parts)

    run.update = stopping  # type: ignore[method-assign]
    try:
        run.fit("test", stop)
    except Interrupted as error:
        return str(error)
    return losses_and_weights(run)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2, "precision": "amp_bf16"},
        {"sharding": "fsdp2", "ema_decay": 0.9},
        {"sharding": "fsdp2", "recipe": "dinorankclip"},
    ],
    ids=["ddp", "parts in bf16", "fsdp2", "an anchor, fsdp2"],
)
def test_processes_stop_together_and_resume_exactly(
    two: ProcessGroup, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """A signal to one stops all after the same step; then losses and weights are bit for bit
    those of a run that nobody stopped, and the same in every process."""
    whole = two.run(train, str(tmp_path / "whole"), settings)
    stopped = two.run(train, str(tmp_path / "parts"), settings, 4)
    assert stopped == ["stopped after step 4 of 6"] * 2
    resumed = two.run(train, str(tmp_path / "parts"), settings)
    assert len(whole[0][0]) == 2 * STEPS
    for losses, weights in (*whole[1:], *resumed):
        assert losses == whole[0][0]
        for name, value in weights.items():
            assert torch.equal(value, whole[0][1][name]), name


def spoil(module: nn.Module) -> None:
    """Change the weights that the second process holds, whole ones or its shard."""
    if dist.get_rank() == 1:
        weight: Any = next(p for p in module.parameters() if p.dim() == 2)
        with torch.no_grad():
            getattr(weight, "_local_tensor", weight).mul_(2)


def complaint_about_other_weights(folder: str, sharding: str, restored: bool) -> str:
    """Weights of one process differ when they are built, or after the checkpoint was read."""
    if restored:
        run = trainer(folder, sharding=sharding)
        run.saved.save(run.progress, wait=True)
    restore, build = TrainStep.restore, towers

    def spoilt_restore(step: TrainStep, found: Checkpoint) -> None:
        restore(step, found)
        spoil(step.towers)

    def spoilt_towers(*arguments: Any) -> DinoRankCLIP:
        made = build(*arguments)
        spoil(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        if restored:
            patch.setattr(TrainStep, "restore", spoilt_restore)
        else:
            patch.setitem(globals(), "towers", spoilt_towers)
        with pytest.raises(UserError) as caught:
            trainer(folder, sharding=sharding)
    return str(caught.value)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_processes_with_other_weights_are_told_apart(
    two: ProcessGroup, tmp_path: Path, sharding: str, restored: bool
) -> None:
    """Each holds a part of sharded parameters, which must be one of what it built or read."""
    for told in two.run(complaint_about_other_weights, str(tmp_path), sharding, restored):
        assert "processes differ in step or weights" in told


def count_steps(folder: str) -> tuple[int, list[float]]:
    """Steps, and the running statistics that are evaluated, which each process has of its own."""
    rank, seen = dist.get_rank(), []
    run = trainer(folder, count=2 + 3 * rank, epochs=1)
    run.towers.register_buffer("statistics", torch.zeros(()), persistent=False)
    update = run.update

    def unlike(parts: list[Batch]) -> dict[str, Tensor]:
        found = update(parts)
        run.towers.get_buffer("statistics").fill_(rank + 1.0)
        return found

    run.update = unlike  # type: ignore[method-assign]

    def evaluate(run: Trainer) -> bool:
        seen.append(float(run.towers.get_buffer("statistics")))
        return True

    run.fit("test", StopRequest(), evaluate)
    return run.step, seen


def test_every_process_takes_as_many_steps_as_the_one_with_least_data(
    two: ProcessGroup, tmp_path: Path
) -> None:
    """And evaluates with the first one's statistics."""
    assert two.run(count_steps, str(tmp_path)) == [(2, [1.0])] * 2


def one_bad_process(folder: str) -> tuple[int, bool]:
    run = trainer(folder)
    before = {name: p.detach().clone() for name, p in run.towers.named_parameters()}
    (part,) = share_of(batch(dtype=torch.float32))
    if dist.get_rank() == 1:
        part = replace(part, images=part.images * torch.nan)
    run.towers.train()
    run.update([part])
    same = all(torch.equal(p, before[name]) for name, p in run.towers.named_parameters())
    return run.train_step.guard.in_a_row, same


def test_a_bad_batch_in_one_process_is_left_out_in_all(two: ProcessGroup, tmp_path: Path) -> None:
    assert two.run(one_bad_process, str(tmp_path)) == [(1, True)] * 2
    keys = [json.loads((tmp_path / f"skipped_{r}.jsonl").read_text())["keys"] for r in (0, 1)]
    assert keys == [[f"1-{i}" for i in range(4)], [f"1-{i}" for i in range(4, 8)]]


def infinite_term(folder: str) -> tuple[int, bool, bool]:
    """A term of one process is infinite, while every gradient of every process is finite."""
    run = trainer(folder)
    (part,) = share_of(batch(dtype=torch.float32))
    before = {name: p.detach().clone() for name, p in run.towers.named_parameters()}
    objective = run.towers.objective

    def with_a_constant(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        constant = torch.tensor(torch.inf if dist.get_rank() == 1 else 0.0)
        return {**objective(*arguments, **options), "constant_loss": constant}

    run.towers.objective = with_a_constant  # type: ignore[method-assign]
    finite: list[bool] = []
    apply = run.train_step._apply_gradients

    def looking(*arguments: Any) -> bool:
        gradients = [p.grad for p in run.towers.parameters() if p.grad is not None]
        finite.extend(bool(gradient.isfinite().all()) for gradient in gradients)
        return apply(*arguments)

    run.train_step._apply_gradients = looking  # type: ignore[method-assign, assignment]
    run.towers.train()
    run.update([part])
    same = all(torch.equal(p, before[name]) for name, p in run.towers.named_parameters())
    return run.train_step.guard.in_a_row, same, bool(finite) and all(finite)


def test_a_term_that_is_infinite_in_one_process_skips_the_step_in_all(
    two: ProcessGroup, tmp_path: Path
) -> None:
    assert two.run(infinite_term, str(tmp_path)) == [(1, True, True)] * 2


def first_batch_of_a_run(folder: str, stop_after: int) -> tuple[list[str], str, list[float]]:
    """Keys of the first batch trained on, samples taken, a random number a step and one after."""
    run, stop = trainer(folder, epochs=1), StopRequest()
    keys: list[str] = []
    drawn: list[float] = []
    update = run.update

    def noting(parts: list[Batch]) -> dict[str, Tensor]:
        keys.extend(parts[0].keys if not keys else [])
        drawn.append(float(torch.rand(())))
        stop.signal_number = 15 if run.step + 1 == stop_after else None
        return update(parts)

    run.update = noting  # type: ignore[method-assign]
    rank, epoch = dist.get_rank(), run.loader.epoch

    def unequal(position: Position | None = None) -> Iterator[Batch]:
        """The second process takes a batch more at a time from its stream than it trains on."""
        for each in epoch(position):
            yield replace(each, consumed=each.consumed + rank * PAIRS // 2)

    run.loader.epoch = unequal  # type: ignore[method-assign]
    with contextlib.suppress(Interrupted):
        run.fit("test", stop)
    return keys, str(run.progress.position.consumed), [*drawn, float(torch.rand(()))]


def test_each_process_resumes_at_its_own_position(two: ProcessGroup, tmp_path: Path) -> None:
    """In its data, and in its random numbers."""
    first = two.run(first_batch_of_a_run, str(tmp_path), 1)
    assert [consumed for _, consumed, _ in first] == ["(4,)", "(8,)"]
    second = two.run(first_batch_of_a_run, str(tmp_path), 2)
    assert [keys[0] for keys, _, _ in second] == ["10-0", "21-0"]  # the second batch, the third
    draws = [drawn[-1] for _, _, drawn in first]
    assert draws[0] != draws[1]
    assert [drawn[0] for _, _, drawn in second] == draws


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_another_number_of_processes_goes_on(
    two: ProcessGroup, tmp_path: Path, sharding: str
) -> None:
    """With the same weights and step, and without the samples that were taken."""
    settings: dict[str, Any] = {"sharding": sharding}
    two.run(train, str(tmp_path), settings, 2)
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    run = trainer(str(tmp_path), **settings)
    assert run.step == 2
    half = (1 << PAIRS) - 1  # of two steps of half a batch each, in the shard of its rank
    assert run.progress.position == Position(0, before={0: half, 1: half})
    for name, p in run.towers.named_parameters():
        assert torch.equal(p.reshape(-1), found.tensors[f"module.{name}"].reshape(-1)), name
    run.fit("test", StopRequest())
    assert run.finished


# ---------------------------------------------------------------- settings


def test_a_batch_too_small_for_the_processes_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"among 8 processes .*; choose a multiple of 40 from 80 on"
    ):
        TrainSettings(batch_size=64, accumulate=5).part_size(8)
    with pytest.raises(UserError, match="at least 2 pairs; choose a multiple of 64 from 128 on"):
        TrainSettings(batch_size=64).part_size(64)
    assert TrainSettings(batch_size=64, accumulate=2).part_size(8) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"process 0 .* has no GPU \(0 found\)"), running("cuda"):
        pass
    with running("auto") as parallel:
        assert parallel.device.type == "cpu"

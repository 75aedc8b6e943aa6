"""Checkpoints: numbered, whole or absent, never unpickled, and all that a resume needs."""

import json
import logging
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples.common.checkpoint import (
    Checkpoints,
    load_checkpoint,
    restore_training,
    training_tensors,
)
from examples.common.files import UserError
from examples.common.parallel import generator_states, restore_generators
from rankloss import GramAnchor

ROOT = Path(__file__).resolve().parents[2]


def tensors(value: float) -> dict[str, Tensor]:
    return {"x": torch.full((3,), value)}


def test_the_last_k_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path / "run", keep=2)
    assert there.latest() is None
    for step in (5, 10, 15):
        there.save(step, tensors(step), {"step": step})
    names = [path.name for path in there.paths()]
    assert names == ["step_00000010.safetensors", "step_00000015.safetensors"]
    found = there.latest()
    assert found is not None
    assert (found.state, found.tensors["x"].tolist()) == ({"step": 15}, [15.0] * 3)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_a_torn_newest_falls_back_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    there = Checkpoints(tmp_path)
    there.save(1, tensors(1), {"step": 1})
    path = there.save(2, tensors(2), {"step": 2})
    data = {"cut": path.read_bytes()[:-5], "empty": b"", "garbage": b"x" * 500}[damage]
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = there.latest()
    assert found is not None
    assert found.state == {"step": 1}
    assert "step_00000002.safetensors is not readable" in caplog.text
    assert "going on from step_00000001.safetensors" in caplog.text


def test_a_byte_that_changed_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there = Checkpoints(tmp_path)
    there.save(1, tensors(1), {"step": 1})
    path = there.save(2, tensors(2), {"step": 2})
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    found = there.latest()
    assert found is not None
    assert found.state == {"step": 1}
    assert "its checksum differs" in caplog.text


def test_some_checkpoints_are_kept_for_good(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path, keep=1)
    for step in range(1, 6):
        there.save(step, tensors(step), {}, for_good=step % 2 == 0)
    names = [path.stem for path in there.paths()]
    assert names == ["step_00000002_kept", "step_00000004_kept", "step_00000005"]


def test_what_cannot_be_written_later_is_told_at_the_next_occasion(tmp_path: Path) -> None:
    """Writing goes on beside training; the file is that of the moment it was asked for."""
    there = Checkpoints(tmp_path)
    there.save_later(1, tensors(1), {"step": 1})
    there.wait()
    assert [path.stem for path in there.paths()] == ["step_00000001"]
    (tmp_path / "file").write_text("x")
    broken = Checkpoints(tmp_path / "file")
    broken.save_later(2, tensors(2), {})
    with pytest.raises(UserError, match=r"could not write .*Make room on that disk"):
        broken.save_later(3, tensors(3), {})


@pytest.mark.skipif(os.name == "nt", reason="no such modes")
def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = Checkpoints(tmp_path).save(1, tensors(1), {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path)
    there.save(1, tensors(1), {}).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: .*step_00000001"):
        there.latest()


FULL_DISK = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch
from examples.common.checkpoint import Checkpoints
from examples.common.files import UserError
there = Checkpoints(Path(sys.argv[1]))
there.save(1, {{"x": torch.ones(3)}}, {{"step": 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    there.save(2, {{"x": torch.ones(100_000)}}, {{"step": 2}})
except UserError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_what_happened(tmp_path: Path) -> None:
    """Writing past a limit fails as on a full disk, in a process of its own."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "could not write the checkpoint" in result.stdout
    assert "step_00000001.safetensors. Make room on that disk" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.safetensors"]
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    assert found.state == {"step": 1}


def test_the_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)

        def noted(*args: object, plain: object = plain, name: str = name) -> object:
            events.append(name)
            return plain(*args)  # type: ignore[operator]

        monkeypatch.setattr(f"examples.common.files.os.{name}", noted)
    Checkpoints(tmp_path).save(1, tensors(1), {})
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "harm"),)

    path = tmp_path / "step_00000001.safetensors"
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="not readable"):
        load_checkpoint(path)
    assert not (tmp_path / "harm").exists()
    sources = [path.read_text() for path in (ROOT / "examples").rglob("*.py")]
    assert not [text for text in sources if "torch.load(" in text or "import pickle" in text]


def test_the_state_is_json(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(1, tensors(1), {"a": [0.1 + 0.2, None]})
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert json.loads(header["__metadata__"]["state"]) == {"a": [0.1 + 0.2, None]}


# ---------------------------------------------------------------- modules and optimizers


def model(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return module, torch.optim.AdamW(module.parameters(), fused=True)


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.autograd.backward(module(torch.randn(5, 3)).square().sum())
    optimizer.step()
    optimizer.zero_grad()


def test_training_goes_on_exactly(tmp_path: Path) -> None:
    module, optimizer = model()
    step(module, optimizer)
    saved = training_tensors(module, optimizer)
    Checkpoints(tmp_path).save(1, saved, {})
    other, fresh = model(seed=1)
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    restore_training(other, fresh, found)
    for each in (module, optimizer), (other, fresh):
        torch.manual_seed(7)
        step(*each)
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_gram_anchor_goes_on_exactly(tmp_path: Path) -> None:
    """Its weights and the number of its refreshes are part of the module that owns it."""
    saved, fresh = (nn.ModuleDict({"student": nn.Linear(3, 3)}) for _ in range(2))
    anchor = GramAnchor(nn.Linear(3, 3), first_update=0, every=1)
    saved["anchor"] = anchor
    fresh["anchor"] = GramAnchor(nn.Linear(3, 3), first_update=0, every=1)
    assert anchor.update(0, saved["student"])
    optimizer = torch.optim.AdamW(saved["student"].parameters())
    Checkpoints(tmp_path).save(1, training_tensors(saved, optimizer), {})
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    restore_training(fresh, torch.optim.AdamW(fresh["student"].parameters()), found)
    restored = fresh["anchor"].state_dict()
    assert int(restored["refreshes"]) == 1
    for name, value in anchor.state_dict().items():
        assert torch.equal(value, restored[name]), name


def test_another_model_is_refused(tmp_path: Path) -> None:
    module, optimizer = model()
    Checkpoints(tmp_path).save(1, training_tensors(module, optimizer), {})
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    for other in (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), nn.Linear(3, 4)):
        with pytest.raises(UserError, match="belongs to another model"):
            restore_training(other, torch.optim.AdamW(other.parameters()), found)


# ---------------------------------------------------------------- random generators


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
        float(torch.rand(())),
    ]


@pytest.mark.parametrize("drawn", [0, 1])
def test_generators_go_on_where_they_stood(drawn: int) -> None:
    """Also between the two normal numbers that are made at a time."""
    for _ in range(drawn):
        draw()
    states = generator_states()
    expected = [draw() for _ in range(3)]
    restore_generators(states)
    assert [draw() for _ in range(3)] == expected
    assert all(isinstance(value, Tensor) for value in states.values())

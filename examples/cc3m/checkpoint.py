"""Training runs in safetensors files: tensors by name, everything else as JSON in their headers.

Nothing is unpickled on loading. A file is written under a temporary name, flushed to disk and
renamed, so that a run killed at any moment finds its last whole checkpoint.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from examples.cc3m.files import UserError, write_atomically

LOG = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """What `Checkpoints.save` was given, and where it is."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The last checkpoints of a run, in a folder: step_00000100.safetensors, ...

    Args:
        folder: made when the first one is saved.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted(self.folder.glob("step_*.safetensors"))

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove those before the last `keep`.

        Raises:
            UserError: it cannot be written, for example because the disk is full; the ones before
                are untouched.
        """
        path = self.folder / f"step_{step:08d}.safetensors"
        try:
            save_tensors(path, tensors, state)
        except (OSError, SafetensorError) as error:
            there = [each for each in self.paths() if each != path]
            last = f"the last whole one is {there[-1]}" if there else "there is none before it"
            raise UserError(
                f"could not write the checkpoint {path} ({error}); {last}. Make room on that disk, "
                "then run the same command to go on from there"
            ) from error
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> Checkpoint | None:
        """The newest that is whole; logs which newer ones are not. None if there is none at all.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        torn: list[str] = []
        for path in reversed(self.paths()):
            try:
                found = Checkpoint(path, *load_tensors(path))
            except UserError as error:
                torn.append(str(error))
                continue
            for message in torn:
                LOG.warning("%s; going on from %s", message, path.name)
            return found
        if torn:
            raise UserError(f"no checkpoint in {self.folder} is whole: {'; '.join(torn)}")
        return None


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers on the processor, put together from all processes if sharded."""
    return {name: _whole(value) for name, value in module.state_dict().items()}


def training_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's state, by name. Every process must take part if the
    parameters are sharded."""
    tensors = {f"module.{name}": value for name, value in whole_state(module).items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = _whole(value)
    return tensors


def restore_training(
    module: nn.Module, optimizer: torch.optim.Optimizer, found: Checkpoint
) -> None:
    """Put back what `training_tensors` gave, into sharded parameters too.

    Raises:
        UserError: the checkpoint is of another model.
    """
    weights, there = strip(found.tensors, "module."), module.state_dict()
    wrong = sorted(weights.keys() ^ there.keys())
    wrong += [k for k in weights.keys() & there.keys() if weights[k].numel() != there[k].numel()]
    if wrong:
        raise UserError(
            f"{found.path} belongs to another model (different {wrong[0]}, {len(wrong)} in all); "
            "choose another folder for this run, or remove it to start over"
        )
    with torch.no_grad():
        for name, value in there.items():
            value.copy_(_like(value, weights[name]))
    slots = strip(found.tensors, "optimizer.")
    for name, parameter in module.named_parameters():
        values = strip(slots, f"{name}.")
        if values:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key == "step" else _like(parameter, value)
                for key, value in values.items()
            }


def save_tensors(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Atomically write named tensors and a JSON-able dictionary."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = {"state": json.dumps(state)}
    write_atomically(path, lambda temporary: save_file(whole, temporary, metadata=header))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote.

    Raises:
        UserError: the file is damaged, or another program wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors' own error class, KeyError, JSONDecodeError, ...
        raise UserError(f"{path} is not readable ({error}); remove it to start over") from error


def strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _whole(value: Tensor) -> Tensor:
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().cpu()


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """In a parameter's shape, memory layout and shards, which fused optimizers want of a state."""
    value = value.reshape(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)

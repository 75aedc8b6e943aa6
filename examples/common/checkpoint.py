"""Training runs in safetensors files: tensors by name, everything else as JSON in their headers.

Nothing is unpickled on loading (which is why torch.distributed.checkpoint gathers and shards the
state here, but its own files, whose index is a pickle, are not used). A file has a checksum, is
written under a temporary name, flushed to disk and renamed: a run killed at any moment finds its
last whole checkpoint.
"""

from __future__ import annotations

import json
import logging
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from examples.common.files import UserError, write_atomically

LOG = logging.getLogger(__name__)
IN_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)
IN_EACH = StateDictOptions(full_state_dict=True)


class Checkpoint(NamedTuple):
    """Contents of a file, and where it is."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    checksum: int


class Checkpoints:
    """The last checkpoints of a run, in a folder: step_00000100.safetensors, ...

    Args:
        folder: made when the first one is saved.
        keep: how many stay, besides those that are saved for good.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None

    def paths(self) -> list[Path]:
        """Return the files from the oldest to the newest."""
        return sorted(self.folder.glob("step_*.safetensors"))

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        *,
        for_good: bool = False,
    ) -> Path:
        """Write a checkpoint, then remove those before the last `keep`.

        Args:
            step: after which it was made.
            tensors, state: its contents; the state is JSON-able.
            for_good: never remove it.

        Raises:
            UserError: it cannot be written, for example because the disk is full; the ones before
                are untouched.
        """
        path = self.folder / f"step_{step:08d}{'_kept' * for_good}.safetensors"
        try:
            save_tensors(path, tensors, state)
        except (OSError, SafetensorError) as error:
            there = [each for each in self.paths() if each != path]
            last = f"the last whole one is {there[-1]}" if there else "there is none before it"
            raise UserError(
                f"could not write the checkpoint {path} ({error}); {last}. Make room on that disk, "
                "then run the same command to go on from there"
            ) from error
        passing = [each for each in self.paths() if not each.stem.endswith("_kept")]
        for old in passing[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def save_later(self, *contents: Any, for_good: bool = False) -> None:
        """Write a checkpoint as `save` does, while training goes on; its tensors must be copies.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        self._writing = self._writer.submit(self.save, *contents, for_good=for_good)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def latest(self) -> Checkpoint | None:
        """Return the newest that is whole; log which newer ones are not. None if there is none.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        torn: list[str] = []
        for path in reversed(self.paths()):
            try:
                found = load_checkpoint(path)
            except UserError as error:
                torn.append(str(error))
                continue
            for message in torn:
                LOG.warning("%s; going on from %s", message, path.name)
            return found
        if torn:
            raise UserError(f"no checkpoint in {self.folder} is whole: {'; '.join(torn)}")
        return None


def save_tensors(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Atomically write named tensors and a JSON-able dictionary, with a checksum of both."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(state)
    header = {"state": text, "checksum": str(checksum(whole, text))}
    write_atomically(path, lambda temporary: save_file(whole, temporary, metadata=header))


def load_checkpoint(path: Path) -> Checkpoint:
    """Return what `save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, is damaged, or another program wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text, expected = header["state"], int(header["checksum"])
        state = json.loads(text)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors' own error class, OSError, KeyError, ...
        raise UserError(f"{path} is not readable ({error})") from error
    if checksum(tensors, text) != expected:
        raise UserError(f"{path} is not readable (its checksum differs: bytes have changed)")
    return Checkpoint(path, tensors, state, expected)


def checksum(tensors: dict[str, Tensor], text: str = "") -> int:
    """Return the CRC-32 of a text and of contiguous tensors on the CPU, with their names."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        flat = tensors[name].reshape(-1)
        if flat.numel():
            value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value


# ---------------------------------------------------------------- modules and optimizers


def whole_state(module: nn.Module, *, everywhere: bool = False) -> dict[str, Tensor]:
    """Gather weights and buffers, copied: on the CPU of the first process, {} in the others.

    Args:
        module: sharded or copied among the processes, all of which must take part.
        everywhere: in every process, on its own device.
    """
    state: Any = get_model_state_dict(module, options=IN_EACH if everywhere else IN_FIRST)
    return {name: value.clone() for name, value in state.items()}


def training_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Gather weights, buffers and the optimizer's state, by name, as `whole_state` does."""
    tensors = {f"module.{name}": value for name, value in whole_state(module).items()}
    if optimizer.state:  # else asking for it would make one
        slots: Any = get_optimizer_state_dict(module, optimizer, options=IN_FIRST).get("state", {})
        for name, values in slots.items():
            for key, value in values.items():
                tensors[f"optimizer.{name}.{key}"] = value.clone()
    return tensors


def restore_training(
    module: nn.Module, optimizer: torch.optim.Optimizer, found: Checkpoint
) -> None:
    """Put back what `training_tensors` gave, into sharded parameters too.

    Raises:
        UserError: the checkpoint is of another model.
    """
    check_weights(module, found, "module.")
    slots = strip(found.tensors, "optimizer.")
    if slots:
        _restore_optimizer(module, optimizer, slots)
    restore_weights(module, found, "module.")


def restore_weights(module: nn.Module, found: Checkpoint, prefix: str) -> None:
    """Put back the weights and buffers whose names begin with `prefix`.

    Raises:
        UserError: the checkpoint is of another model.
    """
    check_weights(module, found, prefix)
    there = module.state_dict()
    weights = strip(found.tensors, prefix).items()
    state: Any = {name: value.reshape(there[name].shape) for name, value in weights}
    set_model_state_dict(module, state, options=IN_EACH)


def check_weights(module: nn.Module, found: Checkpoint, prefix: str) -> None:
    """Compare names and sizes of saved weights with a module's.

    Raises:
        UserError: the checkpoint is of another model.
    """
    weights, there = strip(found.tensors, prefix), module.state_dict()
    wrong = sorted(weights.keys() ^ there.keys())
    wrong += [k for k in weights.keys() & there.keys() if weights[k].numel() != there[k].numel()]
    if wrong:
        raise UserError(
            f"{found.path} belongs to another model (different {wrong[0]}, {len(wrong)} in all); "
            "choose another folder for this run, or remove it to start over"
        )


def _restore_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, slots: dict[str, Tensor]
) -> None:
    state: Any = get_optimizer_state_dict(module, optimizer)
    parameters = dict(module.named_parameters())
    saved = {name: strip(slots, f"{name}.") for name in parameters}
    state["state"] = {
        name: {
            key: saved[name][key].reshape(() if key == "step" else parameters[name].shape)
            if key in saved[name]
            else value
            for key, value in values.items()
        }
        for name, values in state["state"].items()
    }
    set_optimizer_state_dict(module, optimizer, state, options=IN_EACH)
    for name, parameter in parameters.items():
        if not saved[name]:  # it had no gradient yet
            optimizer.state.pop(parameter, None)
        for key, value in optimizer.state.get(parameter, {}).items():
            if key != "step" and not isinstance(value, DTensor):  # fused ones want its layout
                optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(value)


def strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return those whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }

"""A training run in one safetensors file: tensors by name, everything else as JSON in its header.

Nothing is unpickled on loading, and the file is replaced atomically, so that a run killed at any
moment finds its last whole checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.files import UserError, write_atomically


def save_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write weights and buffers, optimizer state, random generators, and JSON-able `state`."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    save_tensors(path, tensors, state)


def load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote and return its `state`.

    Raises:
        UserError: the file is not a whole checkpoint of this module.
    """
    tensors, state = load_tensors(path)
    weights = _strip(tensors, "module.")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} belongs to another model; remove it to start over") from error
    slots = _strip(tensors, "optimizer.")
    for name, parameter in module.named_parameters():
        values = _strip(slots, f"{name}.")
        optimizer.state[parameter] = {key: _like(parameter, value) for key, value in values.items()}
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state


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


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Fused optimizers need a state with its parameter's device and memory layout."""
    if value.shape != parameter.shape:
        return value  # the step count
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }

"""A loss as a part of the model: attached before training, left out of what is published."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ATTRIBUTE = "rank_loss"
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # added by DistributedDataParallel, torch.compile

Loss = TypeVar("Loss", bound=nn.Module)


def attach(model: nn.Module, loss: Loss, name: str = ATTRIBUTE) -> Loss:
    """Make `loss` a submodule of `model`, on the model's device.

    Losses of order 2 and up have parameters. As a part of the model they are synchronised by
    DistributedDataParallel, handed to the optimizer by `model.parameters()`, and saved and resumed
    with `model.state_dict()`. So attach the loss *before* any of these is built. Source: this
    project's choice, after the ways in which training scripts lose parameters of a loss.

    Args:
        model: the bare model, not yet wrapped or compiled.
        loss: moved to the device of the model's first parameter; its dtype stays.
        name: attribute of the model that will hold the loss.

    Returns:
        The loss, to be called with the model's features.

    Raises:
        TypeError: the model is already wrapped by DistributedDataParallel, FSDP or torch.compile.
        ValueError: the model already has an attribute of that name.

    >>> from rankloss import HighOrderPLLoss
    >>> model = nn.Linear(8, 8)
    >>> loss = attach(model, HighOrderPLLoss(embed_dim=8, order=2))
    >>> sorted(key for key in model.state_dict() if key.startswith("rank_loss.transition"))
    ['rank_loss.transition_heads.0.key_weight', 'rank_loss.transition_heads.0.predecessor_weight']
    """
    if _is_wrapped(model):
        raise TypeError(
            f"attach: the model is already a {type(model).__name__}, which would neither "
            "synchronise nor optimise the loss; attach the loss to the bare model first"
        )
    if hasattr(model, name):
        raise ValueError(f"attach: {type(model).__name__} already has an attribute {name!r}")
    parameter = next(model.parameters(), None)
    if parameter is not None:
        loss.to(parameter.device)
    model.add_module(name, loss)
    return loss


def export(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    target: str | os.PathLike[str] | None = None,
    name: str = ATTRIBUTE,
) -> dict[str, Tensor]:
    """Return a checkpoint's model weights without those of an attached loss.

    What is returned, and written to `target`, loads strictly into the bare model: with
    `open_clip.create_model(..., pretrained=target)`, CLIP_benchmark, or `load_state_dict`.

    Args:
        checkpoint: a file written by `torch.save` or safetensors, or its content: a state dict, or
            a dictionary holding one under "state_dict" or "model" (open_clip's checkpoints).
            Prefixes "module." and "_orig_mod." of wrapped models are removed.
        target: file to write, in safetensors format if its name ends in ".safetensors".
        name: attribute of the model that holds the loss.

    Returns:
        Tensors by the bare model's parameter names.

    Raises:
        ValueError: the checkpoint holds no model weights.

    >>> from rankloss import HighOrderPLLoss
    >>> model = nn.Linear(8, 8)
    >>> loss = attach(model, HighOrderPLLoss(embed_dim=8, order=2))
    >>> sorted(export({"epoch": 3, "state_dict": model.state_dict()}))
    ['bias', 'weight']
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    weights = {_without_prefixes(key): value for key, value in content.items()}
    kept = {
        key: value
        for key, value in weights.items()
        if isinstance(value, Tensor) and not key.startswith(f"{name}.")
    }
    if not kept:
        raise ValueError(
            f"export: no model weights among the keys {sorted(map(str, content))[:5]}; give a "
            "state dict, or a checkpoint that holds one under 'state_dict' or 'model'"
        )
    if target is not None:
        _write(kept, Path(target))
    return kept


def _is_wrapped(model: nn.Module) -> bool:
    names = {f"{x.__module__}.{x.__qualname__}" for x in type(model).__mro__}
    compiled = any(x.startswith("torch._dynamo") for x in names)
    sharded = any("fsdp" in x.lower() or "fully_shard" in x for x in names)
    return compiled or sharded or isinstance(model, DistributedDataParallel)


def _without_prefixes(key: str) -> str:
    while key.startswith(WRAPPER_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"export: {path} holds a {type(content).__name__}, not a state dict")
    return content


def _write(weights: dict[str, Tensor], path: Path) -> None:
    """Write beside the target and rename, so that the target is whole or absent."""
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.clone().contiguous() for key, value in weights.items()}, partial)
    else:
        torch.save(weights, partial)
    os.replace(partial, path)

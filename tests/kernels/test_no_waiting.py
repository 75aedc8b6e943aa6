"""Steps on a GPU never wait for it, so that CUDA graphs can hold them.

The forward pass, which makes the gradients too, runs on fake CUDA tensors; autograd's engine needs
a GPU that is there, so that the backward pass runs on the meta device.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import (
    ClipLoss,
    CyCLIPLoss,
    HighOrderPLLoss,
    RankCLIPLoss,
    SigLipLoss,
    ranking,
    streaming,
)
from rankloss.kernels import configurations
from tests.helpers.recorder import inside_ops, without_kernels

pytest.importorskip("triton")
from rankloss.kernels import first_order, high_order

WAITING = {  # operations whose result's shape, or value in Python, is on the device
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
    "bincount",
}


class NeverWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at an operation that a GPU's result has to be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or (name in ("index", "index_put", "index_put_") and masks(args[1])):
            raise AssertionError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, torch.Tensor)]
        made = result if isinstance(result, tuple | list) else (result,)
        if on_a_gpu(given) and any(isinstance(x, torch.Tensor) and x.is_cpu for x in made):
            raise AssertionError(f"{name} copies to the host")
        self.calls += on_a_gpu(given)
        return result


def masks(indices: Any) -> bool:
    kinds = torch.bool, torch.uint8
    return any(isinstance(x, torch.Tensor) and x.dtype in kinds for x in indices)


def on_a_gpu(tensors: list[torch.Tensor]) -> bool:
    return any(not x.is_cpu for x in tensors)


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: ClipLoss(impl="triton"),
    "rankclip": lambda: RankCLIPLoss(impl="triton"),
    "order 3": lambda: HighOrderPLLoss(16, 3, transition_dim=16, top_k=20, impl="triton"),
    "siglip": lambda: SigLipLoss(impl="triton"),
    "cyclip": lambda: CyCLIPLoss(impl="triton"),
}


@pytest.fixture(autouse=True)
def a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)


def calls_of_a_step(loss: nn.Module, device: str, *, ids: bool = False) -> int:
    """Number of operations on the device in a step's forward pass; on "meta" in both passes."""
    with FakeTensorMode(allow_non_fake_inputs=True) if device == "cuda" else nullcontext():
        loss = loss.to(device)
        image, text = (torch.empty(32, 16, device=device, requires_grad=True) for _ in range(2))
        scale = torch.empty((), device=device, requires_grad=True)
        known = torch.empty(32, device=device, dtype=torch.int64)
        given = {"image_ids": known, "text_ids": known} if ids else {}
        with inside_ops(), without_kernels(high_order, first_order), NeverWaits() as watch:
            value = loss(image, text, scale, **given)
            if device == "meta":
                value.backward()
        calls: int = watch.calls
        return calls


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("ids", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
def test_a_step_never_waits_for_the_gpu(
    make: Callable[[], nn.Module], ids: bool, device: str
) -> None:
    assert calls_of_a_step(make(), device, ids=ids) > 15


WAITS: dict[str, Callable[[Any], object]] = {
    "item": lambda x: x.sum().item(),
    "host": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_waiting_is_noticed(wait: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted into a loss, each of these raises."""

    def waiting(x: Any, terms: Any) -> Any:
        wait(x.images.detach())
        return streaming.loss_of_pairs(x, terms)

    monkeypatch.setattr(ranking, "loss_of_pairs", waiting)
    with pytest.raises(AssertionError, match=r"waits for the device|copies to the host"):
        calls_of_a_step(ClipLoss(), "cuda")

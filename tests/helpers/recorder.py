"""Dispatch modes that watch the tensors an implementation makes, and stubs of its kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import both_ways, streaming


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the largest storage any operation returned, in elements."""

    def __init__(self, *given: Tensor) -> None:
        """Ignore the storages of given tensors, of which views may be made."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.given = {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                if x.untyped_storage().data_ptr() in self.given:
                    continue
                size = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, size)
        return result


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Largest number of bytes alive at a time among storages made inside; meta tensors count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.calls = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        gone = [k for k, (weak, _) in self._alive.items() if weak.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._alive[key]
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata in self._alive or storage._cdata not in given:
                    weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._alive[storage._cdata] = weak, storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result


@contextmanager
def saved_storages() -> Iterator[dict[int, Tensor]]:
    """Collect what autograd keeps for the backward pass, each storage once, by its address."""
    saved: dict[int, Tensor] = {}  # which keep their addresses from reuse

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def bytes_of(saved: dict[int, Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in saved.values())


@contextmanager
def inside_ops() -> Iterator[None]:
    """Let modes see what happens inside the losses' ops, which they see as one call otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "pair_loss", streaming.run)
        patch.setattr(both_ways, "both_ways", both_ways.run)
        yield


class _Nothing:
    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.count += 1

        return launch


@contextmanager
def without_kernels(*modules: ModuleType) -> Iterator[_Nothing]:
    """Launches of the modules' kernels do nothing, and are counted."""
    stub = _Nothing()
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name in vars(module):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, stub)
        yield stub

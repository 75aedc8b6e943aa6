"""Launches and buffers of the streaming PyTorch implementation, counted without a GPU."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss.kernels import blocked
from rankloss.kernels.signature import Lists

VIEWS = {"alias", "detach", "diagonal", "expand", "select", "slice", "split", "squeeze", "t"}
VIEWS |= {"tensor_split", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"}
SILENT = VIEWS | {"empty", "empty_like", "new_empty"}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that a GPU would launch, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in SILENT:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def lists(n: int, k: int, m: int, order: int = 3, r: int = 32) -> Lists:
    """Arguments on a device that has no memory, and is no CPU."""
    with torch.device("meta"):
        ranking, lengths = torch.empty(n, k, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
        tables = torch.empty(order * (order - 1) // 2, m, r), torch.empty(order - 1, m, r)
        return Lists(torch.empty(n, m), ranking, lengths, torch.empty(k), *tables)


@pytest.mark.parametrize(("size", "most"), [((1024, 1024, 1024), 3000), ((128, 128, 128), 120)])
def test_launches_where_each_operation_is_one(size: tuple[int, int, int], most: int) -> None:
    x = lists(*size)
    with Launches() as seen:
        blocked.nll_and_gradients(x.scores[:, 0], x)
    assert seen.counts["bmm"] + seen.counts["mm"] > 0
    assert seen.counts.total() <= most, seen.counts


@pytest.mark.parametrize(
    ("k", "m", "order", "r"),
    [(128, 128, 3, 32), (96, 128, 5, 16), (128, 128, 2, 8), (24, 512, 3, 32)],
)
def test_buffers_hold_five_tiles_at_most(
    k: int, m: int, order: int, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "GPU_TILE", 1 << 16)
    monkeypatch.setattr(blocked, "GPU_ROWS", 64)
    x = lists(16, k, m, order, r)
    call = blocked._Call(x, x.scores[:, 0])
    call.run()
    held = {name: buffer.numel() for name, buffer in call.buffers.kept.items()}
    assert blocked.GPU_TILE / 4 <= max(held.values()) <= blocked.GPU_TILE
    assert sum(held.values()) <= 5 * blocked.GPU_TILE, held

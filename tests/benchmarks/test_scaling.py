"""The formulas of docs/scaling.md against what is measured on the CPU."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import rankloss.distributed
from benchmarks.memory import peak_live_bytes
from benchmarks.scaling import Loss, size
from rankloss import HighOrderPLLoss, ranking, streaming
from rankloss.kernels import blocked
from tests.helpers.features import features
from tests.helpers.processes import ProcessGroup
from tests.helpers.recorder import bytes_of, saved_storages

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    Loss(256, 1, 64, 3, 32, None, 4),
    Loss(256, 1, 64, 3, 32, 32, 4),
    Loss(256, 1, 128, 1, 32, None, 4),
    Loss(256, 1, 128, 0, 32, None, 4),
]


def build(setting: Loss) -> HighOrderPLLoss:
    return HighOrderPLLoss(
        setting.dim,
        setting.order,
        transition_dim=setting.transition_dim,
        top_k=setting.top_k,
    )


def saved_bytes(setting: Loss) -> int:
    """Bytes of distinct storages that autograd keeps after the forward pass."""
    # as of many candidates, which are not copied so that both modalities share the heads' maps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "COPIED", 0)
        image, text = features(setting.local_batch, setting.dim, dtype=torch.float32)
        scale = torch.tensor(20.0, requires_grad=True)
        with saved_storages() as saved:
            build(setting)(image, text, scale)
        return bytes_of(saved)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kept_memory_in_one_process(setting: Loss) -> None:
    assert saved_bytes(setting) == pytest.approx(setting.kept_bytes(), rel=0.02)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.order != 1], ids=str)
def test_kept_memory_in_two_processes(two: ProcessGroup, setting: Loss) -> None:
    shared = Loss(128, 2, setting.dim, setting.order, 32, setting.top_k, 4)
    for measured in two.run(saved_bytes, shared):
        assert measured == pytest.approx(shared.kept_bytes(), rel=0.02)


def exchanged_bytes(setting: Loss, dtype: torch.dtype) -> int:
    """Received from others in a forward and backward pass, as seen where collectives are called."""
    received = 0
    gather, reduce = rankloss.distributed._all_gather, rankloss.distributed._reduce_scatter

    def counted_gather(x: Tensor, group: Any) -> Tensor:
        nonlocal received
        whole = gather(x, group)
        if x.is_floating_point():  # not the ids
            received += (whole.numel() - x.numel()) * x.element_size()
        return whole

    def counted_reduce(x: Tensor, group: Any) -> Tensor:
        nonlocal received
        own = reduce(x, group)
        received += (dist.get_world_size() - 1) * own.numel() * 4  # each other's part, in float32
        return own

    rankloss.distributed._all_gather = counted_gather
    rankloss.distributed._reduce_scatter = counted_reduce
    try:
        image, text = features(setting.local_batch, setting.dim, dtype=dtype, seed=dist.get_rank())
        torch.autograd.backward(build(setting)(image, text, 20.0))
    finally:
        rankloss.distributed._all_gather = gather
        rankloss.distributed._reduce_scatter = reduce
    return received


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [0, 3])
def test_communication(two: ProcessGroup, order: int, dtype: torch.dtype) -> None:
    setting = Loss(16, 2, 24, order, feature_bytes=dtype.itemsize)
    assert two.run(exchanged_bytes, setting, dtype) == [setting.received_bytes()] * 2


@pytest.mark.parametrize(
    "setting", [Loss(512, 1, 64, 3, 32, 64, 4), Loss(768, 1, 64, 1, 32, None, 4)], ids=str
)
def test_the_peak_is_what_is_kept_twice_and_one_chunk(setting: Loss) -> None:
    image, text = features(setting.local_batch, setting.dim, dtype=torch.float32)
    loss = build(setting)

    def step() -> None:
        torch.autograd.backward(loss(image, text, 20.0))

    step()  # the first also loads code
    measured = peak_live_bytes(step)
    chunk = streaming.CHUNK + 4 * 4 * blocked.TILE
    assert 0.9 * setting.kept_bytes() < measured < 2 * setting.kept_bytes() + chunk


@pytest.mark.parametrize(("n", "k"), [(5, None), (6, 2), (6, 9)])
def test_scores_are_those_of_candidates_not_yet_taken(n: int, k: int | None) -> None:
    setting = Loss(n, 1, 4, 3, 4, k)
    counted = 0
    for _ in range(4):  # lists
        for _ in range(n):  # anchors
            left = n
            for _ in range(min(k or n, n)):  # places
                counted += left
                left -= 1
    assert setting.scores() == counted
    assert Loss(n, 1, 4, 0).scores() == 0


def outputs() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "scaling.md").read_text()
    return re.findall(r"<!-- begin (python .*?) -->\n(.*?)<!-- end -->", text, re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), outputs(), ids=lambda x: x[:40])
def test_tables_of_the_document_are_the_scripts(command: str, shown: str) -> None:
    _, *arguments = shlex.split(command)
    result: Any = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.strip() == result.stdout.strip()


def test_there_are_tables() -> None:
    assert len(outputs()) == 2
    assert size(3 * 1024**3) == "3 GiB"

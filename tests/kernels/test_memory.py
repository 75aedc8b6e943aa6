"""Memory of the Triton implementation besides its inputs: tracked, with its launches stubbed."""

import pytest
import torch

from rankloss.kernels import configurations
from rankloss.kernels.signature import Lists
from tests.helpers.recorder import Peak, without_kernels

pytest.importorskip("triton")
from rankloss.kernels import first_order, high_order

MIB = 1 << 20


def lists(n: int, m: int, k: int, order: int, dtype: torch.dtype, r: int = 32) -> Lists:
    shapes = (n, m), (n, k), (n,), (k,), (order * (order - 1) // 2, m, r), (order - 1, m, r)
    dtypes = torch.float32, torch.int64, torch.int64, torch.float32, dtype, dtype
    return Lists(
        *(torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, dtypes, strict=True))
    )


@pytest.fixture(autouse=True)
def plans_of_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "architecture", lambda device: "sm_90")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "k", "order"),
    [
        (4096, 4096, 4096, 3),
        (1024, 1024, 1024, 3),
        (512, 4096, 256, 3),  # natural walk
        (512, 4096, 3000, 3),  # a completed ranking
        (512, 512, 512, 5),
        (4096, 4096, 4096, 1),
        (2048, 8192, 64, 1),
    ],
)
def test_the_op_takes_three_floats_a_score_and_64_mib(
    n: int, m: int, k: int, order: int, dtype: torch.dtype
) -> None:
    """Gradients of the scores are one of the three; the rest is prepared a chunk at a time."""
    x = lists(n, m, k, order, dtype)
    module = high_order if order > 1 else first_order
    upstream = torch.empty(n, device="meta")
    with without_kernels(high_order, first_order) as launches, Peak() as peak:
        found = module.nll_and_gradients(upstream, x)
    assert launches.count > 0
    assert peak.bytes >= 4 * n * m  # the gradient of the scores at least: it did track
    assert peak.bytes <= 3 * 4 * n * m + 64 * MIB, f"{peak.bytes / MIB:.0f} MiB"
    assert [g.shape for g in found[1:]] == [x.scores.shape, x.predecessors.shape, x.keys.shape]


def test_the_forward_pass_alone_takes_less() -> None:
    x = lists(4096, 4096, 4096, 3, torch.bfloat16)
    with without_kernels(high_order), Peak() as peak:
        high_order.nll(x)
    assert peak.bytes <= 64 * MIB


def test_few_launches_at_512() -> None:
    """Under 30 a list, of kernels and of PyTorch's operations, forward and backward."""
    x = lists(512, 512, 512, 3, torch.bfloat16)
    with without_kernels(high_order) as launches, Peak() as operations:
        high_order.nll_and_gradients(torch.empty(512, device="meta"), x)
    assert launches.count == 4 * 2  # four kernels, two chunks
    assert launches.count + operations.calls <= 60  # views and allocations launch nothing

"""Memory of the streaming implementations: held at a time, and saved for the backward pass."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rankloss import ClipLoss, CyCLIPLoss, RankCLIPLoss, SigLipLoss
from rankloss.kernels import blocked, plackett_luce
from rankloss.kernels.signature import Lists
from tests.helpers.features import features
from tests.helpers.problems import arguments, each_streaming, make_problem
from tests.helpers.recorder import Recorder, bytes_of, saved_storages
from tests.properties import nll


@pytest.mark.parametrize(
    ("n", "m", "k", "order"),
    [(48, 300, 300, 3), (400, 400, 40, 3), (90, 300, 160, 4), (64, 512, 512, 1)],
    ids=["K = M", "K much less than M", "K = M / 2", "order 1"],
)
def test_blocked_never_holds_a_large_tensor(
    n: int, m: int, k: int, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "TILE", 1 << 17)  # small problems then have many tiles
    p = make_problem(15, n, m, k, order, r=32, dtype=torch.float32)
    args = list(arguments(p))
    args[2] = torch.full((n,), k)
    limit = max(2 * blocked.TILE, n * m)
    smallest_forbidden = n * k * m if order == 1 else n * k * 32
    assert smallest_forbidden > 1.5 * limit
    with Recorder() as forward:
        blocked.nll(Lists(*args))
    assert forward.largest <= limit
    with Recorder() as both:
        blocked.nll_and_gradients(torch.ones(n), Lists(*args))
    assert both.largest <= limit


@each_streaming
@pytest.mark.parametrize("order", [1, 3])
def test_little_is_saved_for_backward(order: int, impl: str) -> None:
    """The inputs: nothing of size N K M, nor N K r."""
    n, m, k, r = 32, 64, 48, 32
    p = make_problem(16, n, m, k, order, r=r, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in p.tensors()]
    with saved_storages() as saved:
        nll(p, impl)
    allowed = sum(4 * x.numel() for x in leaves)
    allowed += 8 * n * k + 8 * n + 4 * k  # ranking, lengths, weights
    assert bytes_of(saved) <= allowed + 4 * n * m  # and one spare copy of the scores
    assert allowed < 4 * n * k * m / 4


@pytest.mark.parametrize("make", [ClipLoss, RankCLIPLoss, SigLipLoss, CyCLIPLoss])
def test_gradients_made_ahead_hold_no_input(make: Callable[[], nn.Module]) -> None:
    """A graph that waits for its backward pass lets features, and scores, go."""
    image, text = features(9)
    x = Lists(*arguments(make_problem(0, 4, 9, 7, 1)))
    scores, empty = x.scores.requires_grad_(), x.keys
    with saved_storages() as held:
        value = make()(image, text, 10.0)
        value = value + plackett_luce(*x[:4], empty, empty, anchor_weights=torch.ones(4))
    assert value.requires_grad
    assert len(held) > 2
    assert held.keys().isdisjoint(y.untyped_storage().data_ptr() for y in (image, text, scores))

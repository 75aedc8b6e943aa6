"""Scores keep float32's digits where products of float32 may round their factors to TF32."""

import pytest
import torch
from torch import Tensor

from rankloss import scores
from tests.helpers.features import features


def tf32(x: Tensor) -> Tensor:
    """Round to nearest with ten bits after the first, as tensor cores do."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~scores.LOW_BITS).view(torch.float32)


class RoundingMatmul(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Multiplies matrices as a GPU does whose setting allows TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.mm.default:
            args = tuple(tf32(x) for x in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("split", [True, False])
def test_tf32_does_not_reach_the_scores(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unsplit product fails the same bound: the emulation does round."""
    image, text = features(64, 512, dtype=torch.float32, grad=False)
    exact = 100 * image.double() @ text.double().T
    monkeypatch.setattr(scores, "rounds_to_tf32", lambda x: split)
    with RoundingMatmul():  # type: ignore[no-untyped-call]
        actual = scores.scaled_cosines(image, text, torch.tensor(100.0))
    close = bool((actual.double() - exact).abs().max() < 100 * 1e-6)
    assert close == split


def test_the_split_is_exact_and_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "rounds_to_tf32", lambda x: True)
    a, b = torch.randn(3, 4, 8), torch.randn(3, 8, 5)
    high, low = scores._split(a)
    assert torch.equal(high + low, a)
    assert torch.equal(tf32(high), high)
    actual = torch.func.vmap(scores.exact_product)(a, b)
    torch.testing.assert_close(actual, a @ b)


def test_a_setting_is_asked_for_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert not scores.rounds_to_tf32(torch.ones(1))
    assert not scores.rounds_to_tf32(torch.ones(1, dtype=torch.float64))

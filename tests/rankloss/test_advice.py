"""Warnings: what is silently wrong is said once, what is meant is left alone."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from rankloss import ClipLoss, HighOrderPLLoss
from tests.helpers.features import features


@contextmanager
def silence() -> Iterator[None]:
    """No warning of ours; torch.compile has its own, which would be errors where they arise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = ("unit-norm", "logit_scale", "transition keys")
    assert not [x for x in caught if any(words in str(x.message) for words in ours)]


# ---------------------------------------------------------------- features and scale


@pytest.mark.parametrize("which", ["image_features", "text_features"])
def test_unnormalised_features_warn_once(which: str) -> None:
    image, text = features(3, grad=False)
    given = {"image_features": image, "text_features": text}
    given[which] = 3 * given[which]
    loss = ClipLoss()
    text_of_it = rf"{which} are not unit-norm .*off by 2\); pass torch"
    with pytest.warns(UserWarning, match=text_of_it) as caught:
        loss(**given, logit_scale=10.0)
    assert caught[0].filename == __file__
    with silence():
        loss(**given, logit_scale=10.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_normalised_features_of_any_precision_do_not_warn(dtype: torch.dtype) -> None:
    for seed in range(20):
        image, text = features(40, 512, seed=seed, dtype=dtype)
        with silence():
            ClipLoss()(image, text, 10.0)


@pytest.mark.parametrize(
    "scale",
    [2.6593, 2.3026, torch.tensor([2.6593]), nn.Parameter(torch.tensor(2.6593))],
    ids=["CLIP", "SigLIP", "tensor", "parameter"],
)
def test_a_raw_log_scale_warns_once(scale: Any) -> None:
    loss = ClipLoss()
    with pytest.warns(UserWarning, match=r"logit_scale is 2\.\d+, .* pass logit_scale.exp\(\)"):
        loss(*features(3), scale)
    with silence():
        loss(*features(3), scale)


def test_scales_that_are_meant_do_not_warn() -> None:
    one = nn.Parameter(torch.ones(()))  # whose exp lies where logarithms do
    with silence():
        for scale in (0.0, 1.0, 2.0, 4.6, 10.0, 14.29, 100.0, one.exp(), one.exp().clamp(max=100)):
            ClipLoss()(*features(3), scale)


def test_the_first_call_may_be_one_whose_values_cannot_be_read() -> None:
    """vmap, fake tensors, export, meta: nothing is looked at, and the next call is the first."""
    image, text = (5 * x for x in features(9, dtype=torch.float32, grad=False))
    loss = HighOrderPLLoss(8, 3)
    with silence():
        torch.vmap(lambda a, b: loss(a, b, 10.0))(image.expand(2, 9, 8), text.expand(2, 9, 8))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert loss(fake.from_tensor(image), fake.from_tensor(text), 10.0).shape == ()
    exported = torch.export.export(Contrast(loss), (image, text)).module()
    with pytest.warns(UserWarning, match="not unit-norm"):
        expected = loss(image, text, 10.0)
    torch.testing.assert_close(exported(image, text), expected)


class Contrast(nn.Module):
    """A loss at a constant scale."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        value: Tensor = self.loss(image, text, 10.0)
        return value


# ---------------------------------------------------------------- keys that nobody trains


class Training:
    """Towers and a loss of order 2 in a loop."""

    def __init__(self, *, learned_scale: bool, **options: Any) -> None:
        torch.manual_seed(0)
        self.towers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=learned_scale)
        self.loss = HighOrderPLLoss(8, 2, **options)
        self.call: Any = self.loss

    def parameters(self) -> list[nn.Parameter]:
        return [*self.towers.parameters(), *([self.scale] if self.scale.requires_grad else [])]

    def backward(self, seed: int) -> None:
        pair = features(6, seed=seed, dtype=torch.float32, grad=False)
        embedded = (normalize(f(x), dim=1) for f, x in zip(self.towers, pair, strict=True))
        self.call(*embedded, self.scale.exp()).backward()

    def run(self, optimizer: torch.optim.Optimizer, steps: int, accumulate: int = 1) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            for part in range(accumulate):
                self.backward(step * accumulate + part)
            optimizer.step()


@pytest.mark.parametrize("learned_scale", [True, False], ids=["learned scale", "constant scale"])
@pytest.mark.parametrize("share", [True, False], ids=["shared heads", "heads for each"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_keys_outside_the_optimizer_warn_once(
    optimizer: Any, share: bool, learned_scale: bool
) -> None:
    """One line changed, an optimizer over the towers: that trains RankCLIP."""
    training = Training(learned_scale=learned_scale, share_transitions=share)
    outside = optimizer(training.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match=r"transition keys never change: no optimizer") as caught:
        training.run(outside, steps=9)
    assert len(caught) == 1
    with silence():
        training.run(outside, steps=9)


TRAINED = ["in the optimizer", "fused", "accumulating", "later"]
MEANT = ["frozen", "off", "compiled", "unused"]  # nobody trains them, and that is known


@pytest.mark.parametrize("how", TRAINED + MEANT)
def test_keys_that_are_trained_or_left_alone_on_purpose_do_not_warn(how: str) -> None:
    training = Training(learned_scale=how != "accumulating")
    parameters = [*training.parameters(), *training.loss.parameters()]
    if how in MEANT:
        parameters = training.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=how == "fused")
    with silence():
        if how == "frozen":
            training.loss.requires_grad_(False)
        elif how == "off":  # RankCLIP's first epoch
            training.loss.set_progress(0)
        elif how == "compiled":
            training.call = torch.compile(training.loss, backend="eager")
        if how == "accumulating":
            training.run(optimizer, steps=2, accumulate=40)
        elif how == "later":  # the first steps are skipped
            for seed in range(20):
                training.backward(seed)
            training.run(optimizer, steps=20)
        elif how == "unused":
            with torch.no_grad():
                for _ in range(20):
                    training.loss(*features(6, dtype=torch.float32), 14.3)
        else:
            training.run(optimizer, steps=20)


def test_looking_at_keys_stops() -> None:
    """After the model is seen to learn, nothing of it is held or read."""
    training = Training(learned_scale=False)
    optimizer = torch.optim.AdamW([*training.parameters(), *training.loss.parameters()])
    training.run(optimizer, steps=9)
    watch = training.loss._adviser.untrained_keys
    assert watch.settled
    assert (watch.keys, watch.learned, watch.before) == ([], None, None)

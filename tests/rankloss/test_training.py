"""The losses in a training loop: accumulation, evaluation, copies."""

import copy
from collections.abc import Callable

import torch

from rankloss import ClipLoss, HighOrderPLLoss
from tests.helpers.features import LOSSES, each_loss, features, randomize


@each_loss
def test_accumulating_micro_batches_is_summing_their_gradients(
    make: Callable[[], HighOrderPLLoss],
) -> None:
    """Forward has no counter: the k-th micro-batch is treated as the first."""
    used, scale = make(), torch.tensor(20.0, requires_grad=True)
    expected = [torch.zeros_like(x) for x in (scale, *used.parameters())]
    for seed in range(3):
        fresh = make()
        image, text = features(9, seed=seed, dtype=torch.float32)
        leaves = [scale, *fresh.parameters()]
        gradients = torch.autograd.grad(fresh(image, text, scale) / 3, leaves)
        expected = [a + b for a, b in zip(expected, gradients, strict=True)]
        (used(image, text, scale) / 3).backward()
    for x, g in zip((scale, *used.parameters()), expected, strict=True):
        assert x.grad is not None
        assert torch.equal(x.grad, g)


# ---------------------------------------------------------------- state


def test_state_dict_holds_parameters_and_progress() -> None:
    """Features are nobody's to save."""
    loss = LOSSES["order 3"]()
    loss.set_progress(0.3)
    loss(*features(9, dtype=torch.float32), 20.0)
    assert set(loss.state_dict()) == {
        "ranking_ramp",
        *(name for name, _ in loss.named_parameters()),
    }
    assert list(ClipLoss().state_dict()) == ["ranking_ramp"]
    assert loss.no_weight_decay() == set(dict(loss.named_parameters()))


def test_building_a_loss_consumes_no_randomness() -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        loss = HighOrderPLLoss(8, 3, share_transitions=False)
        loss(*features(9, dtype=torch.float32), 20.0)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(torch.cat([p.detach().flatten() for p in loss.parameters()]))
    assert torch.equal(*weights)


def test_share_transitions() -> None:
    shared, separate = (HighOrderPLLoss(8, 3, share_transitions=x) for x in (True, False))
    assert len(list(shared.parameters())) == 2
    assert len(list(separate.parameters())) == 4
    image, text = features(9, dtype=torch.float32)
    one = list(randomize(shared).parameters())
    with torch.no_grad():
        for p, q in zip(separate.parameters(), [*one, *one], strict=True):
            p.copy_(q)
    values = [loss(image, text, 20.0) for loss in (shared, separate)]
    assert torch.equal(*values)
    together = torch.autograd.grad(values[0], one)
    apart = torch.autograd.grad(values[1], list(separate.parameters()))
    for whole, a, b in zip(together, apart[:2], apart[2:], strict=True):
        torch.testing.assert_close(whole, a + b)


def test_copies_after_a_functional_gradient() -> None:
    loss = LOSSES["order 3"]()
    image, text = features(9, dtype=torch.float32, grad=False)
    torch.func.grad(lambda x: loss(x, text, 20.0))(image)
    copy.deepcopy(loss)

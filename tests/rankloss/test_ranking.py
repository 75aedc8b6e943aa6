"""The losses: their value, spelled out; RankCLIP; where an order-R loss starts; the ramp."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rankloss import HighOrderPLLoss, RankCLIPLoss, rankings
from tests.helpers.features import features, loss_spelled_out, randomize
from tests.helpers.problems import each_implementation

# ---------------------------------------------------------------- the definition

OPTIONS: dict[str, dict[str, Any]] = {
    "order 0": {"order": 0},
    "order 1": {"order": 1},
    "order 2": {"order": 2},
    "order 3": {"order": 3},
    "order 5": {"order": 5},
    "top 3": {"order": 3, "top_k": 3},
    "top more than there are": {"order": 2, "top_k": 99},
    "discount": {"order": 3, "discount": "log"},
    "exclude self": {"order": 3, "exclude_self": True},
    "exclude self, discount, top 4": {
        "order": 2,
        "exclude_self": True,
        "discount": "log",
        "top_k": 4,
    },
    "heads for each modality": {"order": 3, "share_transitions": False},
    "cross-modal alone": {"order": 3, "in_modal_weight": 0.0, "cross_modal_weight": 0.7},
    "in-modal alone": {"order": 3, "in_modal_weight": 0.7, "cross_modal_weight": 0.0},
    "no contrastive term": {"order": 1, "contrastive_weight": 0.0},
    "weights": {"contrastive_weight": 2.0, "in_modal_weight": 0.3, "cross_modal_weight": 3.0},
}
IDS: dict[str, dict[str, list[int]]] = {
    "no ids": {},
    "distinct ids": {"image_ids": [4, 1, 7, 2, 9, 0], "text_ids": [5, 3, 1, 8, 2, 7]},
    "duplicate images": {"image_ids": [4, 1, 4, 2, 4, 1]},
    "duplicate texts": {"text_ids": [0, 0, 1, 2, 2, 3]},
    "both": {"image_ids": [4, 1, 4, 2, 3, 3], "text_ids": [0, 0, 1, 2, 2, 3]},
    "one image": {"image_ids": [7, 7, 7, 7, 7, 7]},
}


@each_implementation
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_the_definition_spelled_out(
    options: dict[str, Any], ids: dict[str, list[int]], impl: str
) -> None:
    image, text = features(6)
    loss = HighOrderPLLoss(8, **options, transition_dim=3, impl=impl).double()
    if options.get("order", 3) >= 2:
        assert randomize(loss).transition_heads
    given = image, text, torch.tensor(5.0), torch.tensor(-2.0)
    named = {name: torch.tensor(x) for name, x in ids.items()}
    parts = loss(*given, **named, output_dict=True)
    expected = loss_spelled_out(loss, image, text, 5.0, -2.0, **ids)
    assert list(parts) == ["contrastive_loss", "ranking_loss"]
    actual = torch.stack([parts["contrastive_loss"], parts["ranking_loss"]]).detach()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(loss(*given, **named).detach(), actual.sum())


@each_implementation
@pytest.mark.parametrize("share", [True, False], ids=["shared heads", "heads for each"])
def test_derivatives(share: bool, impl: str) -> None:
    """To features, scale, bias and heads; targets are constants, so a small step keeps them."""
    image, text = features(4, 3)
    loss = HighOrderPLLoss(3, 3, transition_dim=2, share_transitions=share, impl=impl).double()
    randomize(loss)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    parameters = dict(loss.named_parameters())

    def value(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *heads: Tensor) -> Any:
        given = dict(zip(parameters, heads, strict=True))
        return torch.func.functional_call(loss, given, (image, text, scale, bias))

    inputs = (image, text, scale, bias, *parameters.values())
    assert torch.autograd.gradcheck(value, inputs)


def test_targets_carry_no_gradient() -> None:
    """With one list left, the gradient is that of its scores alone."""
    image, text = features(5)
    loss = RankCLIPLoss(contrastive_weight=0, cross_modal_weight=0, in_modal_weight=1)
    value = loss(image, text, 5.0)
    target = rankings(image @ image.T), rankings(text @ text.T)
    by_hand = torch.zeros((), dtype=torch.float64)
    for x, ranking in ((image, target[1]), (text, target[0])):
        scores = (5.0 * x @ x.T).gather(1, ranking)
        terms = [scores[:, k:].logsumexp(1) - scores[:, k] for k in range(5)]
        by_hand = by_hand + torch.stack(terms).mean() / 2
    torch.testing.assert_close(value, by_hand)
    for a, b in zip(
        torch.autograd.grad(value, (image, text)),
        torch.autograd.grad(by_hand, (image, text)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- RankCLIP


def list_mle(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum over places of log-sum-exp of the suffix minus the score, mean over lists."""
    z = predicted.gather(1, target.argsort(dim=1, descending=True, stable=True))
    places = [z[:, k:].logsumexp(1) - z[:, k] for k in range(z.shape[1])]
    return torch.stack(places).sum(0).mean()


def rankclip(image: Tensor, text: Tensor, scale: Tensor, weight: float) -> Tensor:
    """RankCLIP's published loss, without the epsilon inside its logarithm."""
    s_it, s_ii, s_tt = scale * image @ text.T, scale * image @ image.T, scale * text @ text.T
    match = torch.arange(len(image))
    cross_entropy = torch.nn.functional.cross_entropy
    clip = (cross_entropy(s_it, match) + cross_entropy(s_it.T, match)) / 2
    in_modal = (list_mle(s_ii, s_tt) + list_mle(s_tt, s_ii)) / 32
    cross_modal = (list_mle(s_it, s_it.T) + list_mle(s_it.T, s_it)) / 32
    return clip + weight * (in_modal + cross_modal) / len(image)


@each_implementation
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("epoch", [None, 2, 9], ids=["rank weight 1", "epoch 2", "epoch 9"])
def test_first_order_is_rankclip(epoch: int | None, scale: float, impl: str) -> None:
    """Epochs count from 1 to 10 here; their rank weight is clamp(3 (e - 1) / (E - 1), 0, 2)."""
    image, text = features(24, 16)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    loss, weight = RankCLIPLoss(impl=impl).double(), 1.0
    if epoch is not None:
        loss.set_progress((epoch - 1) / 9)
        weight = min(max(3 * (epoch - 1) / 9, 0), 2)
    results = []
    for value in (loss(image, text, s), rankclip(image, text, s, weight)):
        results.append([value.detach(), *torch.autograd.grad(value, (image, text, s))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@each_implementation
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_first_order_is_rankclip_in_float32(scale: float, impl: str) -> None:
    image, text = features(24, 16, dtype=torch.float32)
    value = RankCLIPLoss(impl=impl)(image, text, scale)
    actual = [value.detach(), *torch.autograd.grad(value, (image, text))]
    v, t = (x.detach().double().requires_grad_() for x in (image, text))
    exact = rankclip(v, t, torch.tensor(scale).double(), 1.0)
    expected = [exact.detach(), *torch.autograd.grad(exact, (v, t))]
    for a, b in zip(actual, expected, strict=True):
        size = float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6 * max(scale, 1) * size)


# ---------------------------------------------------------------- where training starts


@pytest.mark.parametrize("order", [2, 3, 5])
@each_implementation
def test_any_order_starts_bit_for_bit_as_order_one(order: int, impl: str) -> None:
    """Value and gradients to the embeddings, though order 1 is a scan and order R tiles."""
    for seed, dtype in enumerate([torch.float32] * 3 + [torch.float64]):
        image, text = features(33, seed=seed, dtype=dtype)
        values, gradients = [], []
        for loss in (RankCLIPLoss(impl=impl), HighOrderPLLoss(8, order, impl=impl).to(dtype)):
            values.append(loss(image, text, 14.3))
            gradients.append(torch.stack(torch.autograd.grad(values[-1], (image, text))))
        assert torch.equal(*values)
        assert torch.equal(*gradients)


@each_implementation
def test_keys_learn_from_the_first_step(impl: str) -> None:
    """Zero keys stop the predecessors' gradient, not their own: training leaves the start."""
    image, text = features(9, dtype=torch.float32)
    loss = HighOrderPLLoss(8, 3, impl=impl)
    loss(image, text, 10.0).backward()
    predecessors, keys = (x.grad for x in loss.parameters())
    assert keys is not None
    assert (keys.abs().amax((1, 2)) > 0).all()
    assert predecessors is not None
    assert predecessors.abs().max() == 0


# ---------------------------------------------------------------- the ramp


def test_progress_scales_the_ranking_terms_alone() -> None:
    image, text = features(9)
    loss = RankCLIPLoss()
    start = loss(image, text, 10.0, output_dict=True)
    for progress, factor in ((0.0, 0.0), (0.1, 0.3), (0.5, 1.5), (2 / 3, 2.0), (1.0, 2.0)):
        loss.set_progress(progress)
        for _ in range(2):  # forward does not move it
            parts = loss(image, text, 10.0, output_dict=True)
            torch.testing.assert_close(parts["ranking_loss"], factor * start["ranking_loss"])
            assert torch.equal(parts["contrastive_loss"], start["contrastive_loss"])


def test_progress_may_be_set_before_the_backward_pass() -> None:
    """It is for the forward passes to come."""
    image, text = features(9)
    loss = RankCLIPLoss()
    value = loss(image, text, 10.0)
    (expected,) = torch.autograd.grad(value, image, retain_graph=True)
    loss.set_progress(0.5)
    (actual,) = torch.autograd.grad(value, image)
    assert torch.equal(actual, expected)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("n", "exclude_self"), [(0, False), (1, False), (1, True)])
@each_implementation
def test_a_pair_or_none_costs_nothing(n: int, exclude_self: bool, order: int, impl: str) -> None:
    image, text = features(n)
    scale = torch.tensor(100.0, requires_grad=True)
    loss = HighOrderPLLoss(8, order, exclude_self=exclude_self, impl=impl).double()
    value = loss(image, text, scale)
    value.backward()
    assert value == 0
    for x in (image, text, scale, *loss.parameters()):
        assert x.grad is not None
        assert x.grad.abs().sum() == 0


@pytest.mark.parametrize("order", [0, 1, 3])
@each_implementation
def test_identical_features_stay_finite(order: int, impl: str) -> None:
    """Collapse: every score ties at the largest scale."""
    one = torch.nn.functional.normalize(torch.ones(1, 8), dim=1)
    image, text = (one.repeat(12, 1).requires_grad_() for _ in range(2))
    loss = HighOrderPLLoss(8, order, impl=impl)
    value = loss(image, text, 100.0, output_dict=True)
    torch.testing.assert_close(value["contrastive_loss"].detach(), torch.tensor(12.0).log())
    for g in torch.autograd.grad(sum(value.values()), (image, text)):
        assert g.isfinite().all()

"""ALIP: the weights and the loss by hand, its running means, and any number of processes."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rankloss import ALIPLoss, ClipLoss
from tests.helpers.features import features
from tests.helpers.processes import ProcessGroup


def triplets(n: int, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Images, raw texts that often fit, and captions that rarely do."""
    image, text = features(n, seed=seed, **options)
    return image, text, features(n, seed=seed + 1, **options)[1]


def by_hand(
    x: Tensor, t: Tensor, c: Tensor, scale: float, means: list[float], gammas: tuple[float, float]
) -> tuple[float, float]:
    """(contrastive, caption) with the running means already moved, sample by sample in float64."""
    n = len(x)
    parts = []
    for texts, mean in ((t, means[1]), (c, means[2])):
        total = 0.0
        for i in range(n):
            sample = min(1.0, math.exp(gammas[0] * (float(t[i] @ c[i]) - means[0])))
            pair = math.exp(gammas[1] * (float(x[i] @ texts[i]) - mean)) if sample < 1 else 1.0
            rows = [scale * float(x[i] @ texts[j]) for j in range(n)]
            columns = [scale * float(x[j] @ texts[i]) for j in range(n)]
            clip = sum(math.log(sum(map(math.exp, z))) - z[i] for z in (rows, columns)) / 2
            total += sample * pair * clip / n
        parts.append(total)
    return parts[0], parts[1]


def similarities(x: Tensor, t: Tensor, c: Tensor) -> list[float]:
    n = len(x)
    return [sum(float(a[i] @ b[i]) for i in range(n)) / n for a, b in ((t, c), (x, t), (x, c))]


@pytest.mark.parametrize("gammas", [(2.0, 2.0), (1.0, 0.5)], ids=str)
@pytest.mark.parametrize("momentum", [0.99, 0.5])
def test_three_steps_by_hand(momentum: float, gammas: tuple[float, float]) -> None:
    loss = ALIPLoss(sample_gamma=gammas[0], pair_gamma=gammas[1], momentum=momentum).double()
    means = [1.0, 1.0, 1.0]
    for step in range(3):
        x, t, c = triplets(6, seed=step, grad=False)
        now = similarities(x, t, c)
        means = [momentum * m + (1 - momentum) * s for m, s in zip(means, now, strict=True)]
        parts = loss(x, t, 9.0, caption_features=c, output_dict=True)
        expected = by_hand(x, t, c, 9.0, means, gammas)
        assert [float(y) for y in parts.values()] == pytest.approx(expected, rel=1e-10)
        assert loss.means.tolist() == pytest.approx(means, rel=1e-12)


def test_both_kinds_of_samples_are_covered() -> None:
    """Low means make some samples trusted (W_s = 1, no pair weights) and leave others not."""
    x, t, c = triplets(6, grad=False)
    loss = ALIPLoss(momentum=0.0).double()  # means are the batch's own: about half lie above
    texts_agree = (t * c).sum(1)
    trusted = texts_agree >= texts_agree.mean()
    assert 0 < trusted.sum() < 6
    value = loss(x, t, 9.0, caption_features=c)
    expected = sum(by_hand(x, t, c, 9.0, similarities(x, t, c), (2.0, 2.0)))
    assert float(value) == pytest.approx(expected, rel=1e-10)


def test_without_sharpness_it_is_twice_clip() -> None:
    x, t, _ = triplets(7)
    loss = ALIPLoss(sample_gamma=0.0, pair_gamma=0.0)
    twice = ClipLoss()(x, t, 9.0, -1.0) * 2
    torch.testing.assert_close(loss(x, t, 9.0, -1.0, caption_features=t), twice)


def test_ids_make_positives() -> None:
    """Samples that share an id are no negatives of each other, in both terms for images' ids."""
    x, t, c = triplets(6, grad=False)
    flat = ALIPLoss(sample_gamma=0.0, pair_gamma=0.0)
    ids = {"image_ids": torch.tensor([0, 1, 0, 2, 3, 3])}
    texts = {"text_ids": torch.tensor([0, 0, 1, 2, 3, 4])}
    parts = flat(x, t, 9.0, caption_features=c, **ids, **texts, output_dict=True)
    clip = ClipLoss()
    torch.testing.assert_close(parts["contrastive_loss"], clip(x, t, 9.0, **ids, **texts))
    torch.testing.assert_close(parts["caption_loss"], clip(x, c, 9.0, **ids))


def test_weights_carry_no_gradient() -> None:
    """The gradient is that of cross-entropies with constant weights."""
    x, t, c = triplets(5)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    loss = ALIPLoss().eval()
    value = loss(x, t, scale, caption_features=c)
    gradients = torch.autograd.grad(value, (x, t, c, scale))
    labels, total = torch.arange(5), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        sample = (2 * ((t * c).sum(1) - 1)).exp()
    for texts in (t, c):
        with torch.no_grad():
            weight = sample * (2 * ((x * texts).sum(1) - 1)).exp()
        scores = scale * x @ texts.T
        for each in (scores, scores.T):
            total = total + (weight * F.cross_entropy(each, labels, reduction="none")).mean() / 2
    for a, b in zip(gradients, torch.autograd.grad(total, (x, t, c, scale)), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- running means


def test_the_means_are_saved_and_restored() -> None:
    x, t, c = triplets(5, grad=False)
    loss, resumed = ALIPLoss(momentum=0.9), ALIPLoss(momentum=0.9)
    loss(x, t, 9.0, caption_features=c)
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(*(y(x, t, 9.0, caption_features=c) for y in (loss, resumed)))
    assert (loss.means < 1).all()
    assert torch.equal(loss.means, resumed.means)


def test_evaluation_leaves_the_means_alone() -> None:
    x, t, c = triplets(5, grad=False)
    loss = ALIPLoss()
    loss(x, t, 9.0, caption_features=c, local=True)
    loss.eval()(x, t, 9.0, caption_features=c)
    assert loss.means.tolist() == [1.0, 1.0, 1.0]
    loss.train()(x, t, 9.0, caption_features=c)
    assert loss.means.tolist() != [1.0, 1.0, 1.0]
    loss.reset_parameters()
    assert loss.means.tolist() == [1.0, 1.0, 1.0]


def test_seeing_a_batch_several_times_a_step_is_seeing_it_once() -> None:
    """As open_clip accumulates: every forward has the whole batch."""
    x, t, c = triplets(6, grad=False)
    once, often = ALIPLoss(momentum=0.9), ALIPLoss(momentum=0.9, accum_freq=3)
    for _ in range(2):
        value = once(x, t, 9.0, caption_features=c)
        for _ in range(3):
            torch.testing.assert_close(often(x, t, 9.0, caption_features=c), value)
    torch.testing.assert_close(once.means, often.means)


def test_parts_of_a_batch_move_the_means_once() -> None:
    x, t, c = triplets(8, grad=False)
    whole, parts = ALIPLoss(momentum=0.9), ALIPLoss(momentum=0.9, accum_freq=2)
    whole(x, t, 9.0, caption_features=c)
    parts(x[:4], t[:4], 9.0, caption_features=c[:4])
    assert parts.means.tolist() == [1.0, 1.0, 1.0]  # the step is not over
    parts(x[4:], t[4:], 9.0, caption_features=c[4:])
    torch.testing.assert_close(parts.means, whole.means)


# ---------------------------------------------------------------- any input


def test_bad_input() -> None:
    x, t, c = triplets(4)
    with pytest.raises(ValueError, match=r"both be \(n, D\)"):
        ALIPLoss()(x, t, 10.0, caption_features=c[:3])
    with pytest.raises(TypeError, match="floating point"):
        ALIPLoss()(x, t, 10.0, caption_features=c.long())
    with pytest.raises(TypeError, match="needs caption_features= too"):
        ALIPLoss()(x, t, 10.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'caption'"):
        ALIPLoss()(x, t, 10.0, caption=c)
    negative: dict[str, Any] = {"sample_gamma": -1.0}
    for bad in (negative, {"momentum": 1.0}):
        with pytest.raises(ValueError, match="ALIPLoss: need"):
            ALIPLoss(**bad)


# ---------------------------------------------------------------- several processes


def refused_captions() -> str:
    """Process 1 gives captions that do not fit; process 0 must not wait for it."""
    x, t, c = triplets(4, grad=False)
    with pytest.raises(ValueError, match=r"both be \(n, D\)|disagree") as error:
        ALIPLoss()(x, t, 9.0, caption_features=c[: 4 - dist.get_rank()])
    return str(error.value)


def test_captions_that_do_not_fit_stop_every_process(groups: dict[int, ProcessGroup]) -> None:
    first, second = groups[2].run(refused_captions)
    assert "process 1: refused its input" in first
    assert "(3, 8)" in second

"""ALIP: the weights and the loss by hand, its running means, and any number of processes."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_float32_of_rounded_features(dtype: torch.dtype) -> None:
    x, t, c = triplets(9, dtype=dtype)
    wide = ALIPLoss()(x.float(), t.float(), 100.0, caption_features=c.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = ALIPLoss()(x, t, 100.0, caption_features=c)
    assert torch.equal(narrow, wide)
    gradients = torch.autograd.grad(narrow, (x, t, c))
    assert all(y.dtype == dtype and y.isfinite().all() for y in gradients)


@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(n: int) -> None:
    x, t, c = triplets(n)
    loss = ALIPLoss()
    value = loss(x, t, 10.0, caption_features=c)
    assert value == 0
    assert all(y.isfinite().all() for y in torch.autograd.grad(value, (x, t, c)))
    assert loss.means.isfinite().all()


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


class Towers(nn.Module):
    """Two linear towers and a scale, and the loss inside."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.image, self.text = nn.Linear(5, 7), nn.Linear(6, 7)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.loss = ALIPLoss(momentum=0.9)
        self.double()

    def forward(self, images: Tensor, texts: Tensor, captions: Tensor) -> Tensor:
        v, t, c = (
            F.normalize(tower(x), dim=1)
            for tower, x in ((self.image, images), (self.text, texts), (self.text, captions))
        )
        value: Tensor = self.loss(v, t, self.scale.exp(), caption_features=c)
        return value


def share(*inputs: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    model = Towers()
    parallel = DistributedDataParallel(model)
    for _ in range(2):  # the means of the second step are those of the first, moved
        parallel.zero_grad()
        value = parallel(*(x.chunk(dist.get_world_size())[dist.get_rank()] for x in inputs))
        value.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return value.detach(), gradients, model.loss.means


def test_two_processes_have_the_gradient_and_means_of_one(groups: dict[int, ProcessGroup]) -> None:
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, d, generator=g, dtype=torch.float64) for d in (5, 6, 6)]
    model = Towers()
    model(*inputs)
    value = model(*inputs)
    expected = torch.autograd.grad(value, list(model.parameters()))
    results = groups[2].run(share, *inputs)
    torch.testing.assert_close(torch.stack([x[0] for x in results]).mean(), value.detach())
    for _, gradients, means in results:
        torch.testing.assert_close(means, model.loss.means, rtol=0, atol=1e-14)
        for x, y in zip(gradients, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


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

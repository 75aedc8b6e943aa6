"""SigLIP and CyCLIP by their formulas; with ALIP and ITO, any number of pairs and processes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rankloss import ALIPLoss, ClipLoss, CyCLIPLoss, ITOLoss, SigLipLoss
from tests.helpers.features import features
from tests.helpers.processes import ProcessGroup

Make = Callable[..., nn.Module]
LOSSES: dict[str, Make] = {
    "siglip": SigLipLoss,
    "cyclip": CyCLIPLoss,
    "cyclip, other weights": lambda **options: CyCLIPLoss(
        in_modal_weight=0.5, cross_modal_weight=2.0, **options
    ),
}
each_baseline = pytest.mark.parametrize("name", LOSSES)
MORE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LOSSES, ()),
    "alip": ("caption_features",),
    "ito": ("other_view_features", "fused_features", "other_fused_features"),
}
"""Features that a loss needs besides an image's and a text's."""
ALL: dict[str, Make] = {
    **LOSSES,
    "alip": lambda **options: ALIPLoss(momentum=0.9, **options),
    "ito": ITOLoss,
}


def inputs(name: str, n: int, d: int = 8) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Features of image and text, and those that the loss is given by name."""
    more = {x: features(n, d, seed=1 + i)[1] for i, x in enumerate(MORE[name])}
    return list(features(n, d)), more


def value_and_gradients(loss: nn.Module, *inputs: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x for x in inputs if x.requires_grad]
    value = loss(*inputs, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# ---------------------------------------------------------------- SigLIP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.5), (100.0, -3.0)])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_siglip_is_open_clips(n: int, scale: float, bias: float, dtype: torch.dtype) -> None:
    from open_clip.loss import SigLipLoss as OpenClipSigLip  # too slow for every process

    image, text = features(n, 16, dtype=dtype)
    s, b = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, bias))
    ours, theirs = (
        value_and_gradients(loss, image, text, s, b) for loss in (SigLipLoss(), OpenClipSigLip())
    )
    eps = torch.finfo(dtype).eps
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=8 * eps * scale * n)


def test_siglip_with_ids_by_hand() -> None:
    """Pairs that share an image or a caption are matches, all others are not."""
    image, text = features(5, grad=False)
    image_ids, text_ids = torch.tensor([0, 1, 0, 2, 3]), torch.tensor([4, 4, 5, 6, 7])
    matches = {(0, 2), (0, 1)}
    expected = 0.0
    for i in range(5):
        for j in range(5):
            z = 7.0 * float(image[i] @ text[j]) - 2.0
            same = i == j or (i, j) in matches or (j, i) in matches
            expected += math.log1p(math.exp(-z if same else z)) / 5
    value = SigLipLoss()(image, text, 7.0, -2.0, image_ids=image_ids, text_ids=text_ids)
    assert float(value) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- CyCLIP


def cyclip_by_hand(image: Tensor, text: Tensor, scale: float, w_in: float, w_cross: float) -> float:
    v, t = image.detach().double(), text.detach().double()
    n = len(v)
    s, vv, tt = v @ t.T, v @ v.T, t @ t.T
    clip, within, across = 0.0, 0.0, 0.0
    for j in range(n):
        for scores in (s[j], s[:, j]):
            clip += float((scale * scores).logsumexp(0) - scale * scores[j]) / n / 2
        for k in range(n):
            within += float(vv[j, k] - tt[j, k]) ** 2 / n
            across += float(s[j, k] - s[k, j]) ** 2 / n
    return clip + w_in * within + w_cross * across


@pytest.mark.parametrize("weights", [(0.25, 0.25), (1.0, 0.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_cyclip_by_hand(scale: float, weights: tuple[float, float]) -> None:
    image, text = features(9, grad=False)
    loss = CyCLIPLoss(in_modal_weight=weights[0], cross_modal_weight=weights[1])
    expected = cyclip_by_hand(image, text, scale, *weights)
    assert float(loss(image, text, scale)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ids", [{}, {"text_ids": torch.arange(9) // 2}], ids=["no ids", "ids"])
def test_cyclip_without_penalties_is_clip(ids: dict[str, Tensor]) -> None:
    image, text = features(9)
    loss = CyCLIPLoss(in_modal_weight=0.0, cross_modal_weight=0.0)
    expected = ClipLoss()(image, text, 20.0, -1.0, **ids)
    assert torch.equal(loss(image, text, 20.0, -1.0, **ids), expected)


def test_cyclips_penalties_do_not_change_with_ids() -> None:
    image, text = features(9)
    plain, with_ids = (
        CyCLIPLoss()(image, text, 20.0, image_ids=ids, output_dict=True)["cyclic_loss"]
        for ids in (None, torch.arange(9) // 2)
    )
    assert torch.equal(plain, with_ids)


def test_the_scale_gets_only_clips_gradient() -> None:
    image, text = features(9)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    ours, clip = (value_and_gradients(x, image, text, scale)[3] for x in (CyCLIPLoss(), ClipLoss()))
    torch.testing.assert_close(ours, clip)


# ---------------------------------------------------------------- all


@pytest.mark.parametrize("name", [x for x in ALL if x != "alip"])  # its weights have no gradient
def test_gradients(name: str) -> None:
    pair, more = inputs(name, 4, 3)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -1.0))

    def loss(*x: Tensor) -> Any:
        return ALL[name]()(*x[:4], **dict(zip(more, x[4:], strict=True)))

    assert torch.autograd.gradcheck(loss, (*pair, scale, bias, *more.values()))


@each_baseline
def test_accumulation_with_cached_features(name: str) -> None:
    """Three calls with all features, each with gradient to a third of them, make one step."""
    image, text = features(9)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    value, *expected = value_and_gradients(LOSSES[name](), image, text, scale, bias)
    loss, totals = LOSSES[name](accum_freq=3), [torch.zeros_like(x) for x in expected]
    for fresh in range(3):
        parts = [
            torch.cat([y if i == fresh else y.detach() for i, y in enumerate(x.chunk(3))])
            for x in (image, text)
        ]
        again = loss(*parts, scale, bias)
        torch.testing.assert_close(again.detach(), value)
        for total, x in zip(
            totals, torch.autograd.grad(again, (image, text, scale, bias)), strict=True
        ):
            total += x
    for total, x in zip(totals, expected, strict=True):
        torch.testing.assert_close(total, x)
    with pytest.raises(ValueError, match="accum_freq must be at least 1, got 0"):
        LOSSES[name](accum_freq=0)


@pytest.mark.parametrize("name", ALL)
def test_parts_sum_to_the_loss(name: str) -> None:
    pair, more = inputs(name, 9)
    loss = ALL[name]().eval()
    parts = loss(*pair, 10.0, -10.0, **more, output_dict=True)
    assert all(part.endswith("_loss") for part in parts)
    torch.testing.assert_close(sum(parts.values()), loss(*pair, 10.0, -10.0, **more))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(name: str, n: int) -> None:
    pair, more = inputs(name, n)
    loss = ALL[name]()
    value = loss(*pair, 10.0, **more)
    gradients = torch.autograd.grad(value, [*pair, *more.values()])
    assert value.isfinite()
    assert all(x.isfinite().all() for x in (*gradients, *loss.buffers()))
    if n == 0 or name in ("alip", "ito"):  # the match is the only candidate
        assert value == 0


@each_baseline
def test_bad_input(name: str) -> None:
    image, text = features(4)
    loss = LOSSES[name]()
    with pytest.raises(ValueError, match=r"both be \(n, D\).*\(4, 8\) and text_features \(3, 8\)"):
        loss(image, text[:3], 10.0)
    with pytest.raises(TypeError, match="features must be floating point"):
        loss(image.long(), text, 10.0)
    with pytest.raises(ValueError, match="logit_scale must be 0-D"):
        loss(image, text, torch.ones(2))
    with pytest.raises(ValueError, match="logit_bias must be 0-D"):
        loss(image, text, 10.0, torch.ones(2))
    with pytest.raises(ValueError, match="there is no process group"):
        type(loss)(world_size=2)(image, text, 10.0)


# ---------------------------------------------------------------- several processes


class Towers(nn.Module):
    """Linear towers, scale and bias, and a loss inside."""

    def __init__(self, name: str, **options: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.image, self.text = nn.Linear(5, 7), nn.Linear(6, 7)
            self.fuse = nn.Linear(13, 9) if name == "ito" else None
        self.scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))
        self.name, self.loss = name, ALL[name](**options)
        self.double()

    def forward(self, images: Tensor, texts: Tensor, view: Tensor, caption: Tensor) -> Tensor:
        v, w = (F.normalize(self.image(x), dim=1) for x in (images, view))
        t, c = (F.normalize(self.text(x), dim=1) for x in (texts, caption))
        more = [c] if self.name == "alip" else []
        if self.fuse is not None:
            fused = (self.fuse(torch.cat([x, texts], 1)) for x in (v, w))
            more = [w, *(F.normalize(x, dim=1) for x in fused)]
        named = dict(zip(MORE[self.name], more, strict=True))
        value: Tensor = self.loss(v, t, self.scale.exp(), self.bias, **named)
        return value


def two_steps(
    name: str, batch: list[Tensor], options: dict[str, bool], shared: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Value, gradients and buffers; ALIP's means of a second step are those of the first, moved."""
    towers: nn.Module = Towers(name, **options)
    model = DistributedDataParallel(towers) if shared else towers
    if shared:
        batch = [x.chunk(dist.get_world_size())[dist.get_rank()] for x in batch]
    for _ in range(2):
        model.zero_grad()
        value = model(*batch)
        value.backward()
    gradients = [p.grad for p in towers.parameters() if p.grad is not None]
    return value.detach(), gradients, list(towers.buffers())


WAYS = [(name, a, b) for name in LOSSES for a in (True, False) for b in (True, False)]


@pytest.mark.parametrize(
    ("name", "local_loss", "gather_with_grad"), [*WAYS, ("alip", True, True), ("ito", True, True)]
)
def test_two_processes_have_the_gradient_of_one(
    groups: dict[int, ProcessGroup], name: str, local_loss: bool, gather_with_grad: bool
) -> None:
    """Without gradient in the gather towers have less: half of it where all score everything."""
    g = torch.Generator().manual_seed(1)
    batch = [torch.randn(12, d, generator=g, dtype=torch.float64) for d in (5, 6, 5, 6)]
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    value, expected, buffers = two_steps(name, batch, {}, shared=False)
    results = groups[2].run(two_steps, name, batch, options, True)
    torch.testing.assert_close(torch.stack([x for x, *_ in results]).mean(), value)
    names = [x for x, _ in Towers(name).named_parameters()]
    for _, gradients, theirs in results:
        torch.testing.assert_close(theirs, buffers, rtol=0, atol=1e-14)
        for parameter, x, y in zip(names, gradients, expected, strict=True):
            local_is_exact = name == "siglip" and local_loss and parameter.startswith("image")
            if gather_with_grad or local_is_exact or parameter in ("scale", "bias"):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
            elif not local_loss:
                torch.testing.assert_close(x, y / 2, rtol=0, atol=1e-12)
            else:
                assert (x - y).abs().max() > 1e-4


def uneven_share(name: str) -> str:
    image, text = features(3 + dist.get_rank(), grad=False)
    with pytest.raises(ValueError, match="every process must hold the same number of pairs") as e:
        LOSSES[name]()(image, text, 10.0)
    return str(e.value)


@each_baseline
def test_uneven_shares_are_refused_everywhere(groups: dict[int, ProcessGroup], name: str) -> None:
    assert all("[3, 4]" in text for text in groups[2].run(uneven_share, name))

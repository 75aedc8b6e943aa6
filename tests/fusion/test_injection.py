"""The proposition: injection starts as nothing, and never pulls a matched pair apart to first
order. With z(e) = normalise(z + e v):

(a) at initialisation z+ = z, and every gradient of the trunk is that of the model without it;
(b) cos(z(e), z) = 1 / sqrt(1 + e^2 |v|^2);
(c) with the partner given, d<z(e), t>/de >= 0 at e = 0;
(d) without it, |d<z(e), t>/de| <= |v| sin(angle(z, t)).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankloss import ClipLoss
from rankloss.fusion import FUSION_VARIANTS, FusionStages, Injection, MultiScaleFusion
from rankloss.fusion.gate import ConflictAwareGate, tangent, without_conflict

seeds = st.integers(0, 10_000)
widths = st.integers(2, 24)
repeat = settings(max_examples=100, deadline=None, derandomize=True)


def unit(b: int, d: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(b, d, generator=generator, dtype=torch.float64), dim=1)


def step(z: Tensor, v: Tensor, e: float | Tensor) -> Tensor:
    return F.normalize(z + e * v, dim=1)


def slope(z: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """d<z(e), t>/de at e = 0 of every row, by differentiating the definition itself."""
    e = torch.zeros(len(z), 1, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad((step(z.detach(), v.detach(), e) * t).sum(), e)
    return derivative[:, 0]


def random_block(d: int, stages: FusionStages, seed: int) -> MultiScaleFusion:
    """A block whose last map is not zero, as after some training."""
    torch.manual_seed(seed)
    block = MultiScaleFusion(d, 8, stages=stages).double()
    nn.init.normal_(block.to_residual.weight)
    nn.init.normal_(block.to_residual.bias)
    return block


def random_step(d: int, seed: int, with_partner: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z, t and the step v of a random gate."""
    generator = torch.Generator().manual_seed(seed)
    z, t = unit(5, d, generator), unit(5, d, generator)
    r = torch.randn(5, d, generator=generator, dtype=torch.float64)
    gate = torch.rand(5, d, generator=generator, dtype=torch.float64)
    v = tangent(gate * r, z)
    return z, t, without_conflict(v, z, t) if with_partner else v


@given(seed=seeds, d=widths, e=st.floats(-3, 3), with_partner=st.booleans())
@repeat
def test_b_cosine_with_the_start(seed: int, d: int, e: float, with_partner: bool) -> None:
    z, _, v = random_step(d, seed, with_partner)
    torch.testing.assert_close((v * z).sum(1), torch.zeros(5, dtype=torch.float64))
    cosine = (step(z, v, e) * z).sum(1)
    torch.testing.assert_close(cosine, 1 / (1 + e**2 * v.square().sum(1)).sqrt())


@given(seed=seeds, d=widths)
@repeat
def test_c_never_away_from_the_partner(seed: int, d: int) -> None:
    z, t, v = random_step(d, seed, with_partner=True)
    assert (slope(z, v, t) >= -1e-12).all()


def test_c_needs_the_projection() -> None:
    slopes = torch.cat([slope(*_ordered(random_step(6, s, with_partner=False))) for s in range(9)])
    assert (slopes < -0.01).any()


def _ordered(parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    z, t, v = parts
    return z, v, t


@given(seed=seeds, d=widths)
@repeat
def test_d_bounded_by_the_angle(seed: int, d: int) -> None:
    z, t, v = random_step(d, seed, with_partner=False)
    sine = (1 - (z * t).sum(1).square()).clamp(min=0).sqrt()
    assert (slope(z, v, t).abs() <= v.norm(dim=1) * sine + 1e-12).all()


@given(seed=seeds, d=widths, angle=st.sampled_from([0.0, 1e-12, 1e-9, 1e-6, 1e-3, math.pi]))
@repeat
def test_nearly_aligned_partners_are_harmless(seed: int, d: int, angle: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = unit(4, d, generator).requires_grad_()
    aside = F.normalize(tangent(unit(4, d, generator), z.detach()), dim=1)
    t = math.cos(angle) * z.detach() + math.sin(angle) * aside
    r = torch.randn(4, d, generator=generator, dtype=torch.float64, requires_grad=True)
    v = without_conflict(tangent(r, z), z, t)
    assert (v.norm(dim=1) <= r.norm(dim=1) * (1 + 1e-9)).all()
    gradients = torch.autograd.grad(step(z, v, 1.0).square().sum(1).sum() + v.sum(), [z, r])
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e3


@given(seed=seeds)
@settings(max_examples=25, deadline=None, derandomize=True)
@pytest.mark.parametrize("variant", [v for v in FUSION_VARIANTS if v != "none"])
def test_block_takes_the_proposition_s_step(variant: str, seed: int) -> None:
    stages = FUSION_VARIANTS[variant].stages
    block = random_block(7, stages, seed)
    generator = torch.Generator().manual_seed(seed)
    z, t = unit(4, 7, generator), unit(4, 7, generator)
    features = torch.randn(4, 9, 8, generator=generator, dtype=torch.float64)
    out = block(z, features, t)
    torch.testing.assert_close(out.embedding.norm(dim=1), torch.ones(4, dtype=torch.float64))
    v = tangent(block.residual(features), z)
    if stages.gate:
        v = tangent(out.gate * block.residual(features), z)
        assert ((out.gate > 0) & (out.gate < 1)).all()
        v = without_conflict(v, z, t)
        assert (slope(z, v, t) >= -1e-12).all()
    torch.testing.assert_close(out.embedding, step(z, v, 1.0))
    alone = block(z, features)
    v = tangent(block.residual(features) * (out.gate if stages.gate else 1), z)
    torch.testing.assert_close(alone.embedding, step(z, v, 1.0))  # of the same gate, uncorrected


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_a_gate_by_itself_is_computed_in_float32(autocast: bool) -> None:
    torch.manual_seed(0)
    gate, z, r = ConflictAwareGate(16), torch.randn(8, 16), torch.randn(8, 16)
    if not autocast:
        gate, z, r = gate.bfloat16(), z.bfloat16(), r.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gate(z, r)
    assert torch.equal(found, gate.float()(z.float(), r.float()))


@pytest.mark.parametrize("angle", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_c_holds_in_half_precision_at_small_angles(autocast: bool, angle: float) -> None:
    """The step that the block took, from its output in float64: z+ is along z + v, v tangent."""
    torch.manual_seed(0)
    block = random_block(32, FusionStages(), 0).float()
    generator = torch.Generator().manual_seed(1)
    z, t = unit(256, 32, generator), unit(256, 32, generator)
    t = step(math.cos(angle) * z, F.normalize(tangent(t, z), dim=1), math.sin(angle))
    features = torch.randn(256, 9, 8, generator=generator)
    if not autocast:
        block, features, z, t = block.bfloat16(), features.bfloat16(), z.bfloat16(), t.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(z.float() if autocast else z, features, t.float() if autocast else t)
    z, t = (F.normalize(x.double(), dim=1) for x in (z, t))
    after = out.embedding.double()
    v = after / (after * z).sum(1, keepdim=True) - z
    assert (v.norm(dim=1) > 1e-3).all()
    lowered = (v * t).sum(1) < -1e-5 * v.norm(dim=1)
    assert not lowered.any(), f"{lowered.double().mean():.0%} of the steps lower the match"
    assert out.embedding.dtype == out.gate.dtype == torch.float32


def test_a_sample_without_real_tokens_does_not_move() -> None:
    block = random_block(7, FusionStages(), 0)
    generator = torch.Generator().manual_seed(0)
    z, t = unit(3, 7, generator).requires_grad_(), unit(3, 7, generator)
    features = torch.randn(3, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[1, 2] = True
    out = block(z, features, t, mask).embedding
    for i in (0, 2):
        assert torch.equal(out[i], z[i])
        weight = torch.randn(7, generator=generator, dtype=torch.float64)
        to_z, *rest = torch.autograd.grad(
            (out[i] * weight).sum(),
            [z, features, *block.parameters()],
            retain_graph=True,
            materialize_grads=True,
        )
        assert torch.equal(to_z[i], weight)
        assert not any(gradient.any() for gradient in rest)
    assert not torch.allclose(out[1], z[1])


def test_unnormalised_inputs_warn_at_the_first_call_only() -> None:
    block = random_block(7, FusionStages(), 0)
    z, features = unit(3, 7, torch.Generator().manual_seed(0)), torch.randn(3, 9, 8).double()
    expected = block(z, features, z)
    block(5 * z, features)  # by now nothing is read any more
    for name, inputs in (("embedding", (5 * z, z)), ("partner", (z, 5 * z))):
        fresh = random_block(7, FusionStages(), 0)
        with pytest.warns(UserWarning, match=f"{name} is not unit-norm .*by 4"):
            out = fresh(inputs[0], features, inputs[1])
        torch.testing.assert_close(out.embedding, expected.embedding)


def test_tower_works_alone() -> None:
    block = random_block(7, FusionStages(), 0)
    z = unit(4, 7, torch.Generator().manual_seed(0))
    features = torch.randn(4, 9, 8, dtype=torch.float64)
    alone = torch.cat([block(z[i : i + 1], features[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(block(z, features).embedding, alone)


def test_partner_gets_no_gradient() -> None:
    block = random_block(7, FusionStages(), 0)
    z = unit(4, 7, torch.Generator().manual_seed(0))
    t = unit(4, 7, torch.Generator().manual_seed(1)).requires_grad_()
    out = block(z, torch.randn(4, 9, 8, dtype=torch.float64), t)
    (gradient,) = torch.autograd.grad(out.embedding.sum(), t, allow_unused=True)
    assert gradient is None


def test_the_correction_carries_no_gradient() -> None:
    z, t, v = (x.requires_grad_() for x in random_step(6, 0, with_partner=False))
    corrected = without_conflict(v, z, t)
    assert not torch.allclose(corrected, v)
    weight = torch.randn(5, 6, dtype=torch.float64)
    gradients = torch.autograd.grad((corrected * weight).sum(), [v, z, t], allow_unused=True)
    assert gradients[0] is not None
    assert torch.equal(gradients[0], weight)
    assert [x is None for x in gradients] == [False, True, True]


def test_training_with_partners_does_not_leak_them() -> None:
    """Pairs that have nothing in common, new ones at every step: no honest loss beats chance."""
    torch.manual_seed(0)
    stages = FusionStages(levels=None, attention=False, refiner=False)
    injection, loss = Injection(16, 8, stages=stages), ClipLoss()
    scale = torch.tensor(math.log(5), requires_grad=True)
    optimizer = torch.optim.Adam([*injection.parameters(), scale], lr=0.03)
    tokens, losses = torch.ones(32, 1, 8), []
    for _ in range(200):
        image, text = F.normalize(torch.randn(2, 32, 16), dim=2)
        one, two = injection(image, text, tokens, tokens)
        assert one is not None
        assert two is not None
        value: Tensor = loss(one.embedding, two.embedding, scale.exp())
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-20:]) / 20 > 0.9 * math.log(32)  # 1.7 with the correction's gradient


def test_injection_leaves_out_what_is_not_there() -> None:
    z = unit(3, 6, torch.Generator().manual_seed(0))
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    none = FUSION_VARIANTS["none"].build(6, 8)(z, z, tokens, tokens)
    assert none == (None, None)
    both = Injection(6, 8).double()
    assert both(z, z, tokens).text is None
    image_only = FUSION_VARIANTS["image-only"].build(6, 8).double()(z, z, tokens, tokens)
    assert image_only.image is not None
    assert image_only.text is None


def test_padding_of_texts_reaches_the_text_block_only() -> None:
    generator = torch.Generator().manual_seed(0)
    z, t = unit(3, 6, generator), unit(3, 6, generator)
    patches, words = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * n + [False] * (5 - n) for n in (5, 2, 1)])
    injection = Injection(6, 8)
    injection.image, injection.text = (random_block(6, FusionStages(), seed) for seed in (0, 1))
    image, text = injection(z, t, patches, words.masked_fill(~mask[:, :, None], torch.nan), mask)
    assert image is not None
    assert text is not None
    torch.testing.assert_close(image.embedding, injection.image(z, patches, t).embedding)
    torch.testing.assert_close(text.embedding, injection.text(t, words, z, mask).embedding)


# ---------------------------------------------------------------- (a), through a real trunk


def test_a_learns_from_the_first_step() -> None:
    torch.manual_seed(0)
    block = MultiScaleFusion(6, 8)
    z, t = F.normalize(torch.randn(2, 4, 6), dim=2)
    out = block(z, torch.randn(4, 5, 8), t).embedding
    (gradient,) = torch.autograd.grad((out * t).sum(), block.to_residual.weight)
    assert gradient.abs().max() > 0


def test_without_gate_there_is_nothing_to_penalise() -> None:
    plain = MultiScaleFusion(6, 8, stages=FusionStages(gate=False))
    z = F.normalize(torch.randn(4, 6), dim=1)
    assert plain(z, torch.randn(4, 5, 8)).gate is None


def test_the_block_is_under_five_percent_of_a_vit_b_16() -> None:
    """A ViT-B/16 has 86.2 M parameters, and at 224 pixels 22.5 GFLOPs besides attention itself."""
    block, tokens = MultiScaleFusion(512, 256).eval(), torch.randn(1, 196, 256)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(F.normalize(torch.randn(1, 512), dim=1), tokens)
    assert 0 < sum(p.numel() for p in block.parameters()) < 0.05 * 86.2e6
    assert 0 < counter.get_total_flops() < 0.05 * 22.5e9

"""One contract for every loss, op and layer: dtypes, layouts, transforms, copies, backward passes.

A row of CASES says how to build the thing and what to feed it. A new loss or op gets a row here
and is then held to everything below.
"""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from rankloss import (
    ALIPLoss,
    ClipLoss,
    CyCLIPLoss,
    GramLoss,
    HighOrderPLLoss,
    ITOFusion,
    ITOLoss,
    KoLeoLoss,
    RankCLIPLoss,
    RelationalAngleLoss,
    RelationalDistanceLoss,
    SigLipLoss,
    Transitions,
    plackett_luce_nll,
)
from rankloss.fusion import (
    ChannelSpatialAttention,
    ConflictAwareGate,
    MultiScaleFusion,
    SelfAttentionRefiner,
    SpatialPyramidPool1d,
)
from rankloss.kernels import gram_distance

Inputs = Callable[[torch.Generator], list[Tensor]]
HALF = [torch.bfloat16, torch.float16]


class Case(NamedTuple):
    """A callable's construction, and float64 tensors to call it with.

    Attributes:
        make: builds the loss, layer or op.
        inputs: draws the arguments; those before `constants` receive gradient.
        constants: how many of the last arguments receive none (teachers).
        float32: computes in float32 whatever the inputs and autocast are; layers follow autocast.
        heads: has parameters that autocast may round.
        streams: makes its gradients ahead, and so has none of a higher order.
    """

    make: Callable[[], Callable[..., Any]]
    inputs: Inputs
    constants: int = 0
    float32: bool = True
    heads: bool = False
    streams: bool = False


def pairs(n: int = 6, d: int = 8) -> Inputs:
    """Unit-norm image and text features of n pairs, and a logit scale."""

    def draw(g: torch.Generator) -> list[Tensor]:
        image, noise = torch.randn(2, n, d, generator=g, dtype=torch.float64).unbind()
        scale = torch.tensor(16.0, dtype=torch.float64)
        return [normalize(image, dim=1), normalize(image + noise, dim=1), scale]

    return draw


def pairs_and(others: int) -> Inputs:
    """As `pairs`, then so many more unit-norm features of the same items."""
    return lambda g: [*pairs()(g), *unit(*[(6, 8)] * others)(g)]


class Named(nn.Module):
    """A loss whose arguments after the third are given by name."""

    def __init__(self, loss: nn.Module, *names: str) -> None:
        super().__init__()
        self.loss, self.names = loss, names

    def forward(self, *given: Tensor) -> Any:
        return self.loss(*given[:3], **dict(zip(self.names, given[3:], strict=True)))


def normal(*shapes: tuple[int, ...]) -> Inputs:
    return lambda g: [torch.randn(x, generator=g, dtype=torch.float64) for x in shapes]


def unit(*shapes: tuple[int, ...]) -> Inputs:
    draw = normal(*shapes)
    return lambda g: [normalize(x, dim=-1) for x in draw(g)]


def with_keys(loss: HighOrderPLLoss) -> HighOrderPLLoss:
    """Give the transition keys, which start at zero, values that matter."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return loss


def likelihood(impl: str, places: int = 4, *, each: bool = False) -> Callable[..., Tensor]:
    """The likelihood of given rankings: their mean, or of `each` with some candidates masked."""
    ranking = torch.tensor([[3, 0, 5, 1, 2, 6, 4], [2, 6, 4, 0, 1, 3, 5], [6, 5, 4, 3, 2, 1, 0]])
    mask = torch.arange(21).reshape(3, 7) % 4 != 0

    def f(scores: Tensor, *tables: Tensor) -> Tensor:
        return plackett_luce_nll(
            scores,
            ranking[:, :places].to(scores.device),
            Transitions(*tables) if tables else None,
            discount="log",
            mask=mask.to(scores.device) if each else None,
            reduction="none" if each else "mean",
            impl=impl,
            validate=False,
        )

    return f


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = make().eval()
            for parameter in layer.parameters():  # the last map starts at zero
                nn.init.normal_(parameter, std=0.3)
            return layer

    return build


TOKENS = normal((2, 6, 5), (2, 6, 7))
ROWS = normal((6, 5), (6, 7))
SCORES = normal((3, 7), (3, 7, 4), (2, 7, 4))
CASES = {
    "clip": Case(ClipLoss, pairs(), streams=True),
    "rankclip": Case(RankCLIPLoss, pairs(), streams=True),
    "order 3": Case(
        lambda: with_keys(HighOrderPLLoss(8, 3, transition_dim=4)),
        pairs(),
        heads=True,
        streams=True,
    ),
    "order 2, top 3": Case(
        lambda: with_keys(
            HighOrderPLLoss(
                8, 2, transition_dim=4, top_k=3, exclude_self=True, share_transitions=False
            )
        ),
        pairs(),
        heads=True,
        streams=True,
    ),
    "order 3, reference": Case(
        lambda: with_keys(HighOrderPLLoss(8, 3, transition_dim=4, impl="reference")),
        pairs(),
        heads=True,
    ),
    "siglip": Case(SigLipLoss, pairs(), streams=True),
    "cyclip": Case(CyCLIPLoss, pairs(), streams=True),
    "alip": Case(lambda: Named(ALIPLoss().eval(), "caption_features"), pairs_and(1)),
    "ito": Case(
        lambda: Named(ITOLoss(), "other_view_features", "fused_features", "other_fused_features"),
        pairs_and(3),
    ),
    "ito fusion": Case(
        seeded(lambda: ITOFusion(8)), normal((2, 5, 8), (2, 3, 8)), float32=False, heads=True
    ),
    **{
        f"{name}, {impl}": Case(make, inputs, streams=impl == "blocked")
        for impl in ("blocked", "reference")
        for name, make, inputs in (
            ("likelihood", partial(likelihood, impl), SCORES),
            ("likelihoods of all places", partial(likelihood, impl, 7, each=True), SCORES),
            ("likelihood of order 1", partial(likelihood, impl), normal((3, 7))),
            ("likelihoods of order 1", partial(likelihood, impl, each=True), normal((3, 7))),
        )
    },
    "gram": Case(GramLoss, TOKENS, constants=1, streams=True),
    "gram, reference": Case(lambda: GramLoss(impl="reference"), TOKENS, constants=1),
    "gram, batch, clamped": Case(
        lambda: GramLoss("batch", "clamp"), TOKENS, constants=1, streams=True
    ),
    "gram, teacher clamped": Case(
        lambda: GramLoss(negatives="clamp_teacher"), TOKENS, constants=1, streams=True
    ),
    "gram distance, blocked": Case(
        lambda: lambda s, t: gram_distance(s, t, "keep", "blocked"),
        TOKENS,
        constants=1,
        streams=True,
    ),
    "gram distance, reference": Case(
        lambda: lambda s, t: gram_distance(s, t, "keep", "reference"), TOKENS, constants=1
    ),
    "relational distance": Case(RelationalDistanceLoss, ROWS, constants=1),
    "relational angle": Case(RelationalAngleLoss, ROWS, constants=1),
    "koleo": Case(KoLeoLoss, normal((6, 5))),
    "koleo, groups": Case(lambda: KoLeoLoss(2, group_size=3), normal((6, 5))),
    "pyramid": Case(seeded(SpatialPyramidPool1d), normal((2, 6, 5)), float32=False),
    "attention": Case(
        seeded(lambda: ChannelSpatialAttention(8)), normal((2, 6, 8)), float32=False, heads=True
    ),
    "refiner": Case(
        seeded(lambda: SelfAttentionRefiner(8)), normal((2, 6, 8)), float32=False, heads=True
    ),
    "gate": Case(
        seeded(lambda: ConflictAwareGate(8)), unit((3, 8), (3, 8)), float32=False, heads=True
    ),
    "fusion": Case(
        seeded(lambda: MultiScaleFusion(8, feature_dim=8)),
        lambda g: [*unit((3, 8))(g), *normal((3, 6, 8))(g)],
        float32=False,
        heads=True,
    ),
}


def cases(**wanted: object) -> pytest.MarkDecorator:
    """Parametrise over the cases with these attributes."""
    names = [
        name
        for name, case in CASES.items()
        if all(getattr(case, key) == value for key, value in wanted.items())
    ]
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


def arguments(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    return [x.to(dtype) for x in case.inputs(torch.Generator().manual_seed(seed))]


def scalar(value: Any) -> Tensor:
    """The loss itself, or a fixed projection of a layer's outputs."""
    outputs = value if isinstance(value, tuple) else (value,)
    total: Tensor = outputs[0].new_zeros(())
    for x in outputs:
        weights = torch.linspace(0.5, 1.5, max(x.numel(), 1), device=x.device, dtype=x.dtype)
        total = total + (x.flatten() * weights[: x.numel()]).sum()
    return total


def run(
    case: Case, f: Callable[..., Any], given: list[Tensor], autocast: torch.dtype | None = None
) -> list[Tensor]:
    """Value, gradients to the arguments that have one, gradients to the parameters.

    The backward pass runs outside autocast, as PyTorch recommends.
    """
    count = len(given) - case.constants
    leaves = [x.detach().requires_grad_() for x in given[:count]]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        value = f(*leaves, *given[count:])
    leaves += parameters(f)
    value = scalar(value) if not isinstance(value, Tensor) or value.dim() else value
    return [value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)]


def parameters(f: Callable[..., Any]) -> list[Tensor]:
    return list(f.parameters()) if isinstance(f, nn.Module) else []


def assert_equal_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert [x.dtype for x in a] == [x.dtype for x in b]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_close(a: list[Tensor], b: list[Tensor], rounding: float = 16.0) -> None:
    """Equal up to sums in another order."""
    for x, y in zip(a, b, strict=True):
        scale = 1.0 + float(y.detach().abs().max()) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=0, atol=rounding * torch.finfo(y.dtype).eps * scale)


# ---------------------------------------------------------------- dtypes


@cases(float32=True)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, case: Case) -> None:
    """The value has the bits of the widened inputs' one; gradients are rounded once, at the end."""
    f, given = case.make(), arguments(case, dtype)
    value, *gradients = run(case, f, given)
    expected, *wide = run(case, f, [x.float() for x in given])
    assert_equal_bits([value], [expected])
    assert value.dtype == torch.float32
    inputs = len(given) - case.constants
    for i, (x, y) in enumerate(zip(gradients, wide, strict=True)):
        assert x.dtype == (dtype if i < inputs else torch.float32)
        largest = float(y.abs().max())
        torch.testing.assert_close(x.float(), y, rtol=0, atol=2 * torch.finfo(dtype).eps * largest)


@cases()
def test_float64_stays(case: Case) -> None:
    f = case.make()
    f = f.double() if isinstance(f, nn.Module) else f
    exact = run(case, f, arguments(case, torch.float64))
    assert all(x.dtype == torch.float64 for x in exact)
    f = case.make()
    rounded = run(case, f, [x.to(torch.float64).float() for x in arguments(case, torch.float64)])
    assert not torch.equal(exact[0], rounded[0].double())
    torch.testing.assert_close(exact[0].float(), rounded[0], rtol=1e-4, atol=1e-4)


@cases(float32=True, heads=False)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("autocast", HALF, ids=str)
def test_autocast_changes_nothing(autocast: torch.dtype, dtype: torch.dtype, case: Case) -> None:
    f, given = case.make(), arguments(case, dtype)
    assert_equal_bits(run(case, f, given, autocast), run(case, f, given))


# ---------------------------------------------------------------- backward


@cases()
def test_the_backward_pass_may_repeat_under_any_factor(case: Case) -> None:
    """A retained graph gives the same gradients again, times whatever comes from above."""
    f, given = case.make(), arguments(case)
    count = len(given) - case.constants
    leaves = [x.requires_grad_() for x in given[:count]] + parameters(f)
    value = f(*given)
    value = scalar(value) if not isinstance(value, Tensor) or value.dim() else value
    once = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
    three = torch.autograd.grad(3 * value, leaves, retain_graph=True, materialize_grads=True)
    five = torch.autograd.grad(
        value.expand(5).sum(), leaves, retain_graph=True, materialize_grads=True
    )
    again = torch.autograd.grad(value, leaves, materialize_grads=True)
    assert_close(list(three), [3 * x for x in once])
    assert_close(list(five), [5 * x for x in once])
    assert_equal_bits(list(again), list(once))


@cases()
def test_inputs_are_left_alone_and_repeats_have_equal_bits(case: Case) -> None:
    f, given = case.make(), arguments(case)
    before = [x.clone() for x in given]
    first = run(case, f, given)
    assert_equal_bits(run(case, f, given), first)
    assert_equal_bits(given, before)
    assert all(x._version == 0 for x in given)


@cases()
def test_without_gradient(case: Case) -> None:
    f, given = case.make(), arguments(case)
    expected = scalar(f(*given))
    with torch.no_grad():
        value = scalar(f(*(x.requires_grad_() for x in given)))
    with torch.inference_mode():
        inferred = scalar(f(*(x.detach() for x in given)))
    assert not value.requires_grad
    assert torch.equal(value, expected.detach())
    assert torch.equal(inferred, expected.detach())
    if case.float32 and not case.heads:  # another op than with gradient
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(scalar(f(*given)), value)


@cases(streams=True)
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::DeprecationWarning")
def test_other_derivatives_are_refused_with_the_remedy(case: Case) -> None:
    """Second ones, tangents and Hessians, rather than zeros."""
    f, given = case.make(), arguments(case)
    for which in range(len(given) - case.constants):

        def value(x: Tensor, which: int = which) -> Tensor:
            return scalar(f(*given[:which], x, *given[which + 1 :]))

        leaf = given[which].clone().requires_grad_()
        for above in (value(leaf.clone()), value(leaf).square()):
            (gradient,) = torch.autograd.grad(above, leaf, create_graph=True)
            assert gradient.requires_grad
            with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference'"):
                torch.autograd.grad(gradient.square().sum() + leaf.square().sum(), leaf)
        for transform in (torch.func.jacfwd, torch.func.hessian):
            with pytest.raises(NotImplementedError, match=r"forward mode.*impl='reference'"):
                transform(value)(given[which])


@cases(constants=1)
def test_teachers_receive_no_gradient(case: Case) -> None:
    student, teacher = (x.requires_grad_() for x in arguments(case))
    value = scalar(case.make()(student, 2 * teacher))
    torch.autograd.backward(value)
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None
    assert not scalar(case.make()(student.detach(), teacher)).requires_grad


# ---------------------------------------------------------------- layouts


@cases()
def test_any_layout(case: Case) -> None:
    """Transposed in memory, every second number of a buffer, and at an offset into one."""
    f, given = case.make(), arguments(case)
    expected = run(case, f, given)
    transposed = [x.mT.contiguous().mT if x.dim() > 1 else x for x in given]
    spaced = [torch.stack([x, -x], dim=-1)[..., 0] for x in given]
    shifted = [torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape) for x in given]
    for other in (transposed, spaced, shifted):
        assert_close(run(case, f, other), expected, rounding=64.0)


@cases()
def test_tensors_without_numbers(case: Case) -> None:
    f = case.make()
    real = run(case, f, arguments(case))
    g = copy.deepcopy(f).to("meta") if isinstance(f, nn.Module) else f
    fake = run(case, g, [x.to("meta") for x in arguments(case)])
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run(case, f, [mode.from_tensor(x) for x in arguments(case)])
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


# ---------------------------------------------------------------- transforms


@cases()
def test_compiles_to_one_graph_of_the_same_bits(case: Case) -> None:
    torch._dynamo.reset()
    f, given = case.make(), arguments(case)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_equal_bits(run(case, compiled, given), run(case, f, given))


@cases()
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention has no batching rule
@pytest.mark.parametrize("what", ["value", "gradient"])
def test_vmap_equals_a_loop(what: str, case: Case) -> None:
    """The first call is under vmap, where no value can be read; some arguments may be shared."""
    batches = [arguments(case, seed=seed) for seed in range(3)]
    count = len(batches[0])
    shared = {(0,) * count, (0, *[None] * (count - 1)), (*[None] * (count - 1), 0)}

    def transformed(f: Callable[..., Any]) -> Any:
        if what == "value":
            return lambda *x: (scalar(f(*x)),)
        return torch.func.grad(lambda *x: scalar(f(*x)), tuple(range(count - case.constants)))

    for in_dims in sorted(shared, key=str):
        given = [
            torch.stack(x) if d == 0 else x[0]
            for x, d in zip(zip(*batches, strict=True), in_dims, strict=True)
        ]
        actual = torch.func.vmap(transformed(case.make()), in_dims)(*given)
        loop = transformed(case.make())
        each = [
            loop(*(x[i] if d == 0 else x for x, d in zip(given, in_dims, strict=True)))
            for i in range(3)
        ]
        assert_close(list(actual), [torch.stack(x) for x in zip(*each, strict=True)], rounding=64.0)


# ---------------------------------------------------------------- copies and state


@cases()
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state dict"])
def test_copies_compute_the_same(how: str, case: Case) -> None:
    f = case.make()
    if not isinstance(f, nn.Module):
        return
    given = arguments(case)
    expected = scalar(f(*given))
    if how == "state dict":
        again = case.make()
        assert isinstance(again, nn.Module)
        with torch.no_grad():
            for x in again.parameters():
                x.fill_(torch.nan)
        file = io.BytesIO()
        torch.save(f.state_dict(), file)
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))
    else:
        again = copy.deepcopy(f) if how == "deepcopy" else pickle.loads(pickle.dumps(f))
    assert torch.equal(scalar(again(*given)), expected)

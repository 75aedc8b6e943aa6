"""The Triton implementation inside PyTorch and inside the losses, and where it refuses to run."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compiled.launches import Launch, recorded
from rankloss import HighOrderPLLoss, TransitionHeads
from rankloss.kernels import (
    IMPLEMENTATIONS,
    check_impl,
    choose,
    first_order,
    high_order,
    launch,
    plackett_luce,
    why_not,
)
from rankloss.kernels.configurations import Plan, Tile, plan_for, using
from tests.helpers.problems import make_problem
from tests.helpers.triton_cases import (
    DEVICE,
    SMALL_TILES,
    Inputs,
    assert_close,
    can_run,
    expected,
    guarded,
    interpreted_only,
    make_inputs,
    run,
    upstream,
)
from tests.properties import (
    assert_constants_change_nothing,
    assert_first_order_is_list_mle,
    assert_first_place_is_info_nce,
    assert_probabilities_sum_to_one,
    assert_relabelling_changes_nothing,
    assert_zero_keys_leave_order_one,
    assert_zero_terms_lower_the_order,
)

each_order = pytest.mark.parametrize("order", [1, 3])
each_k = pytest.mark.parametrize("k", [5, 16])

# ---------------------------------------------------------------- the identities, in float32


@can_run
@pytest.mark.parametrize(("k", "order"), [(7, 4), (20, 2)])
def test_identities(k: int, order: int) -> None:
    p = make_problem(k, 1, 20, k, order, discount="log", dtype=torch.float32)
    labels = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    with guarded(), using(SMALL_TILES):
        assert_first_place_is_info_nce(p, "triton")
        assert_first_order_is_list_mle(p._replace(ranking=p.scores.argsort(1)), "triton")
        assert_zero_keys_leave_order_one(p, "triton")
        assert_relabelling_changes_nothing(p, labels, "triton")
        assert_constants_change_nothing(p, torch.tensor([3.0]), "triton")
        if order > 2:
            assert_zero_terms_lower_the_order(p, 2, "triton")


@can_run
@each_order
def test_probabilities_of_all_rankings_sum_to_one(order: int) -> None:
    p = make_problem(0, 1, 4, 4, order, dtype=torch.float32)
    with guarded(), using(SMALL_TILES):
        assert_probabilities_sum_to_one(p, "triton")


# ---------------------------------------------------------------- PyTorch's machinery


@can_run
@each_order
@each_k
def test_opcheck(k: int, order: int) -> None:
    inputs = make_inputs(2, 18, k, order, ragged=True)
    ops = torch.ops.rankloss
    with using(SMALL_TILES):
        torch.library.opcheck(ops.plackett_luce.default, (*inputs, "triton"))
        torch.library.opcheck(ops.plackett_luce_gradients.default, (upstream(2), *inputs, "triton"))


@can_run
@each_order
def test_vmap_of_the_gradient(order: int) -> None:
    batch = [make_inputs(2, 18, 5, order, seed=seed, ragged=True) for seed in range(2)]

    def total(*x: Tensor) -> Tensor:
        return plackett_luce(*Inputs(*x), impl="triton").sum()

    gradient = torch.func.grad(total, argnums=(0, 4, 5))

    with using(SMALL_TILES):
        stacked = torch.func.vmap(gradient, in_dims=(0, 0, 1, None, 0, 0))(
            torch.stack([b.scores for b in batch]),
            torch.stack([b.ranking for b in batch]),
            torch.stack([b.lengths for b in batch], 1),
            batch[0].weights,
            torch.stack([b.predecessors for b in batch]),
            torch.stack([b.keys for b in batch]),
        )
        for i, b in enumerate(batch):
            one = run(b, grad=torch.ones(2, device=DEVICE)).gradients()
            assert all(torch.equal(s[i], g) for s, g in zip(stacked, one, strict=True))


# ---------------------------------------------------------------- dtypes


@can_run
def test_gradients_have_the_dtype_of_their_input() -> None:
    inputs = make_inputs(2, 18, 16, 3, dtype=torch.float16)
    mixed = inputs._replace(scores=inputs.scores.bfloat16(), keys=inputs.keys.float())
    with using(SMALL_TILES):
        actual = run(mixed)
    assert actual.nll.dtype == torch.float32
    assert [g.dtype for g in actual.gradients()] == [torch.bfloat16, torch.float16, torch.float32]
    rounded = actual._replace(
        d_scores=actual.d_scores.float(), d_predecessors=actual.d_predecessors.float()
    )
    half = mixed._replace(keys=mixed.keys.bfloat16())  # whose gate is that of bfloat16 gradients
    assert_close(rounded, expected(mixed), half)


# ---------------------------------------------------------------- the losses


@can_run
@pytest.mark.parametrize(
    ("with_ids", "options"),
    [
        (True, {"order": 1, "top_k": 3, "exclude_self": True}),
        (True, {"order": 2, "top_k": 2, "discount": "log"}),
        (False, {"order": 3, "share_transitions": False}),
    ],
    ids=str,
)
def test_losses_equal_those_of_the_blocked_implementation(
    with_ids: bool, options: dict[str, Any]
) -> None:
    n, width = 5, 12
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, n, width, generator=generator)
    features = torch.nn.functional.normalize(features, dim=2).to(DEVICE)
    ids = {}
    if with_ids:
        image_ids, text_ids = torch.arange(n) // 2, torch.arange(n) % 4
        ids = {"image_ids": image_ids.to(DEVICE), "text_ids": text_ids.to(DEVICE)}
    results = []
    for impl in ("blocked", "triton"):
        loss = HighOrderPLLoss(width, transition_dim=8, impl=impl, **options)
        for head in (x for x in loss.modules() if isinstance(x, TransitionHeads)):
            torch.nn.init.normal_(head.key_weight, generator=generator.manual_seed(1))
        loss = loss.to(DEVICE)
        pair, scale = features.clone().requires_grad_(), torch.tensor(20.0, device=DEVICE)
        scale.requires_grad_()
        with using(SMALL_TILES):
            value = loss(pair[0], pair[1], scale, **ids)
            leaves = [pair, scale, *loss.parameters()]
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


# ---------------------------------------------------------------- launches


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    """Launches, listed; no kernel runs."""
    with recorded(high_order, first_order) as found:
        yield found


@can_run
@pytest.mark.parametrize(("order", "kernels"), [(1, 2), (3, 7)])
def test_fifty_shapes_compile_a_handful_of_kernels(
    order: int, kernels: int, launches: list[Launch]
) -> None:
    """A kernel compiles once for each set of options, dtypes and specialised numbers.

    High orders: two walks, short lists or not, with gradients or without; and order 1's, from which
    they start. Order 1: seven block sizes from 16 to 1024, all candidates ranked or not.
    """
    most = {first_order.__name__: 14, high_order.__name__: 8}
    generator = torch.Generator().manual_seed(0)
    for shape in range(50):
        m = int(torch.randint(1, 3000 if order == 1 else 300, (), generator=generator))
        k = m if shape % 2 else int(torch.randint(1, m + 1, (), generator=generator))
        n = shape % 3 + 1
        run(make_inputs(n, m, k, order) if m < 300 else wide(n, m, k))
    found: dict[tuple[str, str], set[Any]] = {}
    for x in launches:
        numbers = {a: value for a, value in x.arguments.items() if isinstance(value, int)}
        specialised = [value for a, value in numbers.items() if a not in x.unspecialised()]
        assert all(value % 16 == 0 for value in specialised)
        types = tuple(x.signature().values())
        options = *sorted(x.options.items()), *sorted(x.constants.items())
        found.setdefault((x.kernel.fn.__module__, x.name), set()).add((types, options))
    assert len(found) == kernels
    assert all(len(x) <= most[n[0]] for n, x in found.items()), {
        n: len(x) for n, x in found.items()
    }


def wide(n: int, m: int, k: int) -> Inputs:
    """Order 1 without the time that a random problem takes."""
    ranking = torch.arange(k, device=DEVICE).expand(n, k)
    empty = torch.empty(0, m, 8, device=DEVICE)
    ones = torch.ones(k, device=DEVICE)
    return Inputs(
        torch.zeros(n, m, device=DEVICE),
        ranking,
        torch.full((n,), k, device=DEVICE),
        ones,
        empty,
        empty,
    )


@can_run
@each_order
def test_launches_happen_on_the_device_of_the_tensors(
    order: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[Tensor] = []
    counts = []

    @contextmanager
    def recorded(tensor: Tensor) -> Iterator[None]:
        before = len(launches)
        inside.append(tensor)
        yield
        counts.append(len(launches) - before)

    for module in (high_order, first_order):
        monkeypatch.setattr(module, "on_device_of", recorded)
    run(make_inputs(2, 18, 16, order))
    assert inside
    assert sum(counts) == len(launches) > 0
    assert all(x.shape == (2, 18) for x in inside)


def test_current_device_is_set_for_cuda_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnSecondGpu:
        is_cuda = True
        device = torch.device("cuda", 1)

    entered = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    with launch.on_device_of(torch.ones(1)):
        assert entered == []
    with launch.on_device_of(OnSecondGpu()):  # type: ignore[arg-type]
        assert entered == [torch.device("cuda", 1)]


# ---------------------------------------------------------------- precision of products


@pytest.mark.parametrize(
    ("architecture", "precision"), [("sm_90", "tf32x3"), ("sm_80", "tf32x3"), ("gfx942", "ieee")]
)
@pytest.mark.parametrize("setting", ["highest", "medium"])
def test_float32_is_multiplied_accurately_whatever_torch_says(
    setting: str, architecture: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    monkeypatch.setattr("rankloss.kernels.configurations.architecture", lambda device: architecture)
    found = plan_for(torch.device("cuda"), torch.float32, 64, 100)
    assert found.precision == precision


@interpreted_only
@pytest.mark.parametrize(("columns", "precision"), [(16, "ieee"), (32, "tf32x3")])
def test_every_product_has_the_configured_precision(columns: int, precision: str) -> None:
    entry = Plan(Tile(16, 16), Tile(16, 16), columns=columns, precision=precision)
    for k in (16, 4):
        with guarded() as report, using(entry):
            run(make_inputs(1, 18, k, 3))
        assert report.dot_precisions == {precision}


# ---------------------------------------------------------------- where it cannot run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process: no fall-back was reported yet."""
    monkeypatch.setattr("rankloss.kernels.dispatch._said", set())


@pytest.mark.usefixtures("nothing_said")
def test_falling_back_on_a_gpu_is_said_once_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match=r"runs 'blocked' on cuda:0, .*triton is not installed"):
        assert choose("auto", GPU) == "blocked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", GPU) == "blocked"  # not said again
        assert choose("auto", CPU) == "blocked"  # what "auto" means there
        assert choose("blocked", GPU) == "blocked"  # asked for


def test_names_are_checked_without_a_device() -> None:
    for impl in ("auto", *IMPLEMENTATIONS):
        check_impl(impl)
    with pytest.raises(ValueError, match="unknown impl 'tritno'; choose 'auto' or one of"):
        check_impl("tritno")


def test_unknown_implementation() -> None:
    with pytest.raises(
        ValueError, match=r"unknown impl 'cuda'; choose 'auto' or one of \['triton'"
    ):
        why_not("cuda", CPU)
    with pytest.raises(ValueError, match="unknown impl 'tritn'"):
        choose("tritn", CPU)


@can_run
def test_float64_is_refused_with_the_remedy() -> None:
    assert "float64" in str(why_not("triton", DEVICE, torch.float64))
    inputs = make_inputs(2, 6, 6, 2)
    for double in (
        inputs._replace(scores=inputs.scores.double()),
        inputs._replace(keys=inputs.keys.double()),
    ):
        with pytest.raises(ValueError, match="use 'blocked' or 'reference' for float64"):
            plackett_luce(*double, impl="triton")


def test_other_devices_are_refused() -> None:
    assert "CUDA and ROCm GPUs" in str(why_not("triton", torch.device("mps")))
    with pytest.raises(ValueError, match="impl='triton' cannot run on mps"):
        choose("triton", torch.device("mps"))
    assert why_not("blocked", torch.device("mps")) is None


@pytest.mark.parametrize(
    ("triton", "reason"),
    [
        (None, "triton is not installed"),
        (SimpleNamespace(__version__="3.2.0"), "triton 3.3 or newer"),
    ],
)
@pytest.mark.filterwarnings("ignore:impl='auto' runs")
def test_missing_and_old_triton(
    triton: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", triton)
    assert reason in str(why_not("triton", GPU))
    assert choose("auto", GPU) == "blocked"
    assert why_not("reference", GPU) is None


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "blocked"), ((8, 0), "triton")])
@pytest.mark.filterwarnings("ignore:impl='auto' runs")
def test_old_gpus(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose("auto", GPU) == chosen
    assert choose("auto", GPU, torch.float64) == "blocked"
    if chosen == "blocked":
        assert "compute capability 8.0" in str(why_not("triton", GPU))


PLAIN_CPU = """
import sys, torch
from rankloss.kernels import choose, plackett_luce, why_not
print(why_not("triton", torch.device("cpu")))
assert choose("auto", torch.device("cpu")) == "blocked"
empty = torch.empty(0, 3, 8)
args = torch.zeros(1, 3), torch.tensor([[0, 1, 2]]), torch.tensor([3]), torch.ones(3), empty, empty
plackett_luce(*args)
assert "rankloss.kernels.first_order" not in sys.modules
try:
    plackett_luce(*args, impl="triton")
except ValueError as error:
    print(error)
"""


def test_cpu_without_the_interpreter() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_CPU],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    reason, error = done.stdout.splitlines()
    assert "set TRITON_INTERPRET=1 before the first import" in reason
    assert error == f"impl='triton' cannot run on cpu: {reason}"

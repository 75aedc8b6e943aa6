"""Losses a chunk of anchors at a time: equal to the plain ones, small in memory, few launches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss import (
    ClipLoss,
    CyCLIPLoss,
    HighOrderPLLoss,
    RankCLIPLoss,
    SigLipLoss,
    both_ways,
    global_batch,
    kernels,
    streaming,
)
from rankloss.distributed import GlobalBatch
from rankloss.kernels import configurations
from rankloss.pair_terms import Pairs, Terms
from rankloss.siglip_ranking import SigLipRankingLoss
from rankloss.streaming import loss_of_pairs
from tests.helpers.features import features, randomize
from tests.helpers.recorder import Peak, Recorder, inside_ops, without_kernels

# ---------------------------------------------------------------- equal to the plain losses

LOSSES: dict[str, Callable[[str], nn.Module]] = {
    "clip": lambda impl: ClipLoss(contrastive_weight=0.7, impl=impl),
    "rankclip": lambda impl: RankCLIPLoss(impl=impl),
    "order 3": lambda impl: randomize(HighOrderPLLoss(8, 3, transition_dim=4, impl=impl)),
    "own heads, log, top 3, self out": lambda impl: randomize(
        HighOrderPLLoss(
            8,
            2,
            transition_dim=4,
            top_k=3,
            exclude_self=True,
            share_transitions=False,
            discount="log",
            impl=impl,
        )
    ),
    "cross-modal alone": lambda impl: RankCLIPLoss(
        contrastive_weight=0.0, in_modal_weight=0.0, impl=impl
    ),
    "in-modal and contrastive": lambda impl: RankCLIPLoss(cross_modal_weight=0.0, impl=impl),
    "in-modal alone": lambda impl: RankCLIPLoss(
        contrastive_weight=0.0, cross_modal_weight=0.0, exclude_self=True, impl=impl
    ),
    "siglip": lambda impl: SigLipLoss(impl=impl),
    "siglip, ranking": lambda impl: SigLipRankingLoss(order=1, impl=impl),
    "cyclip": lambda impl: CyCLIPLoss(in_modal_weight=0.5, impl=impl),
    "cyclip, within": lambda impl: CyCLIPLoss(cross_modal_weight=0.0, impl=impl),
}
IDS = {
    "no ids": {},
    "images": {"image_ids": torch.tensor([0, 1, 0, 2, 3, 4, 0, 5, -1])},
    "both": {
        "image_ids": torch.tensor([0, 1, 0, 2, 3, 4, 0, 5, 6]),
        "text_ids": torch.tensor([1, 1, 2, 3, 4, 5, 6, 7, 7]),
    },
}
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())


def leaves_of(loss: nn.Module) -> list[Tensor]:
    scalars = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (9.0, -2.0))
    return [*features(9), *scalars, *loss.parameters()]


@each_loss
@pytest.mark.parametrize("anchors", [1, 4, 9], ids=lambda n: f"{n} at a time")
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_equals_the_plain_loss(
    ids: dict[str, Tensor],
    anchors: int,
    make: Callable[[str], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each value with gradients of its own, their sum with one set; backward twice, and tripled."""
    monkeypatch.setattr(streaming, "CHUNK", anchors * 2 * 9 * streaming.ENTRY)
    monkeypatch.setattr(streaming, "WHOLE", streaming.WHOLE * (anchors == 9))
    results = []
    for impl in ("reference", "blocked"):
        loss = make(impl).double()
        leaves = leaves_of(loss)
        parts = loss(*leaves[:4], **ids, output_dict=True)
        total = loss(*leaves[:4], **ids)
        values = [*parts.values(), total, 3 * total]
        found = [x.detach() for x in values]
        for x in (*values, *values):
            if x.requires_grad:
                found += torch.autograd.grad(x, leaves, retain_graph=True, materialize_grads=True)
        results.append(found)
    assert len(results[0]) > 20
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("terms", [Terms(sigmoid=1.0), Terms()], ids=["one-sided", "no term"])
def test_anchors_fewer_than_candidates_leave_no_memory_unwritten(terms: Terms) -> None:
    """Uninitialised memory is NaN here; texts are no anchors, and are not given apart as such."""
    image, text = features(9)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills it
    try:
        results = []
        for impl in ("reference", "blocked"):
            leaves = image[:3].clone().requires_grad_(), text.clone().requires_grad_()
            batch = GlobalBatch(leaves[0], leaves[1], image[:0], leaves[1], torch.arange(3))
            pairs = Pairs.of(batch, torch.tensor(9.0).double())._replace(text_anchors=None)
            value = loss_of_pairs(pairs, terms._replace(impl=impl))
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    finally:
        torch.use_deterministic_algorithms(before)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@each_loss
def test_the_plain_loss_has_second_derivatives_and_the_streamed_one_refuses(
    make: Callable[[str], nn.Module],
) -> None:
    for impl in ("reference", "blocked"):
        loss = make(impl).double()
        image, text, scale, bias = leaves_of(loss)[:4]
        value = loss(image, text, scale, bias)
        (gradient,) = torch.autograd.grad(value, image, create_graph=True)
        if impl == "blocked":
            with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference'"):
                torch.autograd.grad(gradient.square().sum(), image)
        else:
            (second,) = torch.autograd.grad(gradient.square().sum(), image)
            assert second.abs().max() > 0


@each_loss
@pytest.mark.parametrize("which", range(3), ids=["image", "text", "scale"])
def test_gradients_of_some_inputs(which: int, make: Callable[[str], nn.Module]) -> None:
    loss = make("blocked").double().requires_grad_(False)
    leaves = leaves_of(loss)[:3]
    expected = torch.autograd.grad(loss(*leaves), leaves)[which]
    some = [x.detach().requires_grad_(i == which) for i, x in enumerate(leaves)]
    (actual,) = torch.autograd.grad(loss(*some), some[which])
    assert torch.equal(actual, expected)


def test_a_term_of_weight_zero_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's ranking loss has no InfoNCE; while the ramp is 0 nothing is ranked."""
    image, text = features(9)
    monkeypatch.setattr(streaming, "info_nce_and_gradient", None)
    SigLipRankingLoss(order=1)(image, text, 10.0, -10.0).backward()
    loss = RankCLIPLoss(contrastive_weight=0.0)
    loss(image, text, 10.0).backward()
    monkeypatch.setattr(streaming, "RankedLists", None)
    loss.set_progress(0)
    loss(image, text, 10.0).backward()


def test_rankings_are_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(x: Any, *args: Any, **options: Any) -> Any:
        seen.append(x.ranking.dtype)
        return total(x, *args, **options)

    total = kernels.values_and_gradients
    monkeypatch.setattr(kernels, "values_and_gradients", noted)
    RankCLIPLoss()(*features(9), 10.0)
    assert seen == [torch.int32] * 2


# ---------------------------------------------------------------- memory and launches

MIB = 1 << 20


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "architecture", lambda device: "sm_90")


def anchors_of(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first n pairs are this process's, as with `local_loss`."""

    def gathered(images: Tensor, texts: Tensor, *_: Any, **__: Any) -> GlobalBatch:
        labels = torch.arange(n, device=images.device)
        return GlobalBatch(images[:n], texts[:n], images, texts, labels)

    monkeypatch.setattr(global_batch, "gather_batch", gathered)


def on_no_device(
    loss: nn.Module, m: int, *, ids: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Forward and backward pass of M pairs of width 512, whose numbers are not computed."""
    loss = loss.to("meta", dtype)
    image, text = (
        torch.empty(m, 512, device="meta", dtype=dtype, requires_grad=True) for _ in range(2)
    )
    scale = torch.empty((), device="meta", requires_grad=True)
    known = torch.empty(m, device="meta", dtype=torch.int64)
    given = {"image_ids": known, "text_ids": known} if ids else {}
    return lambda: loss(image, text, scale, **given).backward()


@pytest.mark.parametrize(
    ("order", "n", "top_k", "ids", "most"),
    [
        (3, 4096, None, False, 400),
        (3, 512, None, False, 80),
        (3, 512, 256, False, 96),
        (1, 4096, None, True, 400),
        (1, 512, None, True, 80),
        (0, 512, None, True, 80),
    ],
)
def test_memory_of_a_step_against_4096_candidates(
    order: int,
    n: int,
    top_k: int | None,
    ids: bool,
    most: int,
    h200: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Peak of forward and backward besides the features themselves; 1,640 MiB if all were held."""
    high_order = pytest.importorskip("rankloss.kernels.high_order")
    first_order = pytest.importorskip("rankloss.kernels.first_order")
    if n < 4096:
        anchors_of(n, monkeypatch)
    step = on_no_device(HighOrderPLLoss(512, order, top_k=top_k, impl="triton"), 4096, ids=ids)
    with inside_ops(), without_kernels(high_order, first_order) as launches, Peak() as peak:
        step()
    assert launches.count <= 2300  # 9,700 of chunks that all fit into 50 MiB
    assert peak.bytes > 16 * MIB  # gradients of the features at least: it did track
    assert peak.bytes <= most * MIB, f"{peak.bytes / MIB:.0f} MiB"


@pytest.mark.parametrize("make", [ClipLoss, RankCLIPLoss, SigLipLoss, CyCLIPLoss])
def test_nothing_of_anchors_and_candidates_is_kept(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the passes there are features only, in them no tensor larger than a chunk."""
    for name in ("CHUNK", "LARGEST"):
        monkeypatch.setattr(streaming, name, 1 << 18)
        monkeypatch.setattr(both_ways, name, 1 << 18)
    for module, name in ((streaming, "WHOLE"), (both_ways, "WHOLE"), (both_ways, "KEPT")):
        monkeypatch.setattr(module, name, 0)
    n, d = 300, 4
    image, text = features(n, d, dtype=torch.float32)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, inside_ops(), Recorder() as recorder:
        value = make()(image, text, 10.0)
    value.backward()
    assert sum(saved.values()) < 16 * 4 * n * d
    assert 4 * recorder.largest <= streaming.CHUNK < 4 * n * n


NO_LAUNCH = ("empty", "detach", "_unsafe_view", "new_empty_strided")


class Launches(Peak):  # type: ignore[no-untyped-call]
    """Counts operations that write numbers: neither views, nor allocations, nor empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = result if isinstance(result, tuple | list) else (result,)
        returns = func._schema.returns
        alias = returns[0].alias_info if returns else None
        view = alias is not None and not alias.is_write
        if not view and not any(name in func.name() for name in NO_LAUNCH):
            self.count += any(isinstance(x, Tensor) and x.numel() > 0 for x in made)
        return result


class OneKernel(torch.autograd.Function):
    """Stands for a function that CUDA computes by one kernel each way, other devices by several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.exp()


def test_launches_of_a_step_at_512(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of ours and operations of PyTorch, forward and backward, all in bfloat16: < 120."""
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, *, eps: OneKernel.apply(x))
    high_order = pytest.importorskip("rankloss.kernels.high_order")
    first_order = pytest.importorskip("rankloss.kernels.first_order")
    step = on_no_device(HighOrderPLLoss(512, 3, impl="triton"), 512, dtype=torch.bfloat16)
    with (
        inside_ops(),
        without_kernels(high_order, first_order) as kernels_,
        Launches() as operations,
    ):
        step()
    assert kernels_.count == 2 * (4 * 4 + 2)  # lists of a modality; kernels and chunks; the start
    assert operations.count <= 83

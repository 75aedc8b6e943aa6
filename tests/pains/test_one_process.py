"""Pains of training with losses that a single process can have, and what happens here instead.

Each is described in docs/troubleshooting.md under the name of its test.
"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import normalize

from rankloss import (
    ClipLoss,
    HighOrderPLLoss,
    PlackettLuceLoss,
    RankCLIPLoss,
    SigLipLoss,
    Transitions,
    attach,
    plackett_luce_nll,
    rankings,
)
from rankloss.grad_cache import GradCache
from rankloss.kernels import blocked, choose, dispatch
from rankloss.kernels.signature import Lists
from tests.helpers.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
SCALES = (14.3, 20.0)


def features(n: int = 8, d: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    pair = normalize(
        torch.randn(2, n, d, generator=torch.Generator().manual_seed(n), dtype=dtype), dim=2
    )
    return pair[0].requires_grad_(), pair[1].requires_grad_()


def third_order(d: int = 16, **options: Any) -> HighOrderPLLoss:
    """Order 3 with keys that are not zero."""
    loss = HighOrderPLLoss(d, 3, transition_dim=4, **options)
    for name, p in loss.named_parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    return loss


def gradients(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves))


KEYS = "rank_loss.transition_heads.0.key_weight"


def train(model: nn.Module, loss: nn.Module, steps: int) -> None:
    """Steps of the optimizer that a training script builds: of the model's parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x, y = features(dtype=torch.float32)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(normalize(model(x), dim=1), y, 14.3).backward()
        optimizer.step()


def test_parameters_of_the_loss_are_trained_and_saved() -> None:
    model, again = nn.Linear(16, 16), nn.Linear(16, 16)
    loss = attach(model, HighOrderPLLoss(16, 3, transition_dim=4))
    train(model, loss, steps=2)
    saved = model.state_dict()
    assert saved[KEYS].abs().max() > 0  # where they start
    resumed = attach(again, HighOrderPLLoss(16, 3, transition_dim=4))
    again.load_state_dict(saved)
    for a, b in zip(resumed.parameters(), loss.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_of_the_loss_in_no_optimizer_are_told() -> None:
    model, loss = nn.Linear(16, 16), HighOrderPLLoss(16, 3, transition_dim=4)
    with pytest.warns(UserWarning, match="no optimizer holds them.*Make the loss a submodule"):
        train(model, loss, steps=9)


def test_accumulated_scale_and_heads_have_their_gradient_once() -> None:
    """open_clip's scheme: every call sees all features, with gradient to one part of them."""
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    whole = third_order().double()
    parts = third_order(accum_freq=4).double()
    x, y = features()
    whole(x, y, scale).backward()
    expected = [scale.grad, *(p.grad for p in whole.parameters())]
    scale.grad = None
    for part in range(4):
        mask = (torch.arange(8) // 2 == part)[:, None]
        parts(torch.where(mask, x, x.detach()), torch.where(mask, y, y.detach()), scale).backward()
    for a, b in zip([scale.grad, *(p.grad for p in parts.parameters())], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_scale_of_100_gives_the_exact_loss() -> None:
    scores = torch.tensor([[0.0, -100.0, -100.0]])
    value = 3 * plackett_luce_nll(scores, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(value, torch.tensor(2.0).log())  # log(cumsum + 1e-10): 153.9
    x, y = (z.float() for z in features(64))
    exact = RankCLIPLoss(impl="reference")(x.double(), y.double(), 100.0)
    torch.testing.assert_close(RankCLIPLoss()(x, y, 100.0).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    x, y = (z.detach().to(dtype).requires_grad_() for z in features(32))
    exact_x, exact_y = (z.detach().double().requires_grad_() for z in (x, y))
    loss = third_order()
    value = loss(x, y, 100.0)
    exact = copy.deepcopy(loss).double()(exact_x, exact_y, 100.0)
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)
    for a, b in zip(gradients(value, x, y), gradients(exact, exact_x, exact_y), strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < 2 * torch.finfo(dtype).eps


def largest_tensor(m: int, n: int) -> int:
    """Elements of the largest tensor that a third-order loss of n anchors makes."""
    scores = torch.randn(n, m)
    tables = torch.randn(3, m, 4), torch.randn(2, m, 4)
    lists = Lists(scores, rankings(scores), torch.full((n,), m), torch.ones(m), *tables)
    with Recorder() as seen:
        blocked.nll_and_gradients(torch.ones(n), lists)
    return int(seen.largest)


def test_large_batches_hold_no_tensor_of_anchors_places_and_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocked, "TILE", 1 << 14)
    n = m = 128  # N K M is 2 million
    assert largest_tensor(m, n) <= 4 * max(1 << 14, 64 * m, n * m)


def test_tiles_have_a_size_whatever_the_number_of_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "TILE", 1 << 14)
    few, many = largest_tensor(64, 16), largest_tensor(64, 256)
    assert many <= max(2 * few, 2 * 64 * 256)


def test_runs_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; sys.modules['triton'] = sys.modules['triton.language'] = None\n"
        "import torch, rankloss\n"
        "f = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)\n"
        "print(rankloss.HighOrderPLLoss(8)(f, f, 10.0).item())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) >= 0
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(dispatch, "_said", set())
    with pytest.warns(UserWarning, match="runs 'blocked' on cuda.*triton is not installed"):
        assert choose("auto", torch.device("cuda")) == "blocked"


def test_tiny_batches() -> None:
    for n in range(1, 18):
        x, y = features(n)
        values = [third_order(impl=impl).double()(x, y, 14.3) for impl in ("blocked", "reference")]
        torch.testing.assert_close(*values)
        assert all(g.isfinite().all() for g in gradients(values[0], x, y))


def by_columns(x: Tensor) -> Tensor:
    return x.T


def first_half(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]


def test_inputs_of_any_layout_are_read_right_and_left_alone() -> None:
    x, y = (z.detach() for z in features())
    loss = third_order().double()
    kept = x.clone()
    plain = [z.clone().requires_grad_() for z in (x, y)]
    expected = gradients(loss(*plain, 14.3), *plain)
    columns = [z.T.contiguous().requires_grad_() for z in (x, y)]  # read by columns
    wide = [torch.stack([z, z], 1).flatten(1).requires_grad_() for z in (x, y)]  # every second row
    for leaves, view in ((columns, by_columns), (wide, first_half)):
        found = gradients(loss(*(view(z) for z in leaves), 14.3), *leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(view(a), b)
    value = loss(plain[0], plain[1], 14.3)
    torch.autograd.backward(3 * value, retain_graph=True)
    torch.autograd.backward(3 * value)  # twice: nothing was scaled in place
    torch.testing.assert_close(plain[0].grad, 6 * expected[0])
    assert torch.equal(x, kept)
    with torch.no_grad():
        torch.testing.assert_close(loss(x, y, 14.3), value.detach())
    repeated = x[:1].expand(8, -1)
    assert loss(repeated, y, 14.3).isfinite()


def test_repeated_captions_are_not_pushed_apart() -> None:
    x, y = (z.detach().clone() for z in features(2))
    y[1] = y[0]
    ids = torch.tensor([7, 7])
    assert ClipLoss()(x, y, 14.3) > 0.5  # each is the other's false negative
    assert ClipLoss()(x, y, 14.3, text_ids=ids) == 0
    leaf = y.requires_grad_()
    value = third_order(in_modal_weight=0.0).double()(x, leaf, 14.3, text_ids=ids)
    assert gradients(value, leaf)[0].abs().max() < 1e-12


@pytest.mark.parametrize("n", [0, 1])
def test_last_batches_of_one_or_no_pair(n: int) -> None:
    x, y = features(n)
    value = third_order().double()(x, y, 14.3)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in gradients(value, x, y))


def test_scales_of_shape_one_are_scalars() -> None:
    x, y = features()
    for loss in (third_order().double(), SigLipLoss()):
        scalar, vector = torch.tensor(14.3), torch.tensor([14.3])
        assert torch.equal(loss(x, y, scalar), loss(x, y, vector))


def test_statistics_tell_if_it_learns() -> None:
    x, _ = features(32)
    loss = RankCLIPLoss()
    loss(x, x, 100.0)
    assert loss.last_stats["match_top1"] == 1
    assert loss.last_stats["entropy"] < 0.1
    loss(x, torch.roll(x, 1, 0), 1e-3)
    assert loss.last_stats["match_top1"] < 0.1
    assert loss.last_stats["entropy"] > 0.99 * torch.tensor(32.0).log()  # it knows nothing


def test_cached_features_that_change_are_an_error() -> None:
    calls = iter(range(100))

    def encode(part: Tensor) -> dict[str, Tensor]:
        x = part + next(calls)  # state that a forward pass changes
        return {"image_features": normalize(x, dim=1), "text_features": normalize(x * x, dim=1)}

    leaf = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="differs when the part is encoded again"):
        GradCache(encode, ClipLoss())([leaf[:2], leaf[2:]], logit_scale=10.0)


def test_padding_of_a_list_has_no_weight() -> None:
    scores = torch.tensor([[0.0, -1.0, 50.0]], requires_grad=True)
    value = PlackettLuceLoss()(scores, torch.tensor([[1, 0, -100]]))
    short = PlackettLuceLoss()(scores[:, :2], torch.tensor([[1, 0]]))
    torch.testing.assert_close(value, short)
    gradient = gradients(value, scores)[0][0]
    assert gradient[0] < 0 < gradient[1]
    assert gradient[2] == 0


@pytest.mark.parametrize("labels", [[[1, 1, 1]], [[1, -100, -100]], [[-100, -100, -100]]])
def test_lists_without_order_are_zero(labels: list[list[int]]) -> None:
    scores = torch.randn(1, 3, requires_grad=True)
    value = PlackettLuceLoss()(scores, torch.tensor(labels))
    assert value == 0
    assert (gradients(value, scores)[0] == 0).all()


def test_the_first_place_has_the_first_weight() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64)
    ranking = torch.tensor([[0, 2, 1]])
    z = scores[0, ranking[0]]
    places = torch.stack([z[k:].logsumexp(0) - z[k] for k in range(3)])
    w = 1 / torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64).log()
    expected = places @ w / w.sum()
    torch.testing.assert_close(plackett_luce_nll(scores, ranking, discount="log"), expected)
    loss = PlackettLuceLoss(place_weights="log")
    torch.testing.assert_close(loss(scores, torch.tensor([[2, 0, 1]])), expected)


def test_near_certain_matches_keep_their_gradient() -> None:
    """p - 1 is computed in float32: bfloat16 would round it to 0, or by half of it."""
    scores = torch.tensor([[0.0, -8.0]], dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = gradients(plackett_luce_nll(scores, torch.tensor([[0]])), scores)
    exact = -1 / (1 + torch.tensor(8.0, dtype=torch.float64).exp())
    assert abs(gradient[0, 0].double() / exact - 1) < torch.finfo(torch.bfloat16).eps


def test_losses_of_each_anchor_have_weighted_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    tables = [torch.randn(n, 6, 3, generator=generator).double().requires_grad_() for n in (1, 1)]
    w = torch.linspace(-1, 2, 5, dtype=torch.float64)
    found = []
    for impl in ("blocked", "reference"):
        nll = plackett_luce_nll(
            scores, rankings(scores), Transitions(*tables), reduction="none", impl=impl
        )
        found.append(gradients((nll * w).sum(), scores, *tables))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


Compiled = tuple[list[torch.fx.Node], Tensor, Tensor]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Nodes that a compiler such as Inductor is given, compiled values, and the plain ones.

    The second scale makes floats symbols, which the first compilation takes for constants.
    """
    nodes: list[torch.fx.Node] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes.extend(graph.graph.nodes)
        return make_boxed_func(graph.forward)

    x, y = features(24, dtype=torch.float32)
    loss = third_order(top_k=16)
    compiled_loss = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    values = torch.stack([compiled_loss(x, y, scale) for scale in SCALES])
    torch.autograd.backward(values.sum())
    return nodes, values, torch.stack([loss(x, y, scale) for scale in SCALES])


def test_compiles_in_one_graph(compiled: Compiled) -> None:
    torch.testing.assert_close(compiled[1], compiled[2])


def values_in(nodes: list[torch.fx.Node]) -> list[Tensor]:
    found = [v for node in nodes if isinstance(v := node.meta.get("val"), Tensor)]
    assert found
    return found


def test_compilers_cannot_undo_the_tiles(compiled: Compiled) -> None:
    assert any("pair_loss" in str(node.target) for node in compiled[0])
    assert all(v.numel() < 24 * 16 * 24 for v in values_in(compiled[0]))  # none of N K M


def test_python_floats_do_not_become_float64(compiled: Compiled) -> None:
    assert not [v for v in values_in(compiled[0]) if v.dtype == torch.float64 and v.dim() > 0]


def test_no_state_advances_with_a_forward_pass() -> None:
    """Gradient accumulation calls forward several times a step."""
    x, y = features(dtype=torch.float32)
    loss = third_order()
    loss.set_progress(0.4)
    before = copy.deepcopy(loss.state_dict())
    values = {float(loss(x, y, 14.3).detach()) for _ in range(3)}
    assert len(values) == 1
    for key, value in loss.state_dict().items():
        assert torch.equal(value, before[key]), key

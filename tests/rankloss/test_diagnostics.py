"""Statistics of a loss: values by hand, and no cost until asked."""

import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import ClipLoss, HighOrderPLLoss, diagnostics, rankings
from tests.helpers.features import features, randomize
from tests.helpers.recorder import Recorder, inside_ops

# cosines [[0, 0.8, 0.6], [1, 0, 0], [0, 0.96, -0.28]], an image a row
IMAGES = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.6, -0.8]])
TEXTS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.8, -0.6], [0.0, 0.6, 0.8]])


def test_values_by_hand() -> None:
    loss = ClipLoss()
    loss(IMAGES, TEXTS, 10.0)
    stats = loss.last_stats
    scores = [[0.0, 8.0, 6.0], [10.0, 0.0, 0.0], [0.0, 9.6, -2.8]]
    transposed = [list(column) for column in zip(*scores, strict=True)]
    assert stats["scale"] == 10
    # image 0 prefers text 1, 1 text 0, 2 text 1; text 0 prefers image 1, 1 image 2, 2 image 0
    assert stats["match_top1"] == 0
    torch.testing.assert_close(stats["rank_agreement"], torch.tensor(1 / 3))

    def sign(x: float) -> int:
        return (x > 0) - (x < 0)

    tau = [
        sign(a[i] - a[j]) * sign(b[i] - b[j])
        for a, b in zip(scores, transposed, strict=True)
        for i, j in itertools.combinations(range(3), 2)
    ]
    torch.testing.assert_close(stats["kendall_tau"], torch.tensor(sum(tau) / 9))
    entropies = []
    for row in (*scores, *transposed):
        total = sum(math.exp(x) for x in row)
        entropies.append(-sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in row))
    torch.testing.assert_close(stats["entropy"], torch.tensor(sum(entropies) / 6))
    assert set(stats) == {"scale", "match_top1", "rank_agreement", "kendall_tau", "entropy"}


def test_perfect_agreement() -> None:
    """Identical towers rank alike, and find their match."""
    image, _ = features(9, dtype=torch.float32)
    loss = ClipLoss()
    loss(image, image, 10.0)
    stats = loss.last_stats
    assert stats["match_top1"] == stats["rank_agreement"] == 1
    torch.testing.assert_close(stats["kendall_tau"], torch.tensor(1.0))


def test_half_of_the_matches() -> None:
    """Both images prefer text 0; each text prefers its own image."""
    images = torch.eye(2)
    texts = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    loss = ClipLoss()
    loss(images, texts, 10.0)
    assert loss.last_stats["match_top1"] == 1
    loss(images, torch.tensor([[0.0, 1.0], [0.6, 0.8]]), 10.0)
    # image 0: (0, .6) -> 1, image 1: (1, .8) -> 0; text 0: (0, 1) -> 1, text 1: (.6, .8) -> 1
    assert loss.last_stats["match_top1"] == 0.25
    assert loss.last_stats["rank_agreement"] == 0.5


@pytest.mark.parametrize("share", [True, False], ids=["shared heads", "heads for each"])
def test_transition_sizes_by_hand(share: bool) -> None:
    """Root mean square of tau_m over anchors, places with m predecessors, and all candidates."""
    image, text = features(6)
    loss = HighOrderPLLoss(8, 3, transition_dim=4, share_transitions=share).double()
    randomize(loss)
    loss(image, text, 10.0)
    ranking = rankings(text @ image.T).tolist()  # targets of the images' lists of texts
    head = loss.transition_heads[-1]
    with torch.no_grad():
        predecessors, keys = head(text)
    squares: dict[int, list[float]] = {1: [], 2: []}
    for order, k in itertools.product(range(6), range(6)):
        taken = ranking[order][:k]
        for m in range(1, min(k, 2) + 1):
            first = m * (m - 1) // 2
            query = torch.stack([predecessors[first + j - 1][taken[-j]] for j in range(1, m + 1)])
            squares[m] += (keys[m - 1] @ query.prod(0)).square().tolist()
    for m, values in squares.items():
        rms = torch.tensor((sum(values) / len(values)) ** 0.5)
        torch.testing.assert_close(loss.last_stats[f"transition_{m}"], rms)
        largest = torch.tensor(max(values) ** 0.5)
        torch.testing.assert_close(loss.last_stats[f"transition_{m}_max"], largest)
    with torch.no_grad():
        for p in loss.parameters():
            p.zero_()
    loss(image, text, 10.0)
    assert loss.last_stats["transition_1"] == loss.last_stats["transition_2"] == 0


@pytest.mark.parametrize("n", [1, 2, 3, 127, 128, 129, 300])
@pytest.mark.parametrize("order", [0, 4])
def test_any_batch_size(order: int, n: int) -> None:
    image, text = features(n, dtype=torch.float32)
    loss = randomize(HighOrderPLLoss(8, order, transition_dim=4, top_k=2))
    loss(image, text, 10.0)
    stats = loss.last_stats
    for name, x in stats.items():
        assert x.shape == (), name
        assert x.dtype == torch.float32, name
        assert x.isfinite(), name
        assert not x.requires_grad, name
    assert -1 <= stats["kendall_tau"] <= 1
    assert 0 <= stats["match_top1"] <= 1
    assert stats["entropy"] <= math.log(n) + 1e-5
    if n == 1:
        assert stats["match_top1"] == stats["rank_agreement"] == 1
    if n > 128:  # a sample, close to the whole
        whole = diagnostics._kendall_tau(image @ text.T, text @ image.T)
        assert abs(stats["kendall_tau"] - whole) < 0.1


def test_empty_batch() -> None:
    loss = ClipLoss()
    loss(*features(0), 10.0)
    assert loss.last_stats == {"scale": torch.tensor(10.0)}


@pytest.mark.parametrize("order", [0, 3])
def test_statistics_after_functional_transforms(order: int) -> None:
    """Gradients leave the statistics of their batch; vmap has no one batch to tell about."""
    image, text = features(9, dtype=torch.float32, grad=False)
    loss = randomize(HighOrderPLLoss(8, order, transition_dim=4))
    loss(image, text, 10.0)
    plain = loss.last_stats
    torch.func.grad(lambda x: loss(x, text, 10.0))(image)
    assert loss.last_stats.keys() == plain.keys()
    for name, x in loss.last_stats.items():
        assert torch.equal(x, plain[name]), name
    torch.vmap(lambda x: loss(x, text, 10.0))(image.expand(2, 9, 8))
    assert loss.last_stats == {}


# ---------------------------------------------------------------- cost


def test_nothing_is_kept_when_told_so() -> None:
    loss = HighOrderPLLoss(8, 3, keep_stats=False)
    image, text = features(9)
    loss(image, text, 10.0).backward()
    held = [weakref.ref(image), weakref.ref(text)]
    del image, text
    assert [x() for x in held] == [None, None]
    assert loss.last_stats == {}


@pytest.mark.parametrize("order", [0, 3])
def test_reading_streams_over_anchors(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No N x M tensor is made, and chunks of any size give the same numbers."""
    image, text = features(600, dtype=torch.float32)
    loss = randomize(HighOrderPLLoss(8, order, transition_dim=4, top_k=2))
    loss(image, text, 10.0)
    whole = loss.last_stats
    for chunk in (600, 7_000, 128**3):
        monkeypatch.setattr(diagnostics, "CHUNK", chunk)
        with Recorder() as recorder:
            stats = loss.last_stats
        assert recorder.largest <= max(128**3, 128 * 600)  # the samples' own sizes
        for name, x in whole.items():
            torch.testing.assert_close(stats[name], x)
    monkeypatch.setattr(diagnostics, "SAMPLE", 4)
    monkeypatch.setattr(diagnostics, "CHUNK", 7_000)
    with Recorder() as recorder:
        assert loss.last_stats
    assert recorder.largest < 16_000 < 600 * 600


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists operations, and refuses those that wait for a device."""

    BANNED = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self, *allowed: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.banned = set(self.BANNED) - set(allowed)
        self.names: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in self.banned, f"{name} would synchronise"
        result = func(*args, **(kwargs or {}))
        self.names.append(name)
        if isinstance(result, Tensor) and result.is_meta:
            given = [x for x in args if isinstance(x, Tensor) and not x.is_meta]
            if given and name in ("_to_copy", "copy_"):
                self.copies.append(name)
        return result


OPTIONS: dict[str, dict[str, Any]] = {
    "order 0": {"order": 0},
    "order 1": {"order": 1},
    "order 3": {"order": 3, "embed_dim": 8},
    "partial, self out": {"order": 3, "embed_dim": 8, "top_k": 2, "exclude_self": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("with_ids", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_step_never_waits_for_the_device(
    device: str, with_ids: bool, options: dict[str, Any]
) -> None:
    """After the first call, which reads the norms of the features."""
    loss = HighOrderPLLoss(**options).to(device)
    ids = {"image_ids": (torch.arange(9) // 2).to(device)} if with_ids else {}
    for watched in (False, True):
        image, text = (x.detach().to(device).requires_grad_() for x in features(9))
        scale = torch.tensor(10.0, device=device, requires_grad=True)
        if not watched:
            loss(image, text, scale, **ids).backward()
            continue
        # on a CPU a value may be read, which costs no waiting; without memory, none can be
        allowed = ["_local_scalar_dense"] if device == "cpu" else []
        with inside_ops(), Watch(*allowed) as watch:
            loss(image, text, scale, **ids).backward()
        assert any("mm" in name for name in watch.names)
        assert not watch.copies


class NoHostValues(TorchFunctionMode):
    """Refuses tensors made from Python values: on a GPU each is a copy that waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor), "copied from the host"
        return func(*args, **(kwargs or {}))


def test_a_float_scale_is_not_copied_from_the_host() -> None:
    """Such a copy waits for the device, and cannot be captured in a CUDA graph."""
    loss, (image, text) = ClipLoss(), features(9)
    with NoHostValues():
        loss(image, text, 10.0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_nothing_is_computed_unless_read(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward leaves detached features behind: no operation, no graph, no N x M tensor."""
    image, text = features(9)
    loss = randomize(HighOrderPLLoss(**options)).double()
    reads: list[diagnostics.Snapshot] = []
    monkeypatch.setattr("rankloss.ranking.summarize", reads.append)
    loss(image, text, torch.tensor(10.0))  # the first call reads the norms
    names = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr("rankloss.ranking.take_snapshot", lambda *_: None)
        with Watch() as watch:
            torch.autograd.grad(loss(image, text, torch.tensor(10.0)), image)
        names.append([x for x in watch.names if x != "detach"])
        if kept:
            assert not reads
            assert loss.last_stats is None
    assert names[0] == names[1]
    batch, scale, transitions = reads[0]
    tables = [x for tables in transitions.values() for x in tables]
    assert not any(x.requires_grad for x in (*batch, scale, *tables))
    assert max(x.numel() for x in (*batch, scale)) == image.numel()

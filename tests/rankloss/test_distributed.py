"""Several processes must compute what one process computes on the global batch."""

import importlib.util
import pickle
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import ClipLoss, HighOrderPLLoss
from tests.helpers.processes import ProcessGroup
from tests.helpers.towers import (
    CUT,
    EMBED,
    EXACT,
    Batch,
    FeatureTowers,
    Gradients,
    Settings,
    Towers,
    assert_same,
    in_one_process,
    local,
    make_batch,
    towers_and_rest,
    with_duplicates,
)


def in_this_process(
    settings: Settings, batch: Batch, wrap: Callable[[nn.Module], nn.Module] | None = None
) -> tuple[Tensor, Gradients]:
    """Loss of this process's rows, gradients after DDP's averaging. Runs in the workers."""
    model = Towers(settings)
    parallel = DistributedDataParallel(model if wrap is None else wrap(model))
    value = parallel(**local(batch))
    value.backward()
    return value.detach(), model.gradients()


# ---------------------------------------------------------------- the default is exact

VARIANTS: dict[str, Settings] = {
    "order 0": {"order": 0},
    "order 1": {"order": 1},
    "order 3": {"order": 3},
    "exclude_self": {"order": 3, "exclude_self": True},
    "top_k": {"order": 3, "top_k": 4, "discount": "log"},
    "heads apart": {"order": 3, "share_transitions": False},
    "reference": {"order": 3, "impl": "reference"},
}


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("mode", EXACT, ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_one_process(
    groups: dict[int, ProcessGroup], variant: str, world: int, mode: Settings, duplicates: bool
) -> None:
    batch = with_duplicates(make_batch()) if duplicates else make_batch()
    value, gradients = in_one_process(VARIANTS[variant], batch)
    results = groups[world].run(in_this_process, {**VARIANTS[variant], **mode}, batch)
    for _, actual in results:
        assert_same(actual, gradients)
    values = torch.stack([x for x, _ in results])
    torch.testing.assert_close(values.mean(), value, rtol=0, atol=1e-12)
    if not mode["local_loss"]:
        torch.testing.assert_close(values, value.expand(world), rtol=0, atol=1e-12)


def _frozen_image_tower(settings: Settings, batch: Batch) -> Gradients:
    model = Towers(settings)
    model.image.requires_grad_(False)
    parallel = DistributedDataParallel(model)
    parallel(**local(batch)).backward()
    return model.gradients()


@pytest.mark.parametrize("mode", EXACT, ids=str)
def test_a_frozen_tower(groups: dict[int, ProcessGroup], mode: Settings) -> None:
    _, expected = in_one_process({"order": 3}, make_batch())
    expected = {n: x for n, x in expected.items() if not n.startswith("image")}
    for actual in groups[2].run(_frozen_image_tower, {"order": 3, **mode}, make_batch()):
        assert_same(actual, expected)


def _without_grad(settings: Settings, batch: Batch) -> Tensor:
    with torch.no_grad():
        loss: Tensor = Towers(settings).eval()(**local(batch))
    return loss


@pytest.mark.parametrize("mode", EXACT + CUT, ids=str)
def test_values_without_grad(groups: dict[int, ProcessGroup], mode: Settings) -> None:
    value, _ = in_one_process({"order": 3}, make_batch())
    values = groups[4].run(_without_grad, {"order": 3, **mode}, make_batch())
    torch.testing.assert_close(torch.stack(values).mean(), value, rtol=0, atol=1e-12)


def _squared_gradient(batch: Batch) -> list[Tensor]:
    """d/dx of sum over all processes of |d(sum of the losses)/dx|^2, for this process's x."""
    model = Towers({"order": 3, "impl": "reference"})
    features = model.features(**batch)
    leaves = [features[name].detach().requires_grad_() for name in list(features)[:2]]
    loss = model.loss(*leaves, features["logit_scale"].detach())
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    squares = torch.stack([x.square().sum() for x in gradients]).sum()
    return list(torch.autograd.grad(squares, leaves))


def _local_squared_gradient(batch: Batch) -> list[Tensor]:
    return _squared_gradient(local(batch))


@pytest.mark.parametrize("world", [2, 4])
def test_second_derivatives_cross_processes(groups: dict[int, ProcessGroup], world: int) -> None:
    expected = _squared_gradient(make_batch())  # world^2 smaller: the loss is a mean, not a sum
    parts = zip(*groups[world].run(_local_squared_gradient, make_batch()), strict=True)
    for actual, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(torch.cat(actual), wanted * world**2, rtol=0, atol=1e-11)


# ---------------------------------------------------------------- open_clip's modes


def _open_clip_loss() -> Any:
    """open_clip's own class, from its file: the package around it imports a vision stack."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        pytest.skip("open_clip is not installed")
    file = Path(package.origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss


def _open_clip_and_ours(mode: Settings, batch: Batch) -> list[tuple[Tensor, Gradients]]:
    place: Settings = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    results = []
    for loss in (_open_clip_loss()(**mode, **place), ClipLoss(**mode, **place)):
        model = FeatureTowers({"order": 0})
        parallel = DistributedDataParallel(model)
        with warnings.catch_warnings():  # open_clip's gather has a new name in newer torch
            warnings.filterwarnings("ignore", "torch.distributed.nn", FutureWarning)
            value = sum(loss(**parallel(**local(batch)), output_dict=True).values())
            value.backward()
        results.append((value.detach(), model.gradients()))
    return results


@pytest.mark.parametrize("mode", EXACT + CUT, ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_modes_are_open_clips(groups: dict[int, ProcessGroup], world: int, mode: Settings) -> None:
    _open_clip_loss()
    exact = in_one_process({"order": 0}, make_batch())[1]
    for theirs, ours in groups[world].run(_open_clip_and_ours, mode, make_batch()):
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
        assert_same(ours[1], theirs[1])
        difference = (ours[1]["image.weight"] - exact["image.weight"]).abs().max()
        assert (difference < 1e-12) == (world == 1 or mode["gather_with_grad"])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("duplicates", [False, True])
def test_global_loss_without_gradient_in_the_gather(
    groups: dict[int, ProcessGroup], world: int, duplicates: bool
) -> None:
    """open_clip's default: towers get 1/world_size of the gradient, scale and heads all of it."""
    batch = with_duplicates(make_batch()) if duplicates else make_batch()
    value, exact = in_one_process({"order": 3}, batch)
    towers, rest = towers_and_rest(exact)
    expected = {n: x / world for n, x in towers.items()} | rest
    for actual_value, actual in groups[world].run(in_this_process, {"order": 3, **CUT[1]}, batch):
        assert_same(actual, expected)
        torch.testing.assert_close(actual_value, value, rtol=0, atol=1e-12)


def test_local_loss_without_gradient_in_the_gather(groups: dict[int, ProcessGroup]) -> None:
    """Candidates are constants: scale and heads are exact, towers see anchors only."""
    _, exact = in_one_process({"order": 3}, make_batch())
    settings = {"order": 3, **CUT[0]}
    two = groups[2].run(in_this_process, settings, make_batch())
    four = groups[4].run(in_this_process, settings, make_batch())
    for _, actual in two + four:
        assert_same(actual, two[0][1])
        assert_same(towers_and_rest(actual)[1], towers_and_rest(exact)[1])
        assert (actual["image.weight"] - exact["image.weight"]).abs().max() > 1e-3


# ---------------------------------------------------------------- accumulation


def _accumulate_like_open_clip(
    settings: Settings, batch: Batch, steps: int
) -> tuple[Tensor, Gradients]:
    """Features of all micro-batches cached without gradient, then one backward for each."""
    model = FeatureTowers(settings)
    parallel = DistributedDataParallel(model)
    parts = {name: x.chunk(steps) for name, x in local(batch).items()}
    micro = [{name: x[j] for name, x in parts.items()} for j in range(steps)]
    with torch.no_grad():
        cache = [parallel(**inputs) for inputs in micro]
    values = []
    for j, inputs in enumerate(micro):
        fresh = parallel(**inputs)
        features = [*cache[:j], fresh, *cache[j + 1 :]]
        joined = {
            name: torch.cat([x[name] for x in features])
            for name in ("image_features", "text_features")
        }
        value = model.loss(**joined, logit_scale=fresh["logit_scale"])
        value.backward()
        values.append(value.detach())
    return torch.stack(values), model.gradients()


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("mode", EXACT, ids=str)
@pytest.mark.parametrize(("world", "steps"), [(1, 3), (2, 2), (2, 3)])
@pytest.mark.parametrize("order", [0, 3])
def test_accumulation_with_cached_features(
    groups: dict[int, ProcessGroup],
    order: int,
    world: int,
    steps: int,
    mode: Settings,
    corrected: bool,
) -> None:
    """Towers get the gradient of the whole batch, all micro-batches of all processes, once:
    each backward contributes its own micro-batch's rows. Scale and heads take part in each, so
    they get `steps` times theirs, which `accum_freq` divides out; the value stays."""
    value, exact = in_one_process({"order": order}, make_batch())
    settings = {"order": order, **mode}
    if corrected:
        settings["accum_freq"] = steps
    else:
        towers, rest = towers_and_rest(exact)
        exact = towers | {n: steps * x for n, x in rest.items()}
    results = groups[world].run(_accumulate_like_open_clip, settings, make_batch(), steps)
    for _, actual in results:
        assert_same(actual, exact)
    values = torch.stack([x for x, _ in results]).mean(0)
    torch.testing.assert_close(values, value.expand(steps), rtol=0, atol=1e-12)


def _accumulate_plainly(batches: list[Batch]) -> Gradients:
    model = Towers({"order": 3})
    parallel = DistributedDataParallel(model)
    with parallel.no_sync():
        for batch in batches[:-1]:
            (parallel(**local(batch)) / len(batches)).backward()
    (parallel(**local(batches[-1])) / len(batches)).backward()
    return model.gradients()


def test_accumulation_under_no_sync(groups: dict[int, ProcessGroup]) -> None:
    """The mean of the losses of separate global batches."""
    batches = [make_batch(seed=seed) for seed in (1, 2, 3)]
    each = [in_one_process({"order": 3}, batch)[1] for batch in batches]
    expected = {name: torch.stack([x[name] for x in each]).mean(0) for name in each[0]}
    for actual in groups[2].run(_accumulate_plainly, batches):
        assert_same(actual, expected)


def _two_forwards_one_backward(batches: list[Batch]) -> Gradients:
    model = Towers({"order": 3})
    parallel = DistributedDataParallel(model)
    values = [parallel(**local(batch)) for batch in batches]
    torch.autograd.backward(values)
    return model.gradients()


def test_two_forwards_before_a_backward(groups: dict[int, ProcessGroup]) -> None:
    """Two views in one step; DDP rewrites buffers in each forward."""
    batches = [make_batch(seed=seed) for seed in (1, 2)]
    each = [in_one_process({"order": 3}, batch)[1] for batch in batches]
    expected = {name: each[0][name] + each[1][name] for name in each[0]}
    for actual in groups[2].run(_two_forwards_one_backward, batches):
        assert_same(actual, expected)


# ---------------------------------------------------------------- uneven and empty batches


def _uneven(settings: Settings, batch: Batch, sizes: list[int]) -> tuple[str, Tensor, Gradients]:
    model = Towers(settings)
    with pytest.raises(ValueError, match="uneven") as error:
        model(**local(batch, sizes))
    return str(error.value), *in_this_process(settings, batch)  # the group still works


@pytest.mark.parametrize("mode", EXACT + CUT, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [[7, 5], [5, 7], [12, 0], [0, 12], [3, 3, 4, 2], [4, 4, 4, 0], [0, 4, 4, 4], [3, 2, 3, 4]],
    ids=str,
)
def test_uneven_batches_raise_on_every_rank(
    groups: dict[int, ProcessGroup], sizes: list[int], mode: Settings
) -> None:
    batch = with_duplicates(make_batch())
    results = groups[len(sizes)].run(_uneven, {"order": 3, **mode}, batch, sizes)
    for message, _, gradients in results:
        assert str(sizes) in message
        assert "drop_last" in message
        assert_same(gradients, results[0][2])


@pytest.mark.parametrize("mode", EXACT + CUT, ids=str)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_empty_batches_everywhere(
    groups: dict[int, ProcessGroup], order: int, mode: Settings
) -> None:
    batch = {name: x[:0] for name, x in with_duplicates(make_batch()).items()}
    names = dict(Towers({"order": order}).named_parameters()).keys()
    for value, gradients in groups[2].run(in_this_process, {"order": order, **mode}, batch):
        assert value == 0
        assert gradients.keys() == names
        assert all((x == 0).all() for x in gradients.values())


def _train_twice(settings: Settings, pairs: int) -> bool:
    """DDP refuses a second step after a parameter received no gradient."""
    parallel = DistributedDataParallel(Towers(settings))
    for _ in range(2):
        parallel(**local(make_batch(pairs))).backward()
    return all(p.grad is not None and p.grad.isfinite().all() for p in parallel.parameters())


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"order": 5}, 2),
        ({"order": 3, "top_k": 2}, 8),
        ({"order": 3, "cross_modal_weight": 0.0}, 8),
        ({"order": 3, "in_modal_weight": 0.0, "share_transitions": False}, 8),
        ({"order": 3, "contrastive_weight": 0.0}, 8),
        ({"order": 2, "exclude_self": True, "cross_modal_weight": 0.0}, 2),
    ],
    ids=str,
)
def test_every_parameter_takes_part(
    groups: dict[int, ProcessGroup], settings: Settings, pairs: int
) -> None:
    assert all(groups[2].run(_train_twice, settings, pairs))


# ---------------------------------------------------------------- rank and world_size


def _given(rank_shift: int | None, world_shift: int | None, batch: Batch) -> Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    given = {
        "rank": None if rank_shift is None else rank + rank_shift,
        "world_size": None if world_shift is None else world + world_shift,
    }
    value: Tensor = Towers({"order": 0, **given})(**local(batch)).detach()
    return value


@pytest.mark.parametrize("shifts", [(0, 0), (None, 0), (0, None)])
def test_matching_rank_and_world_size(
    groups: dict[int, ProcessGroup], shifts: tuple[int | None, int | None]
) -> None:
    value, _ = in_one_process({"order": 0}, make_batch())
    values = groups[2].run(_given, *shifts, make_batch())
    torch.testing.assert_close(torch.stack(values).mean(), value, rtol=0, atol=1e-12)


def _wrongly_given(rank_shift: int | None, world_shift: int | None, batch: Batch) -> str:
    with pytest.raises(ValueError, match="the process group has rank=") as error:
        _given(rank_shift, world_shift, batch)
    return str(error.value)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("shifts", [(1, 0), (-1, 0), (None, 1), (None, -1), (1, None), (0, 2)])
def test_contradicting_rank_or_world_size(
    groups: dict[int, ProcessGroup], shifts: tuple[int | None, int | None], world: int
) -> None:
    for rank, message in enumerate(groups[world].run(_wrongly_given, *shifts, make_batch())):
        assert f"has rank={rank}, world_size={world};" in message


@pytest.mark.parametrize("given", [{"world_size": 2}, {"rank": 1}, {"rank": 1, "world_size": 2}])
def test_world_size_without_a_process_group(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"no process group.*init_process_group"):
        Towers({"order": 0, **given})(**make_batch())
    single = Towers({"order": 0, "rank": 0, "world_size": 1})(**make_batch())
    torch.testing.assert_close(single, in_one_process({"order": 0}, make_batch())[0])


def _unpickled(pickled: bytes, batch: Batch) -> Tensor:
    value: Tensor = pickle.loads(pickled)(**local(batch)).detach()
    return value


def test_a_loss_built_before_the_process_group(groups: dict[int, ProcessGroup]) -> None:
    value, _ = in_one_process({"order": 3}, make_batch())
    values = groups[2].run(_unpickled, pickle.dumps(Towers({"order": 3})), make_batch())
    torch.testing.assert_close(torch.stack(values).mean(), value, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the loss's own parameters


def _fresh_heads() -> tuple[Batch, Tensor]:
    """Weights of heads built under this process's own seed, and the next random number."""
    torch.manual_seed(dist.get_rank())
    random.seed(dist.get_rank())
    loss = HighOrderPLLoss(EMBED, 4, share_transitions=False)
    return dict(loss.state_dict()), torch.rand(())


def test_heads_start_equal_whatever_the_seed(groups: dict[int, ProcessGroup]) -> None:
    results = groups[4].run(_fresh_heads)
    assert len({float(x) for _, x in results}) == 4  # the seeds did differ
    assert len(results[0][0]) == 5
    for weights, _ in results:
        for name, x in weights.items():
            assert torch.equal(x, results[0][0][name])


def _train(steps: int, where: Callable[[Batch], Batch], parallel: nn.Module) -> Batch:
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.03)
    for step in range(steps):
        optimizer.zero_grad()
        parallel(**where(make_batch(seed=step))).backward()
        optimizer.step()
    return {name.removeprefix("module."): p.detach() for name, p in parallel.named_parameters()}


def _train_in_parallel(steps: int) -> Batch:
    torch.manual_seed(dist.get_rank())
    return _train(steps, local, DistributedDataParallel(Towers({"order": 3})))


def test_training_stays_equal_on_all_ranks(groups: dict[int, ProcessGroup]) -> None:
    before = dict(Towers({"order": 3}).named_parameters())
    after = _train(6, lambda batch: batch, Towers({"order": 3}))
    results = groups[4].run(_train_in_parallel, 6)
    for actual in results:
        assert all(torch.equal(x, results[0][name]) for name, x in actual.items())
        assert all((x - before[name]).abs().max() > 0.03 for name, x in actual.items())
        assert_same(actual, after, atol=1e-8)  # AdamW magnifies rounding of small gradients


# ---------------------------------------------------------------- torch.compile


def _compiled(settings: Settings, batches: list[Batch], outside: bool) -> list[Any]:
    """Gradients for batches of several sizes, the model compiled in DDP or DDP compiled."""
    torch._dynamo.reset()
    warnings.resetwarnings()  # the compiler causes some of its own
    model = Towers(settings)
    if outside:
        parallel: Any = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    else:
        inside: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        parallel = DistributedDataParallel(inside)
    results = []
    for batch in batches:
        value = parallel(**local(batch))
        value.backward()
        results.append((value.detach(), model.gradients()))
        model.zero_grad()
    return results


@pytest.mark.parametrize(
    ("settings", "outside", "sizes"),
    [
        ({"order": 3}, False, [12]),
        ({"order": 1}, True, [12]),
        ({"order": 0, **CUT[1]}, False, [12, 8, 6]),
    ],
    ids=str,
)
def test_compiled(
    groups: dict[int, ProcessGroup], settings: Settings, outside: bool, sizes: list[int]
) -> None:
    batches = [with_duplicates(make_batch(pairs)) for pairs in sizes]
    eager = [groups[2].run(in_this_process, settings, batch) for batch in batches]
    compiled = groups[2].run(_compiled, settings, batches, outside)
    for rank, results in enumerate(compiled):
        for (value, gradients), expected in zip(results, eager, strict=True):
            torch.testing.assert_close(value, expected[rank][0], rtol=0, atol=1e-12)
            assert_same(gradients, expected[rank][1])


def _compiled_uneven(batch: Batch, sizes: list[int]) -> str:
    torch._dynamo.reset()
    warnings.resetwarnings()
    compiled: Any = torch.compile(Towers({"order": 0}), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError) as error:
        compiled(**local(batch, sizes))
    return str(error.value)


def test_compiled_uneven_batches_raise_on_every_rank(groups: dict[int, ProcessGroup]) -> None:
    for message in groups[2].run(_compiled_uneven, make_batch(), [7, 5]):
        assert "drop_last" in message


# ---------------------------------------------------------------- half precision


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the floating dtypes that went through each collective."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace in ("c10d", "_c10d_functional"):
            for x in torch.utils._pytree.tree_leaves(args):
                if isinstance(x, Tensor) and x.is_floating_point():
                    self.seen.add((op._opname, x.dtype))
        return op(*args, **(kwargs or {}))


def _half(features: Batch, mode: Settings) -> tuple[Tensor, list[Tensor], Gradients, Any]:
    loss = Towers({"order": 3, **mode}).loss.float()
    mine = {n: x.clone().requires_grad_() for n, x in local(features).items()}
    with _Collectives() as collectives:
        value = loss(mine["images"], mine["texts"], 20.0)
        value.backward()
    heads = {n: p.grad for n, p in loss.named_parameters() if p.grad is not None}
    for x in heads.values():
        dist.all_reduce(x, dist.ReduceOp.AVG if x.is_cuda else dist.ReduceOp.SUM)
    gradients = [x.grad for x in mine.values() if x.grad is not None]
    return value.detach(), gradients, heads, collectives.seen


@pytest.mark.parametrize("mode", EXACT + CUT, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features(
    groups: dict[int, ProcessGroup], dtype: torch.dtype, mode: Settings
) -> None:
    """Exchanged in their own dtype, computed and summed in float32, gradients in their own."""
    world = 2
    batch = make_batch()
    model = Towers({"order": 3})
    whole = list(model.features(**batch).values())[:2]
    features = dict(zip(batch, [x.detach().to(dtype) for x in whole], strict=True))
    leaves = [x.clone().requires_grad_() for x in features.values()]
    loss = model.loss.float()
    value = loss(leaves[0], leaves[1], 20.0)
    value.backward()

    results = groups[world].run(_half, features, mode)
    values = torch.stack([x[0] for x in results])
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.mean(), value.detach(), rtol=1e-6, atol=0)
    for _, _, heads, seen in results:
        for name, p in loss.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(heads[name] / world, p.grad, rtol=1e-4, atol=1e-6)
        gathers = {d for name, d in seen if "gather" in name}
        sums = {d for name, d in seen if "reduce" in name}
        assert gathers == {dtype}
        assert sums == ({torch.float32} if mode["gather_with_grad"] else set())
    for parts, leaf in zip(zip(*(x[1] for x in results), strict=True), leaves, strict=True):
        assert leaf.grad is not None
        gradient = torch.cat(parts)
        assert gradient.dtype == dtype
        if mode["gather_with_grad"]:
            error = (gradient.double() / world - leaf.grad.double()).norm()
            assert error < 2 * torch.finfo(dtype).eps * leaf.grad.double().norm()


# ---------------------------------------------------------------- the harness


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("on purpose")


def _hang_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.all_reduce(torch.zeros(()))


def test_the_harness_reports_failures_and_hangs() -> None:
    group, impatient = ProcessGroup(2), ProcessGroup(2, task_seconds=2)
    try:
        with pytest.raises(RuntimeError, match=r"rank 1: Traceback[^$]*on purpose"):
            group.run(_fail_on_one)
        assert group.run(dist.get_rank) == [0, 1]
        with pytest.raises(RuntimeError, match=r"rank 1: exited[^$]*_hang_on_one"):
            impatient.run(_hang_on_one)
    finally:
        group.close()
        impatient.close()

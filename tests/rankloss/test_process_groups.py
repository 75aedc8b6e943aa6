"""Losses over a part of the processes, on one of them, and what processes tell each other."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rankloss import ALIPLoss, ClipLoss, CyCLIPLoss, HighOrderPLLoss, ITOLoss, SigLipLoss
from rankloss.agreement import Message, _confirmed, _reads
from tests.helpers.processes import ProcessGroup
from tests.helpers.towers import Batch, Gradients, Towers, assert_same, make_batch, with_duplicates

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "order 3": lambda **options: HighOrderPLLoss(7, 3, transition_dim=4, **options),
    "clip": ClipLoss,
    "siglip": SigLipLoss,
    "cyclip": CyCLIPLoss,
}
each_loss = pytest.mark.parametrize("name", LOSSES)


class Model(Towers):
    """The towers with any of the losses."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__({"order": 3})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.loss: nn.Module = LOSSES[name](**options)  # type: ignore[assignment]
            for parameter in self.loss.parameters():
                nn.init.normal_(parameter)
        self.double()


def alone(name: str, batch: Batch) -> tuple[Tensor, Gradients]:
    model = Model(name)
    value = model(**batch)
    value.backward()
    return value.detach(), model.gradients()


# ---------------------------------------------------------------- a part of the processes


def on_a_mesh(name: str, batch: Batch, options: dict[str, Any]) -> tuple[Tensor, Gradients]:
    """Two tensor-parallel processes hold the same half of the batch; DDP averages over data."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    data = mesh.get_group("dp")
    model = Model(name, process_group=data, **options)
    parallel = DistributedDataParallel(model, process_group=data)
    rank = mesh.get_local_rank("dp")
    value = parallel(**{k: x.chunk(2)[rank] for k, x in batch.items()})
    value.backward()
    return value.detach(), model.gradients()


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("local_loss", [False, True])
@each_loss
def test_replicas_are_no_negatives(
    groups: dict[int, ProcessGroup], name: str, local_loss: bool, duplicates: bool
) -> None:
    """2 x 2 processes have the value and the gradients of one process with the whole batch."""
    batch = with_duplicates(make_batch()) if duplicates else make_batch()
    value, expected = alone(name, batch)
    results = groups[4].run(on_a_mesh, name, batch, {"local_loss": local_loss})
    torch.testing.assert_close(torch.stack([x for x, _ in results]).mean(), value)
    for _, gradients in results:
        assert_same(gradients, expected)


def baselines_on_a_mesh(features: list[Tensor]) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    group, rank = mesh.get_group("dp"), mesh.get_local_rank("dp")
    v, t, c = (x.chunk(2)[rank] for x in features)
    return [
        ALIPLoss(process_group=group)(v, t, 5.0, caption_features=c),
        ITOLoss(0.0, process_group=group)(v, t, 5.0, other_view_features=c),
        ITOLoss(0.0, process_group=group)(v, t, 5.0, other_view_features=c, local=True),
    ]


def test_alip_and_ito_over_a_group(groups: dict[int, ProcessGroup]) -> None:
    g = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(6, 7, generator=g), dim=1) for _ in range(3)]
    v, t, c = features
    means = torch.tensor(groups[4].run(baselines_on_a_mesh, features)).mean(0)
    ito = ITOLoss(0.0)
    halves = [
        ito(*(x.chunk(2)[i] for x in (v, t)), 5.0, other_view_features=c.chunk(2)[i])
        for i in range(2)
    ]
    torch.testing.assert_close(means[0], ALIPLoss()(v, t, 5.0, caption_features=c))
    torch.testing.assert_close(means[1], ito(v, t, 5.0, other_view_features=c))
    torch.testing.assert_close(means[2], torch.stack(halves).mean())


def copies_of_a_loss(features: Tensor) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    loss = ClipLoss(process_group=mesh.get_group("dp"))
    expected = loss(features, features, 5.0)
    assert torch.equal(copy.deepcopy(loss)(features, features, 5.0), expected)
    loaded = pickle.loads(pickle.dumps(loss))
    with pytest.raises(ValueError, match=r"set loss\.process_group again, to None") as error:
        loaded(features, features, 5.0)
    loaded.process_group = mesh.get_group("dp")
    assert torch.equal(loaded(features, features, 5.0), expected)
    return str(error.value)


def test_copies_share_the_group_and_files_refuse_to_run(groups: dict[int, ProcessGroup]) -> None:
    groups[4].run(copies_of_a_loss, F.normalize(torch.randn(3, 4), dim=1))


def wrong_groups(features: Tensor) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    with pytest.raises(TypeError, match=r"got DeviceMesh; of a DeviceMesh, pass mesh\.get_group"):
        ClipLoss(process_group=mesh)(features, features, 5.0)  # type: ignore[arg-type]
    only_first: Any = dist.new_group([0])
    loss = ClipLoss(process_group=only_first)
    if dist.get_rank() == 0:
        loss(features, features, 5.0)
    else:
        with pytest.raises(ValueError, match="process 1 is not in the process_group"):
            loss(features, features, 5.0)


def test_wrong_groups(groups: dict[int, ProcessGroup]) -> None:
    groups[2].run(wrong_groups, F.normalize(torch.randn(3, 4), dim=1))


def test_a_group_without_torch_distributed() -> None:
    loss = ClipLoss(process_group=object())  # type: ignore[arg-type]
    features = F.normalize(torch.randn(3, 4), dim=1)
    with pytest.raises(ValueError, match="not initialized; pass local=True"):
        loss(features, features, 5.0)
    assert torch.equal(loss(features, features, 5.0, local=True), ClipLoss()(features, features, 5))


# ---------------------------------------------------------------- one process of a group


def evaluated_by_the_first(name: str, batch: Batch) -> Tensor | None:
    """Rank 1 never calls the loss; a message would wait for it."""
    if dist.get_rank():
        return None
    model = Model(name, rank=0, world_size=2).eval()
    with torch.no_grad():
        value: Tensor = model(**batch, local=True)
    return value


@each_loss
def test_one_process_can_evaluate(groups: dict[int, ProcessGroup], name: str) -> None:
    batch = with_duplicates(make_batch())
    value, nothing = groups[2].run(evaluated_by_the_first, name, batch)
    torch.testing.assert_close(value, alone(name, batch)[0], rtol=0, atol=1e-12)
    assert nothing is None


# ---------------------------------------------------------------- disagreement


def call(fault: str, rank: int) -> tuple[Any, ...]:
    """Arguments of a loss; rank 1's differ in one respect."""
    odd = rank == 1
    n, d = (3, 6 if fault == "width" and odd else 8)
    dtype = torch.float64 if fault == "dtype" and odd else torch.float32
    grad = not (fault == "gradient" and odd)
    v, t = (F.normalize(torch.randn(n, d, dtype=dtype), dim=1) for _ in range(2))
    ids = torch.arange(n) if fault == "ids" and odd else None
    if fault == "which ids":
        image, text = (ids, torch.arange(n)) if odd else (torch.arange(n), ids)
    else:
        image, text = ids, None
    if fault == "refused" and odd:
        v = v.long()
    return v.requires_grad_(grad and v.is_floating_point()), t, image, text


FAULTS = {
    "width": "n=3, D=6",
    "dtype": "torch.float64",
    "ids": "ids: image_ids",
    "which ids": "ids: text_ids",
    "gradient": r"gradients: \[False, False\]",
    "refused": "process 1: refused its input",
}


def disagreeing(name: str, fault: str, features: Tensor) -> str:
    v, t, image, text = call(fault, dist.get_rank())
    loss = LOSSES[name]()
    if name == "order 3":
        loss = HighOrderPLLoss(8, 3)
    error = TypeError if fault == "refused" and dist.get_rank() else ValueError
    with pytest.raises(error) as caught:
        loss(v, t, 5.0, image_ids=image, text_ids=text)
    loss(features, features, 5.0)  # the group still works
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
@each_loss
def test_disagreement_raises_everywhere(
    groups: dict[int, ProcessGroup], name: str, fault: str
) -> None:
    """Instead of hanging in, or aborting, a collective whose sizes differ."""
    features = F.normalize(torch.randn(3, 8), dim=1)
    first, second = groups[2].run(disagreeing, name, fault, features)
    if name == "order 3" and fault == "width":  # built for one width: the odd process refuses
        assert "process 1: refused its input" in first
        assert "embed_dim=8" in second
        return
    assert re.search(FAULTS[fault], first)
    if fault == "refused":
        assert "must be floating point" in second
    else:
        assert first == second


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives by the dtype of what they exchange."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d" and "gather" in op._opname:
            self.dtypes.append(args[0].dtype)
        return op(*args, **(kwargs or {}))


def exchanged(name: str, features: Tensor, both: bool) -> list[torch.dtype]:
    loss, ids = LOSSES[name](), torch.arange(len(features), dtype=torch.int32)
    with Counted() as counted:
        loss(features, features, 5.0, image_ids=ids if both else None, text_ids=ids)
    dtypes: list[torch.dtype] = counted.dtypes
    return dtypes


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_ids_travel_together(groups: dict[int, ProcessGroup], name: str, both: bool) -> None:
    """One message, one collective for ids, one for each kind of features that is needed."""
    features = F.normalize(torch.randn(3, 7), dim=1)
    wanted = [torch.int64] * 2 + [torch.float32] * (2 if name == "clip" else 1)
    assert groups[2].run(exchanged, name, features, both) == [wanted] * 2


def read_on_a_gpu() -> list[bool]:
    """Say if a message would be read: new, and then known; no GPU takes part."""
    message = Message(1, 999, 8, 22, 0, 0)  # of a size that no other test sends
    group = dist.group.WORLD
    assert group is not None
    gpu = torch.device("cuda")
    reads = [_reads(message, group, gpu)]
    _confirmed.add((group.group_name, message))
    reads.append(_reads(message, group, gpu))
    reads.append(_reads(message._replace(rows=4), group, gpu))
    reads.append(_reads(message, group, torch.device("cpu")))
    c10d: Any = dist
    before = c10d.get_debug_level()
    c10d.set_debug_level(c10d.DebugLevel.INFO)
    try:
        reads.append(_reads(message, group, gpu))
    finally:
        c10d.set_debug_level(before)
    return reads


def test_a_gpu_waits_for_new_messages_only(groups: dict[int, ProcessGroup]) -> None:
    assert groups[2].run(read_on_a_gpu) == [[True, False, True, True, True]] * 2


# ---------------------------------------------------------------- tensors spread over processes


def spread_features(features: Tensor) -> None:
    mesh: DeviceMesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    for placement in (Shard(0), Replicate()):
        spread = distribute_tensor(features, mesh, [placement])
        for arguments in ((spread, features, 5.0), (features, features, spread.sum())):
            with pytest.raises(TypeError, match=r"is a DTensor.*to_local\(\)"):
                ClipLoss()(*arguments)
    own = distribute_tensor(features, mesh, [Shard(0)]).to_local().bfloat16()
    one = torch.ones(1, dtype=torch.bfloat16)
    assert ClipLoss()(own, own, one).dtype == torch.float32


def test_spread_features_are_refused(groups: dict[int, ProcessGroup]) -> None:
    groups[2].run(spread_features, F.normalize(torch.randn(4, 8), dim=1))

"""Features cached in parts must leave the gradient of the whole batch."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rankloss import HighOrderPLLoss
from rankloss.grad_cache import GradCache
from tests.helpers.processes import ProcessGroup
from tests.helpers.towers import assert_same

Part = dict[str, Tensor]
SIZES = [3, 5, 4]


class Model(nn.Module):
    """Two towers with dropout, a scale, and a loss with parameters of its own inside."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.image = nn.Sequential(nn.Linear(5, 7), nn.Dropout(dropout), nn.Linear(7, 7))
            self.text = nn.Sequential(nn.Linear(6, 7), nn.Dropout(dropout), nn.Linear(7, 7))
            self.loss = HighOrderPLLoss(7, 3, transition_dim=4)
            for name, p in self.loss.named_parameters():
                if "key" in name:
                    nn.init.normal_(p)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.double()

    def forward(self, images: Tensor, texts: Tensor, ids: Tensor) -> dict[str, Any]:
        return {
            "image_features": F.normalize(self.image(images), dim=1),
            "text_features": F.normalize(self.text(texts), dim=1),
            "logit_scale": self.log_scale.exp(),
            "text_ids": ids,
            "output_dict": True,
        }

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def make_parts(sizes: list[int], seed: int = 1) -> list[Part]:
    g = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(sum(sizes), d, generator=g, dtype=torch.float64) for d in (5, 6))
    ids = torch.arange(sum(sizes))
    ids[-1] = 0  # the same caption, in the first and in the last part
    pieces = zip(*(torch.split(x, sizes) for x in (images, texts, ids)), strict=True)
    return [{"images": x, "texts": y, "ids": z} for x, y, z in pieces]


def loss_at_once(model: Model, parts: list[Part]) -> Tensor:
    outputs = [model(**part) for part in parts]
    images, texts, ids = (
        torch.cat([x[name] for x in outputs])
        for name in ("image_features", "text_features", "text_ids")
    )
    value: Tensor = model.loss(images, texts, outputs[-1]["logit_scale"], text_ids=ids)
    return value


def at_once(model: Model, parts: list[Part]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all parts with all activations kept, as autograd has it."""
    value = loss_at_once(model, parts)
    torch.autograd.backward(value)
    gradients = model.gradients()
    assert len(gradients) == len(list(model.parameters()))
    assert all(x.abs().max() > 1e-5 for x in gradients.values())
    return value.detach(), gradients


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [[12], SIZES], ids=str)
def test_parts_have_the_gradient_of_the_whole(sizes: list[int], dropout: float) -> None:
    parts = make_parts(sizes)
    torch.manual_seed(3)
    value, expected = at_once(Model(dropout), parts)
    after = torch.rand(())
    model = Model(dropout)
    torch.manual_seed(3)
    terms = GradCache(lambda part: model(**part), model.loss)(parts)
    assert isinstance(terms, dict)
    assert terms.keys() == {"contrastive_loss", "ranking_loss"}
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), value)
    assert_same(model.gradients(), expected)
    assert torch.rand(()) == after  # random numbers go on as after a single pass


def test_gradients_are_added_to_those_there_are() -> None:
    parts, model = make_parts(SIZES), Model()
    _, expected = at_once(Model(), parts)
    step = GradCache(lambda part: model(**part), model.loss)
    step(parts)
    step(parts)
    assert_same(model.gradients(), {name: 2 * x for name, x in expected.items()})


def test_outputs_of_other_kinds() -> None:
    """Lists are joined, scalars and what is no tensor passed on, frozen outputs left alone."""
    model, frozen = (nn.Linear(5, 3).double() for _ in range(2))
    frozen.requires_grad_(False)
    seen: dict[str, Any] = {}

    def encode(part: Part) -> dict[str, Any]:
        x = part["images"]
        other: dict[str, Any] = {"keys": [len(x)], "temperature": x.new_full((), 2.0), "name": "a"}
        return {"own": model(x), "other": frozen(x), **other}

    def loss(own: Tensor, other: Tensor, **rest: Any) -> Tensor:
        seen.update(rest)
        return (own @ other.T).logsumexp(1).mean()

    value = GradCache(encode, loss)(make_parts(SIZES), more=1)
    assert (seen["keys"], seen["name"], seen["more"]) == (SIZES, "a", 1)
    assert seen["temperature"].shape == ()
    whole = torch.cat([part["images"] for part in make_parts(SIZES)])
    expected = loss(model(whole), frozen(whole))
    torch.testing.assert_close(value, expected.detach())
    (gradient,) = torch.autograd.grad(expected, model.weight)
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, gradient, rtol=0, atol=1e-12)
    assert frozen.weight.grad is None


@pytest.mark.parametrize("outer", [False, True])
def test_autocast_and_scaler(outer: bool) -> None:
    """An autocast of the caller's around everything must not hand out weights without gradient."""
    parts = [{k: x if k == "ids" else x.float() for k, x in p.items()} for p in make_parts(SIZES)]
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    reference, model = Model().float(), Model().float()
    with autocast():
        outputs = [reference(**part) for part in parts]
        joined = {
            k: torch.cat([x[k] for x in outputs]) for k in ("image_features", "text_features")
        }
        ids = torch.cat([x["text_ids"] for x in outputs])
        value = reference.loss(**joined, logit_scale=outputs[-1]["logit_scale"], text_ids=ids)
    scaler.scale(value).backward()
    if outer:
        with autocast():
            GradCache(lambda part: model(**part), model.loss, scaler=scaler)(parts)
    else:
        cache = GradCache(lambda p: model(**p), model.loss, autocast=autocast, scaler=scaler)
        cache(parts)
    expected = reference.gradients()
    assert model.gradients().keys() == expected.keys()
    for name, x in model.gradients().items():
        assert (x - expected[name]).norm() < 2e-2 * expected[name].norm(), name
        assert x.norm() > 1.0  # scaled


def test_no_parts_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one part"):
        GradCache(lambda x: x, lambda: torch.zeros(()))([])


# ---------------------------------------------------------------- several processes


def local_parts(sizes: list[int]) -> list[Part]:
    """This process's rows, which are one half of the batch, in parts."""
    rank = dist.get_rank()
    whole = make_parts([sum(sizes)] * 2)[rank]
    columns = zip(*(torch.split(x, sizes) for x in whole.values()), strict=True)
    return [dict(zip(whole, column, strict=True)) for column in columns]


class Everything(Model):
    """A model whose loss is called through its forward."""

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        if "image_features" in inputs:
            return self.loss(**inputs)
        return super().forward(**inputs)


def in_parallel(
    sizes: list[int], steps: int, through_the_model: bool
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Gradients of some steps under DDP, and the number of all-reduces in each."""
    model, reduced, counts, results = Everything(), [0], [], []

    def count(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        reduced[0] += 1
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda x: x.value()[0])

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, count)
    loss = parallel if through_the_model else model.loss
    step = GradCache(lambda part: parallel(**part), loss, modules=[parallel])
    for _ in range(steps):
        model.zero_grad()
        step(local_parts(sizes))
        results.append(model.gradients())
        counts.append(reduced[0])
        reduced[0] = 0
    return results, counts


@pytest.mark.parametrize("through_the_model", [False, True])
@pytest.mark.parametrize("sizes", [[6], [2, 4], [2, 1, 1, 2]], ids=str)
def test_two_processes_share_gradients_once(
    groups: dict[int, ProcessGroup], sizes: list[int], through_the_model: bool
) -> None:
    _, expected = at_once(Model(), make_parts([6, 6]))
    for results, counts in groups[2].run(in_parallel, sizes, 3, through_the_model):
        for gradients in results:
            assert_same(gradients, expected)
        assert counts == [1, 1, 1]


def with_a_loss_outside(sizes: list[int]) -> None:
    model, outside = Model(), HighOrderPLLoss(7, 2, transition_dim=4).double()
    del model.loss
    parallel = DistributedDataParallel(model)
    step = GradCache(lambda part: parallel(**part), outside, modules=[parallel])
    with pytest.warns(UserWarning, match="every process trains its own copy"):
        step(local_parts(sizes))
    step(local_parts(sizes))  # said once; a second warning would be an error here


def test_a_loss_outside_ddp_is_warned_of(groups: dict[int, ProcessGroup]) -> None:
    groups[2].run(with_a_loss_outside, [2, 4])


def with_unused(sizes: list[int]) -> str:
    model = Model()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    with pytest.raises(ValueError, match="find_unused_parameters=False") as error:
        GradCache(lambda p: parallel(**p), model.loss, modules=[parallel])(local_parts(sizes))
    return str(error.value)


def test_find_unused_parameters_is_refused(groups: dict[int, ProcessGroup]) -> None:
    assert len(groups[2].run(with_unused, [2, 4])) == 2

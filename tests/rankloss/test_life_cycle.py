"""The loss as a part of a model: saved, loaded, built on meta, moved, sharded, reset."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloss import HighOrderPLLoss, RankCLIPLoss
from tests.helpers.features import features, randomize
from tests.helpers.processes import ProcessGroup


def ranking_term(loss: HighOrderPLLoss) -> Tensor:
    with torch.no_grad():
        pair = features(9, dtype=torch.float32)
        parts: dict[str, Tensor] = loss(*pair, 14.3, output_dict=True)
    return parts["ranking_loss"]


def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory often holds zeros by luck; here it never does."""
    empty_like = torch.empty_like

    def empty_like_nan(x: Tensor, **options: Any) -> Tensor:
        made = empty_like(x, **options)
        return made.fill_(torch.nan) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch, "empty_like", empty_like_nan)


# ---------------------------------------------------------------- progress is state


def through_state_dict(loss: HighOrderPLLoss) -> HighOrderPLLoss:
    other = HighOrderPLLoss(8, 3)
    other.load_state_dict(loss.state_dict(), strict=True)
    return other


def through_meta(loss: HighOrderPLLoss) -> HighOrderPLLoss:
    with torch.device("meta"):
        other = HighOrderPLLoss(8, 3)
    other.to_empty(device="cpu").load_state_dict(loss.state_dict(), strict=True)
    return other


def assigned_to_meta(loss: HighOrderPLLoss) -> HighOrderPLLoss:
    with torch.device("meta"):
        other = HighOrderPLLoss(8, 3)
    other.load_state_dict(loss.state_dict(), strict=True, assign=True)
    return other


COPIES: dict[str, Callable[[HighOrderPLLoss], HighOrderPLLoss]] = {
    "state_dict": through_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "meta, to_empty, load": through_meta,
    "meta, load by assignment": assigned_to_meta,
    "to_empty": lambda loss: copy.deepcopy(loss).to_empty(device="cpu").requires_grad_(),
    "half and back": lambda loss: copy.deepcopy(loss).half().float(),
}


@pytest.mark.parametrize("progress", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_progress_outlives(
    copied: Callable[[HighOrderPLLoss], HighOrderPLLoss],
    progress: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resumed run continues at its factor, before set_progress is called again."""
    poisoned_empty(monkeypatch)
    loss = HighOrderPLLoss(8, 3)
    start = ranking_term(loss)
    loss.set_progress(progress)
    other = copied(loss)
    torch.testing.assert_close(other.ranking_ramp, torch.tensor(min(3 * progress, 2.0)))
    if other.transition_heads[0].get_parameter("key_weight").isfinite().all():
        torch.testing.assert_close(ranking_term(other), min(3 * progress, 2.0) * start)


def test_a_state_without_progress_is_at_its_start() -> None:
    """Saved before progress was part of it; strict loading takes it."""
    loss = randomize(HighOrderPLLoss(8, 3))
    old = {name: x for name, x in loss.state_dict().items() if name != "ranking_ramp"}
    other = HighOrderPLLoss(8, 3)
    other.set_progress(0)
    other.load_state_dict(old, strict=True)
    assert other.ranking_ramp == 1
    assert torch.equal(ranking_term(other), ranking_term(loss))


def test_nothing_is_ranked_while_the_factor_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all parameters still take part in the graph, as DDP wants."""
    loss = randomize(HighOrderPLLoss(8, 3, share_transitions=False))
    loss.set_progress(0)
    monkeypatch.setattr("rankloss.streaming.RankedLists", None)
    image, text = features(9, dtype=torch.float32)
    loss(image, text, 14.3).backward()
    for p in loss.parameters():
        assert p.grad is not None
        assert p.grad.abs().max() == 0
    assert "transition_1" not in loss.last_stats
    loss.set_progress(0.1)
    with pytest.raises(TypeError):
        loss(image, text, 14.3)


def test_weights_of_a_lower_order_load() -> None:
    """Into a whole loss, from order 1 on; the new terms do not act yet."""
    image, text = features(9, dtype=torch.float32)
    lower: HighOrderPLLoss = RankCLIPLoss()
    for order in (2, 3, 4):
        lower.set_progress(0.3)
        higher = HighOrderPLLoss(8, order, share_transitions=False)
        higher.load_state_dict(lower.state_dict(), strict=True)
        torch.testing.assert_close(higher(image, text, 14.3), lower(image, text, 14.3))
        lower = randomize(higher)
    with pytest.raises(RuntimeError, match="Missing key"):  # a state of another module
        HighOrderPLLoss(8, 2).load_state_dict({})


def test_reset_puts_the_whole_loss_at_its_start() -> None:
    loss, fresh = (HighOrderPLLoss(8, 3, share_transitions=False) for _ in range(2))
    randomize(loss).set_progress(0)
    loss(*features(9, dtype=torch.float32), 14.3)
    loss.reset_parameters()
    assert loss.last_stats == {}
    state = loss.state_dict()
    assert state.keys() == fresh.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in fresh.state_dict().items())
    assert torch.equal(ranking_term(loss), ranking_term(fresh))


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def model_class() -> Any:
    """A CLIPModel that owns the loss, written as a user would."""
    transformers = pytest.importorskip("transformers")

    class RankingCLIP(transformers.CLIPModel):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.loss = HighOrderPLLoss(config.projection_dim, 3, share_transitions=False)
            self.post_init()

    return RankingCLIP


@pytest.fixture(scope="module")
def config() -> Any:
    transformers = pytest.importorskip("transformers")
    tower = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )


def test_from_pretrained_without_the_loss(
    model_class: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain CLIP checkpoint: its towers, and the loss at its start."""
    import transformers

    towers = transformers.CLIPModel(config)
    towers.save_pretrained(tmp_path)
    poisoned_empty(monkeypatch)
    model = model_class.from_pretrained(tmp_path)
    assert torch.equal(model.visual_projection.weight, towers.visual_projection.weight)
    fresh = HighOrderPLLoss(8, 3, share_transitions=False).state_dict()
    for name, x in model.loss.state_dict().items():
        assert torch.equal(x, fresh[name]), name
    assert ranking_term(model.loss) > 0


# ---------------------------------------------------------------- FSDP2


class Owner(nn.Module):
    """A model that owns the loss, for FSDP2, which shards each of its heads on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(8, 8), nn.Linear(8, 8)
        self.loss = HighOrderPLLoss(8, 3, share_transitions=False)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        pair = (
            nn.functional.normalize(f(x), dim=1)
            for f, x in ((self.image, image), (self.text, text))
        )
        value: Tensor = self.loss(*pair, 14.3)
        return value


def _sharded_from_meta(apart: bool, state: dict[str, Any] | None) -> tuple[Any, Any, list[str]]:
    """The loss's state after to_empty and reset or load, what training makes of it, warnings."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = Owner()
    if apart:
        for heads in model.loss.transition_heads:
            fully_shard(heads)
    fully_shard(model)
    model.to_empty(device="cpu")
    full = StateDictOptions(full_state_dict=True)
    if state is not None:
        set_model_state_dict(model, state, options=full)
    else:
        with warnings.catch_warnings():  # torch's, of random numbers in sharded parameters
            warnings.simplefilter("ignore")
            for module in model.modules():
                getattr(module, "reset_parameters", lambda: None)()

    def state_of_the_loss() -> dict[str, Tensor]:
        whole: dict[str, Any] = get_model_state_dict(model, options=full)
        return {name: x.clone() for name, x in whole.items() if name.startswith("loss.")}

    before = state_of_the_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(9):
            optimizer.zero_grad()
            model(*features(6, seed=seed, dtype=torch.float32, grad=False)).backward()
            optimizer.step()
    warned = [str(x.message) for x in caught if "keys" in str(x.message)]
    return before, state_of_the_loss(), warned


@pytest.mark.parametrize("apart", [False, True], ids=["with the model", "heads apart"])
@pytest.mark.parametrize("how", ["reset", "load"])
def test_built_on_meta_and_sharded(how: str, apart: bool, two: ProcessGroup) -> None:
    owner = Owner()
    if how == "load":
        randomize(owner.loss)
        owner.loss.set_progress(0.1)
    state = owner.state_dict()
    replies = two.run(_sharded_from_meta, apart, state if how == "load" else None)
    for before, after, warned in replies:
        assert before.keys() == {name for name in state if name.startswith("loss.")}
        for name, x in before.items():
            assert torch.equal(x, state[name]), name
        for name in ("loss.transition_heads.0.key_weight", "loss.transition_heads.1.key_weight"):
            assert not torch.equal(after[name], before[name])
        assert torch.equal(after["loss.ranking_ramp"], state["loss.ranking_ramp"])
        assert not warned

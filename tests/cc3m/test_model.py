"""Changes that settings make to a model before it is trained."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from examples.cc3m.model import prepare
from examples.cc3m.recipe import build_towers, load_recipe
from examples.cc3m.settings import RunSettings, TrainSettings
from examples.common.files import UserError
from examples.common.parallel import Parallel
from examples.common.tiny import TINY_CLIP
from rankloss import DinoRankCLIP


def towers() -> DinoRankCLIP:
    return build_towers(load_recipe("clip"), TINY_CLIP)


def prepared(parallel: Parallel | None = None, **options: Any) -> DinoRankCLIP:
    return prepare(towers(), RunSettings(model="tiny", **options), parallel or Parallel())


def test_it_starts_from_a_file_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY_CLIP)
    source = towers().model.state_dict()
    torch.save(source, tmp_path / "weights.pt")
    started = prepared(pretrained=str(tmp_path / "weights.pt")).model.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in started.items())
    torch.save({"another": torch.zeros(1)}, tmp_path / "other.pt")
    for name in ("other.pt", "none.pt"):
        with pytest.raises(UserError, match=f"cannot load --pretrained .*{name}"):
            prepared(pretrained=str(tmp_path / name))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_stays_as_it_is(tower: str) -> None:
    options: dict[str, Any] = {f"lock_{tower}": True}
    made = prepared(None, **options)
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    visual = {name for name, _ in made.model.named_parameters() if name.startswith("visual.")}
    if tower == "image":
        assert not trained & visual
        assert "token_embedding.weight" in trained
    else:
        assert "token_embedding.weight" not in trained
        assert trained & visual == visual
    assert "logit_scale" in trained


GPU = torch.device("cuda", 0)  # never computed on here


def test_batch_normalisation_joins_processes_on_request_and_says_what_it_does_not_join(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UserError, match="--sync-batchnorm needs GPUs"):
        prepared(sync_batchnorm=True)
    joined = prepared(Parallel(0, 2, GPU), sync_batchnorm=True)
    kinds = {type(x) for x in joined.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    assert joined.state_dict().keys() == towers().state_dict().keys()
    assert not caplog.messages
    parts = TrainSettings(accumulate=3)
    prepared(Parallel(0, 2, GPU), sync_batchnorm=True, train=parts)
    prepared(Parallel(0, 2), train=parts)
    told = [message.partition(" parts")[0] for message in caplog.messages]
    assert told == [f"batch normalisation sees one of {n}" for n in (3, 6)]

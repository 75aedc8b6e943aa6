"""Attaching a loss to a model, and leaving it out of what is published."""

from pathlib import Path

import pytest
import torch
from torch import nn

from rankloss import HighOrderPLLoss, attach, export


def towers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


def test_attached_loss_is_part_of_the_model() -> None:
    model = towers()
    loss = attach(model, HighOrderPLLoss(embed_dim=8, order=2))
    assert model.rank_loss is loss
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in model.parameters()}
    assert any(key.startswith("rank_loss.") for key in model.state_dict())


def test_attached_loss_is_on_the_models_device() -> None:
    model = nn.Linear(8, 8, device="meta")
    loss = attach(model, HighOrderPLLoss(embed_dim=8, order=2))
    assert {p.device.type for p in loss.parameters()} == {"meta"}


def test_compiled_model_is_refused() -> None:
    with pytest.raises(TypeError, match="attach the loss to the bare model first"):
        attach(torch.compile(towers()), HighOrderPLLoss(embed_dim=8, order=2))  # type: ignore[arg-type]


def test_second_loss_of_the_same_name_is_refused() -> None:
    model = towers()
    attach(model, HighOrderPLLoss(order=1))
    with pytest.raises(ValueError, match="already has an attribute 'rank_loss'"):
        attach(model, HighOrderPLLoss(order=1))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_export_loads_strictly(tmp_path: Path, suffix: str, prefix: str) -> None:
    model = towers()
    bare = {key: value.clone() for key, value in model.state_dict().items()}
    attach(model, HighOrderPLLoss(embed_dim=8, order=3))
    weights = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "epoch_1.pt")
    exported = export(tmp_path / "epoch_1.pt", tmp_path / f"bare{suffix}")
    towers().load_state_dict(exported)
    again = export(tmp_path / f"bare{suffix}")  # a file is as good as its content
    for key, value in bare.items():
        assert torch.equal(exported[key], value)
        assert torch.equal(again[key], value)


def test_export_names_what_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model weights among the keys"):
        export({"epoch": 3})
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        export(tmp_path / "list.pt")

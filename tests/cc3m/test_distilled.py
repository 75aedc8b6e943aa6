"""Distillation that training adds to the method: the texts' teacher, and the anchor's course."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.cc3m.distilled import AnchorSettings, DistilledCLIP
from examples.cc3m.recipe import Recipe, build_towers, load_recipe
from rankloss import DinoRankCLIP, RelationalAngleLoss, RelationalDistanceLoss
from tests.cc3m.test_parallel import PAIRS, STUDENT, VIT, batch, trainer

DECAY, WEIGHT, MOST = 0.5, 3.0, 2
ANCHOR = {"weight": WEIGHT, "decay": DECAY, "first": 0.4, "every": 0.2, "most": MOST}


def recipe() -> Recipe:
    return replace(load_recipe("dinorankclip"), anchor=ANCHOR)


def built() -> DistilledCLIP:
    torch.manual_seed(0)
    made = build_towers(recipe(), VIT, STUDENT).double()
    assert isinstance(made, DistilledCLIP)
    return made


def terms(made: DinoRankCLIP) -> dict[str, Tensor]:
    data = batch()
    assert data.teacher is not None
    return made.objective(made.encode(data.images, data.texts), *data.teacher)


def branch(made: DinoRankCLIP) -> torch.nn.Module:
    assert made.student is not None
    assert made.student.image is not None
    return made.student.image


def test_the_text_branch_follows_cls_and_mean_patch_of_its_image() -> None:
    made, data = built(), batch()
    assert data.teacher is not None
    outputs = made.encode(data.images, data.texts)
    patches, cls = data.teacher
    target = torch.cat([cls, patches.sum(1) / patches.shape[1]], 1)
    found = terms(made)
    for name, loss in (("distance", RelationalDistanceLoss()), ("angle", RelationalAngleLoss())):
        expected = loss(outputs["student_text"], target)
        torch.testing.assert_close(found[f"text_{name}_loss"], expected)
        assert expected > 0
    with pytest.raises(ValueError, match="text_teacher needs teacher_cls"):
        made.objective(outputs, patches)
    with pytest.raises(ValueError, match="got no teacher_patches"):
        made.objective(outputs)


def test_the_anchor_is_the_students_average_and_is_taken_on_schedule() -> None:
    """Taken after steps 4 and 6 of 10; its loss against Gram matrices by hand."""
    made, images = built(), batch().images
    assert made.anchor is not None
    average = [p.detach().clone() for p in branch(made).parameters()]
    taken: list[int] = []
    for step in range(10):
        with torch.no_grad():
            for p in branch(made).parameters():
                p.add_(0.1 * torch.randn_like(p))
        made.after_step(step, 10)
        for mean, p in zip(average, branch(made).parameters(), strict=True):
            mean.copy_(p if step == 0 else DECAY * mean + (1 - DECAY) * p)
        if int(made.anchor.refreshes) > len(taken):
            taken.append(step + 1)
            for mean, p in zip(average, made.anchor.anchor.parameters(), strict=True):
                torch.testing.assert_close(p, mean.detach())
        if not taken:
            assert terms(made)["anchor_loss"] == 0
    assert taken == [4, 6]

    def gram(patches: Tensor) -> Tensor:
        rows = F.normalize(patches, dim=2)
        return rows @ rows.transpose(1, 2)

    student, anchored = branch(made)(images)[0], made.anchor.anchor(images)[0]
    loss = terms(made)["anchor_loss"]
    expected = WEIGHT * (gram(student) - gram(anchored)).square().mean()
    assert expected > 0
    torch.testing.assert_close(loss, expected)
    loss.backward()  # type: ignore[no-untyped-call]
    moved = {name.split(".")[0] for name, p in made.named_parameters() if p.grad is not None}
    assert moved == {"student"}


def test_nothing_of_it_is_left_at_inference() -> None:
    torch.manual_seed(0)
    plain = build_towers(recipe(), VIT, STUDENT, inference=True).double()
    assert type(plain) is DinoRankCLIP
    made = built()
    extra = made.state_dict().keys() - plain.state_dict().keys()
    assert {name.split(".")[0] for name in extra} == {"anchor", "average"}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, made.state_dict()[name]), name


def test_a_step_that_is_left_out_moves_neither_average_nor_anchor(tmp_path: Path) -> None:
    run = trainer(str(tmp_path), recipe="dinorankclip")
    good = batch(dtype=torch.float32)
    bad = replace(good, images=good.images * torch.nan)
    assert isinstance(run.towers, DistilledCLIP)
    run.update([good])
    before = {name: value.clone() for name, value in run.towers.state_dict().items()}
    run.update([bad])
    after = run.towers.state_dict()
    assert [name for name in after if not torch.equal(after[name], before[name])] == []
    run.update([good])
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert "average" in moved
    assert len(good.images) == PAIRS


def test_what_is_distilled_is_told() -> None:
    assert built().told_distillation() == (
        "the text branch from CLS and mean patch; the image branch from its own average (decay "
        "0.5, weight 3), taken after 40% of the steps and every 20%, 2 times at most"
    )
    endless = AnchorSettings(1.0, 0.9, 0.5, 0.1)
    common: dict[str, Any] = {"architecture": {"open_clip": VIT}, "student": STUDENT}
    told = DistilledCLIP(anchor=endless, **common).told_distillation()
    assert told.endswith("after 50% of the steps and every 10%, any number of times")

"""The recipe itself: schedules, what moves, and runs that are stopped and go on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightly", reason="the extra `self_distillation` is not installed")

from examples.common.signals import Interrupted, StopRequest
from examples.demo.scene_shards import SceneSettings
from examples.self_distillation.__main__ import main
from examples.self_distillation.backbone import Backbone, Network
from examples.self_distillation.crops import sample_views
from examples.self_distillation.objective import SelfDistillation
from examples.self_distillation.settings import MODEL, ObjectiveSettings, Settings
from examples.self_distillation.train import build_optimizer, train, update
from rankloss.fusion.teacher import Dinov3Teacher

TINY = Settings(
    SceneSettings(image_size=64, train=32),
    options={"depth": 1, "embed_dim": 16, "num_heads": 2},
    objective=ObjectiveSettings(prototypes=8, koleo_group=4),
    steps=10,
    batch_size=8,
    local_size=16,
    locals_=2,
    checkpoint_steps=4,
)


class StopAfter(StopRequest):
    """Asks to stop once it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        super().__init__()

    @property
    def signal_number(self) -> int | None:
        self.looks -= 1
        return 15 if self.looks < 0 else None

    @signal_number.setter
    def signal_number(self, value: int | None) -> None:
        pass


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    whole = train(TINY, tmp_path / "whole", StopRequest())
    with pytest.raises(Interrupted, match="after step 3 of 10"):
        train(TINY, tmp_path / "parts", StopAfter(2))
    assert not (tmp_path / "parts/teacher.safetensors").exists()
    early = train(TINY, tmp_path / "parts", StopRequest(), end=7)
    assert early.read_bytes() != whole.read_bytes()
    assert json.loads((tmp_path / "parts/teacher.json").read_text())["steps_taken"] == 7
    parts = train(TINY, tmp_path / "parts", StopRequest())
    assert parts.read_bytes() == whole.read_bytes()
    options = {**TINY.options, "checkpoint_path": str(whole)}
    teacher = Dinov3Teacher(MODEL, pretrained=False, **options)
    fresh = Dinov3Teacher(MODEL, pretrained=False, **TINY.options)
    assert teacher.weights_hash() != fresh.weights_hash()
    with pytest.raises(ValueError, match="other settings"):
        train(replace(TINY, seed=1), tmp_path / "whole", StopRequest())


def test_terms_and_schedules() -> None:
    torch.manual_seed(0)
    network = Network(MODEL, TINY.options, prototypes=8)
    distillation = SelfDistillation(network, TINY.objective, TINY.steps)
    views = sample_views(
        torch.rand(8, 3, 64, 64), global_size=64, local_size=16, locals_=2, with_high=True
    )
    assert set(distillation(views._replace(high=None), 0)) == {
        "dino_loss",
        "ibot_loss",
        "koleo_loss",
    }
    terms = distillation(views, 6)
    assert terms["gram_loss"] > 0
    assert all(term.requires_grad for term in terms.values())
    assert not any(p.requires_grad for p in distillation.teacher.parameters())
    temperatures = [distillation.teacher_temperature(step) for step in (0, 3, 9)]
    assert temperatures == pytest.approx([0.04, 0.07, 0.07])
    assert [distillation.needs_high(step) for step in (5, 6)] == [False, True]


def test_the_teacher_follows_slowly_and_the_anchor_jumps() -> None:
    torch.manual_seed(0)
    network = Network(MODEL, TINY.options, prototypes=8)
    distillation = SelfDistillation(network, TINY.objective, TINY.steps)
    optimizer = build_optimizer(distillation.student, 0.1)
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)

    def weights() -> list[torch.Tensor]:
        parts = (distillation.student, distillation.teacher)
        found = [x.backbone.mask_token.detach().clone() for x in parts]
        anchor = distillation.anchor.anchor
        assert isinstance(anchor, Backbone)
        return [*found, anchor.mask_token.detach().clone()]

    student, teacher, anchor = weights()
    for step in range(6):
        update(distillation, optimizer, images, TINY, step)
        moved = weights()
        assert 0 < (moved[1] - teacher).norm() < (moved[0] - student).norm()
        jumped = step == 5  # the anchor is taken from the teacher once six of ten steps are done
        assert torch.equal(moved[2], moved[1] if jumped else anchor)
        student, teacher, anchor = moved[0], moved[1], moved[2]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "0", "--out", str(tmp_path)]) == 2
    assert "steps must be at least 1" in capsys.readouterr().err

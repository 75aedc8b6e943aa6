"""GramAnchor: its schedule, its state, and that nothing moves it but the schedule."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloss import GramAnchor, GramLoss
from rankloss.fusion import Dinov3Teacher


class Teacher(nn.Module):
    """With everything a module may carry: parameters, statistics, dropout."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.fill(value)

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for x in (*self.parameters(), self.norm.running_mean):
                assert x is not None
                x.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.dropout(self.norm(self.linear(x)))
        return result


def held(anchor: GramAnchor) -> float:
    """The value of the teacher that the anchor holds; all of it is from the same one."""
    teacher = anchor.anchor
    assert isinstance(teacher, Teacher)
    mean = teacher.norm.running_mean
    assert mean is not None
    values = {float(v) for x in (*teacher.parameters(), mean) for v in x.detach().flatten()}
    assert len(values) == 1
    return values.pop()


def refreshed(anchor: GramAnchor, steps: range) -> list[int]:
    """After which steps the anchor changed; the moving average is filled with the step before."""
    average, changed = Teacher(), []
    for step in steps:
        average.fill(step)
        before = held(anchor)
        due = anchor.is_due(step)
        assert anchor.update(step, average) == due
        assert held(anchor) == (step if due else before)
        if due:
            changed.append(step)
    return changed


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("first", "every", "most", "expected"),
    [
        (10, 4, None, [11, 15, 19, 23, 27]),  # the first multiple of 4 not before 10 is 12
        (12, 4, 3, [11, 15, 19]),
        (13, 4, 1, [15]),
        (0, 10, None, [9, 19, 29]),
        (0, 1, 2, [0, 1]),
        (5, 3, 0, []),
    ],
)
def test_schedule(first: int, every: int, most: int | None, expected: list[int]) -> None:
    anchor = GramAnchor(Teacher(-1.0), first, every, most)
    assert refreshed(anchor, range(30)) == expected
    assert int(anchor.refreshes) == len(expected)


def test_asking_does_not_count() -> None:
    anchor = GramAnchor(Teacher(), 0, 1, most=1)
    assert all(anchor.is_due(0) for _ in range(3))
    assert anchor.update(0, Teacher(1.0))
    assert not anchor.is_due(1)


# ---------------------------------------------------------------- state


def test_the_state_holds_teacher_and_count() -> None:
    """Resumed, the schedule goes on where it was."""
    anchor = GramAnchor(Teacher(-1.0), 0, 10, most=3)
    assert refreshed(anchor, range(25)) == [9, 19]
    file = io.BytesIO()
    torch.save(anchor.state_dict(), file)
    file.seek(0)
    resumed = GramAnchor(Teacher(-1.0), 0, 10, most=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert held(resumed) == 19
    assert int(resumed.refreshes) == 2
    assert refreshed(resumed, range(25, 60)) == [29]
    assert held(anchor) == 19  # the first one's state was copied


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stand_alone(how: str) -> None:
    anchor = GramAnchor(Teacher(1.0), 0, 1)
    again = copy.deepcopy(anchor) if how == "deepcopy" else pickle.loads(pickle.dumps(anchor))
    again.update(0, Teacher(2.0))
    assert held(anchor) == 1
    assert held(again) == 2
    assert int(anchor.refreshes) == 0


def test_casting_leaves_the_count_whole() -> None:
    anchor = GramAnchor(Teacher(), 0, 1).to(torch.bfloat16)
    assert anchor.refreshes.dtype == torch.int64
    assert anchor.update(0, Teacher(3.0))  # a float32 average, cast as it is copied
    assert held(anchor) == 3
    assert next(anchor.parameters()).dtype == torch.bfloat16


# ---------------------------------------------------------------- frozen


def test_teachers_are_copied_not_aliased() -> None:
    teacher = Teacher(1.0)
    anchor = GramAnchor(teacher, 0, 1)
    teacher.fill(2.0)
    assert held(anchor) == 1
    anchor.update(0, teacher)
    assert held(anchor) == 2
    teacher.fill(3.0)
    assert held(anchor) == 2
    ours = {x.untyped_storage().data_ptr() for x in anchor.state_dict().values()}
    assert ours.isdisjoint(x.untyped_storage().data_ptr() for x in teacher.state_dict().values())


def test_the_given_teacher_is_left_as_it_was() -> None:
    teacher = Teacher().train()
    anchor = GramAnchor(teacher, 0, 1)
    anchor.update(0, teacher)
    assert teacher.training
    assert teacher.dropout.training
    assert all(x.requires_grad for x in teacher.parameters())


def test_always_frozen_and_in_evaluation_mode() -> None:
    """Also inside a model in training, and after a refresh from a teacher in training."""
    torch.manual_seed(0)
    anchor = GramAnchor(Teacher(0.5), 0, 1)
    model = nn.Sequential(nn.Linear(3, 3), anchor)
    x = torch.randn(8, 3, requires_grad=True)
    expected = anchor(x)
    for _ in range(2):
        model.train()
        assert model[0].training
        assert anchor.training
        assert not any(m.training for m in anchor.anchor.modules())
        assert not any(p.requires_grad for p in anchor.parameters())
        output = anchor(x)
        assert not output.requires_grad
        assert torch.equal(output, expected)  # no dropout, and running statistics stay
        anchor.update(0, Teacher(0.5).train())
    assert model.eval().training is False
    assert anchor.training is False


def test_training_never_moves_the_anchor() -> None:
    student, anchor = Teacher(0.3), GramAnchor(Teacher(0.5), 10**6, 1)
    with torch.no_grad():
        student.linear.weight.add_(torch.randn(4, 3))
        for x in (anchor.anchor.linear.weight, anchor.anchor.norm.weight):  # type: ignore[union-attr]
            x.add_(torch.randn_like(x))  # type: ignore[operator, arg-type]
    model = nn.ModuleDict({"student": student, "anchor": anchor}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = copy.deepcopy(anchor.state_dict())
    images = torch.randn(2 * 6, 3)
    losses = []
    for step in range(5):
        value = GramLoss()(student(images).view(2, 6, 4), anchor(images).view(2, 6, 4))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert not anchor.update(step, student)
        losses.append(value.item())
    assert losses[0] > 0
    assert all(torch.equal(x, before[name]) for name, x in anchor.state_dict().items())


class HidesItself(Teacher):
    """Keeps out of state_dict, as a frozen teacher does."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__(value)
        hooks: Any = self
        hooks.register_state_dict_post_hook(self.hide)

    @staticmethod
    def hide(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]


def test_a_teacher_that_hides_its_weights_is_copied_all_the_same() -> None:
    anchor = GramAnchor(HidesItself(1.0), 0, 1)
    assert anchor.update(0, HidesItself(2.0))
    assert held(anchor) == 2
    resumed = GramAnchor(HidesItself(0.0), 0, 1)
    resumed.load_state_dict(anchor.state_dict())
    assert held(resumed) == 2


def test_dinov3_teachers_are_copied_and_saved() -> None:
    options: Any = {"depth": 1, "embed_dim": 24, "num_heads": 2, "pretrained": False}
    first, second = (Dinov3Teacher("vit_small_patch16_dinov3", **options) for _ in range(2))
    assert first.weights_hash() != second.weights_hash()
    anchor = GramAnchor(first, 0, 1)
    assert anchor.update(0, second)
    resumed = GramAnchor(first, 0, 1)
    resumed.load_state_dict(anchor.state_dict())
    for each in (anchor, resumed):
        assert isinstance(each.anchor, Dinov3Teacher)
        assert each.anchor.weights_hash() == second.weights_hash()


def test_a_teacher_with_nothing_to_copy_is_refused() -> None:
    with pytest.raises(ValueError, match="a Identity, has neither parameters nor buffers to copy"):
        GramAnchor(nn.Identity(), 0, 1)


def test_a_teacher_of_another_shape_is_refused() -> None:
    anchor = GramAnchor(nn.Linear(3, 4), 0, 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        anchor.update(0, nn.Linear(3, 5))
    assert int(anchor.refreshes) == 0

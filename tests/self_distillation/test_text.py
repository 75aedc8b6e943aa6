"""A text tower aligned to a frozen teacher: its embeddings, what is trained, that it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from examples.cc3m.step import MAX_SCALE
from examples.self_distillation.settings import MODEL
from examples.self_distillation.text import DinoText, align, main
from rankloss.fusion.teacher import Dinov3Teacher


@pytest.fixture
def model() -> DinoText:
    torch.manual_seed(0)
    options: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2, "init_values": 1.0}
    teacher = Dinov3Teacher(MODEL, pretrained=False, **options)
    return DinoText(teacher, width=16, layers=1, heads=1, context_length=6)


def texts(n: int) -> torch.Tensor:
    ids = torch.randint(1, 400, (n, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 3], ids[:, 4:] = 49407, 0  # the end, then padding
    return ids


def test_an_embedding_is_cls_and_mean_patch_normalised_once(model: DinoText) -> None:
    images = torch.randn(2, 3, 32, 32)
    tokens = model.teacher(images)
    expected = torch.cat([tokens.cls, tokens.patches.mean(1)], 1)
    found = model.encode_image(images)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    assert (found[:, :16].norm(dim=1) - found[:, 16:].norm(dim=1)).abs().min() > 1e-3
    ids = texts(2)
    half = F.normalize(model.encode_text(ids)[:, 16:], dim=1)
    scores = model.patch_scores(images, ids)
    for i in range(2):
        for j in range(4):
            expected = F.cosine_similarity(tokens.patches[i, j], half[i], dim=0)
            torch.testing.assert_close(scores[i, j], expected)


def test_a_text_is_read_at_its_end(model: DinoText) -> None:
    ids, other = texts(3), texts(3)
    other[:, 4:] = 7  # after the end
    torch.testing.assert_close(model.encode_text(other), model.encode_text(ids))
    other[:, 2] += 1
    assert not torch.allclose(model.encode_text(other), model.encode_text(ids), atol=1e-4)


def test_only_the_text_tower_is_trained(model: DinoText) -> None:
    before, seen = model.teacher.weights_hash(), model.encode_image(torch.randn(8, 3, 32, 32))
    losses = align(model, seen, texts(8), steps=40, batch_size=16, learning_rate=1e-2)
    assert losses[-1] < 0.6 * losses[0]
    assert model.teacher.weights_hash() == before
    assert 0 <= model.logit_scale <= MAX_SCALE
    assert not [name for name in model.state_dict() if name.startswith("teacher.")]


def test_the_command_needs_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "train it first" in capsys.readouterr().err

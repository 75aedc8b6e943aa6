"""ALIP and ITO trained by the script: several views and captions, and a fusion that leaves."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from examples.cc3m import recipe, train
from examples.cc3m.multi_view import MultiViewCLIP
from examples.common.checkpoint import Checkpoints
from examples.common.tiny import TINY_CLIP
from rankloss import ClipLoss, DinoRankCLIP
from tests.helpers.shards import COLOURS, jpeg

VIT: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 32, "patch_size": 16, "image_size": 32},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 1, "layers": 1},
}
OPTIONS = [
    *("--model", "tiny", "--device", "cpu", "--workers", "0", "--no-tensorboard"),
    *("--train.batch-size", "8", "--train.accumulate", "2", "--train.epochs", "2"),
    *("--train.precision", "fp32", "--train.log-steps", "1"),
]


def write_shard(folder: Path) -> str:
    """Sixteen pictures with a caption, and a synthetic one in their records."""
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(16):
            word = list(COLOURS)[i % 4]
            record = {"synthetic_caption": f"a picture that is all {word}"}
            parts = {
                "jpg": jpeg(word, 40),
                "txt": f"{word} no {i}".encode(),
                "json": json.dumps(record).encode(),
            }
            for suffix, data in parts.items():
                entry = tarfile.TarInfo(f"{i:04d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    (folder / "0_stats.json").write_text('{"successes": 16}')
    return str(folder / "0.tar")


TRAINED = {
    "alip": ({"contrastive_loss", "caption_loss"}, ()),
    "ito": ({"contrastive_loss", "fusion_loss"}, ("--override", "fusion.depth=1")),
}


@pytest.mark.parametrize(("name", "terms", "more"), [(k, *v) for k, v in TRAINED.items()])
def test_the_script_trains_it_and_exports_two_towers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    terms: set[str],
    more: tuple[str, ...],
) -> None:
    monkeypatch.setattr(recipe, "SMALL_CLIP", VIT)
    monkeypatch.setattr(train, "save_curves", lambda *_: None)
    data, out = write_shard(tmp_path), tmp_path / "run"
    command = ["--recipe", name, "--data", data, "--out", str(out), *OPTIONS, *more]
    assert train.main(command) == 0
    found = Checkpoints(out / "checkpoints").latest()
    assert found is not None
    assert found.state["progress"]["step"] == 4
    assert terms < found.state["progress"]["history"].keys()
    if name == "alip":
        assert (found.tensors["module.loss.means"] < 1).all()
    trained = {k.removeprefix("module.model."): v for k, v in found.tensors.items()}
    assert any("fusion" in key for key in trained) == (name == "ito")
    for path in (out / "export").iterdir():
        names = load_file(path).keys() if path.suffix == ".safetensors" else [path.read_text()]
        assert not any("fusion" in each.replace("fusion_weight", "") for each in names), path
    exported = DinoRankCLIP.from_pretrained(out / "export")
    never = DinoRankCLIP(
        architecture={"open_clip": VIT}, variant="none", loss=ClipLoss(), embed_dim=32
    ).eval()
    state = {k: trained[k] for k in never.model.state_dict()}
    never.model.load_state_dict(state)
    plain = open_clip.create_model(f"local-dir:{out / 'export'}").eval()
    images, texts = torch.randn(3, 3, 32, 32), torch.randint(1, 49408, (3, 16))
    for given, method in ((images, "encode_image"), (texts, "encode_text")):
        expected = getattr(never, method)(given, normalize=True)
        assert torch.equal(getattr(exported, method)(given, normalize=True), expected)
        assert torch.equal(getattr(plain, method)(given, normalize=True), expected)


def caught(module: nn.Module, encode: Any, given: Tensor) -> tuple[Tensor, Tensor]:
    """Return a module's output while something is encoded, and what it is encoded as."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    encoded = encode(given)
    handle.remove()
    return outputs[0], encoded


@pytest.mark.parametrize("captions", [1, 2])
@torch.no_grad()
def test_features_are_the_towers_and_fused_features_those_of_their_tokens(captions: int) -> None:
    architecture = {"open_clip": {**VIT, "output_dict": True}}
    torch.manual_seed(0)
    towers = MultiViewCLIP({"depth": 1}, architecture=architecture, loss={"ITOLoss": {}}).eval()
    model: Any = towers.model
    assert towers.fusion is not None
    images, texts = torch.randn(3, 2, 3, 32, 32), torch.randint(1, 400, (3, captions, 16))
    texts[:, :, 9], texts[:, :, 10:] = 49407, 0
    outputs = towers.encode(images, texts if captions > 1 else texts[:, 0])
    for view, prefix in enumerate(("", "other_")):
        pictures, words = images[:, view], texts[:, min(view, captions - 1)]
        tokens, embedded = caught(model.visual.ln_post, model.encode_image, pictures)
        spoken, _ = caught(model.ln_final, model.encode_text, words)
        name = "other_view_features" if view else "image_features"
        torch.testing.assert_close(outputs[name], normalize(embedded, dim=1))
        torch.testing.assert_close(
            outputs[f"{prefix}fused_features"],
            towers.fusion(
                tokens @ model.visual.proj,
                (spoken @ model.text_projection)[:, :10],
                text_positions=model.positional_embedding[:10],
            ),
        )
    for caption, name in enumerate(("text_features", "other_text_features")[:captions]):
        embedded = normalize(model.encode_text(texts[:, caption]), dim=1)
        torch.testing.assert_close(outputs[name], embedded)
    terms = towers.objective(outputs)
    assert terms.keys() == {"contrastive_loss", "fusion_loss"}
    expected = towers.loss(**outputs, output_dict=True)
    assert all(torch.equal(terms[name], expected[name]) for name in terms)


def test_a_model_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="choose another --model"):
        MultiViewCLIP({}, architecture={"open_clip": TINY_CLIP}, loss={"ITOLoss": {}})

"""The frozen teacher: which tokens, which pixels, what never changes. Random weights throughout."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloss.fusion.optional import require
from rankloss.fusion.teacher import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SATELLITE_MEAN,
    Dinov3Teacher,
)

ROOT = Path(__file__).resolve().parents[2]
NAME = "vit_small_patch16_dinov3"
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def timm_teacher(**options: Any) -> Dinov3Teacher:
    torch.manual_seed(0)
    return Dinov3Teacher(NAME, pretrained=False, **{**SMALL, **options})


def transformers_model(registers: int) -> Any:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    return DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=96,
            num_register_tokens=registers,
        )
    )


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_real_small_model_at_224() -> None:
    teacher = Dinov3Teacher(NAME, pretrained=False)
    features = teacher(images(1, 3, 224, 224))
    assert features.patches.shape == (1, 196, 384)
    assert features.cls.shape == (1, 384)
    assert features.grid == (14, 14)
    assert (teacher.dim, teacher.patch_size, teacher.prefix_tokens) == (384, 16, 5)


def test_tokens_of_timm_are_sliced_after_five_and_normed() -> None:
    teacher = timm_teacher()
    model: Any = teacher.model
    x = images(2, 3, 96, 64)
    features = teacher(x)
    tokens = model.forward_features(teacher.normalise(x))
    assert tokens.shape == (2, 5 + 24, 48)
    torch.testing.assert_close(features.patches, tokens[:, 5:], rtol=0, atol=0)
    torch.testing.assert_close(features.cls, tokens[:, 0], rtol=0, atol=0)
    assert features.grid == (6, 4)
    # LayerNorm with its initial weights: what is already normed has mean 0 and variance 1
    torch.testing.assert_close(features.patches.mean(-1), torch.zeros(2, 24), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        features.patches.var(-1, correction=0), torch.ones(2, 24), rtol=0, atol=1e-2
    )


def test_calling_timm_itself_gives_the_patch_mean_not_cls() -> None:
    """The trap that explicit slicing avoids."""
    teacher = timm_teacher()
    x = images(2, 3, 64, 64)
    features = teacher(x)
    pooled = teacher.model(teacher.normalise(x))
    torch.testing.assert_close(pooled, features.patches.mean(1))
    assert not torch.allclose(pooled, features.cls, atol=1e-2)


@pytest.mark.parametrize("registers", [0, 4])  # the configuration's default, the published models'
def test_tokens_of_transformers_are_sliced_after_cls_and_registers(registers: int) -> None:
    model = transformers_model(registers)
    teacher = Dinov3Teacher(model)
    x = images(2, 3, 96, 64)
    features = teacher(x)
    output = model(pixel_values=teacher.normalise(x))
    assert output.last_hidden_state.shape == (2, 1 + registers + 24, 48)
    expected = output.last_hidden_state[:, 1 + registers :]
    torch.testing.assert_close(features.patches, expected, rtol=0, atol=0)
    torch.testing.assert_close(features.cls, output.pooler_output, rtol=0, atol=0)
    assert features.grid == (6, 4)


@pytest.mark.parametrize("pretrained", [True, False])
def test_transformers_by_name_of_a_folder(tmp_path: Path, pretrained: bool) -> None:
    model = transformers_model(4)
    model.save_pretrained(tmp_path / "model")
    teacher = Dinov3Teacher(f"{tmp_path}/model", pretrained=pretrained)
    assert type(teacher.model).__name__ == "DINOv3ViTModel"
    assert (teacher.dim, teacher.prefix_tokens) == (48, 5)
    same = teacher.weights_hash() == Dinov3Teacher(model).weights_hash()
    assert same == pretrained


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_clip_images_arrive_with_imagenet_statistics(channel: int) -> None:
    picture = torch.rand(2, 3, 16, 16, dtype=torch.float64)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    teacher = timm_teacher().double()
    got = teacher.normalise(normalised(CLIP_MEAN, CLIP_STD))
    expected = normalised(IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(got[:, channel], expected[:, channel], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pixels", [torch.bfloat16, torch.float32])
def test_a_half_precision_teacher_gets_pixels_rounded_once(pixels: torch.dtype) -> None:
    """Statistics in bfloat16 would put the picture off by 0.01 of a standard deviation."""
    teacher = timm_teacher().bfloat16().to(torch.bfloat16)
    x = images(2, 3, 32, 32).to(pixels)
    exact = timm_teacher().double().normalise(x.double())
    got = teacher.normalise(x)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    assert got.dtype == torch.float32
    with torch.device("meta"):
        empty = timm_teacher()
    torch.testing.assert_close(empty.to_empty(device="cpu").normalise(x), got, rtol=0, atol=0)


def test_whole_numbers_are_refused() -> None:
    picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"floating point and normalised, got torch.uint8; divide"):
        timm_teacher()(picture)


def test_satellite_models_have_their_own_statistics() -> None:
    torch.manual_seed(0)
    name = "vit_large_patch16_dinov3.sat493m"
    timm = Dinov3Teacher(name, pretrained=False, **{**SMALL, "depth": 1})
    model = transformers_model(4)
    model.config._name_or_path = "facebook/dinov3-vitl16-pretrain-sat493m"
    assert timm.mean == Dinov3Teacher(model).mean == SATELLITE_MEAN
    assert timm_teacher().mean == IMAGENET_MEAN
    assert timm_teacher(mean=(0.5, 0.5, 0.5)).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("height", "width", "remedy"),
    [
        (250, 224, r"\(240 or 256\) x 224"),
        (32, 40, r"32 x \(32 or 48\)"),
        (8, 16, "16 x 16"),
        (0, 16, "16 x 16"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest(height: int, width: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        timm_teacher()(images(1, 3, height, width))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\), got \(1, 1, 32, 32\)"):
        timm_teacher()(images(1, 1, 32, 32))


def test_convnext_is_refused() -> None:
    with pytest.raises(ValueError, match="choose a ViT"):
        Dinov3Teacher("convnext_atto", pretrained=False)
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

    config = DINOv3ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="choose a ViT"):
        Dinov3Teacher(DINOv3ConvNextModel(config))


def test_a_model_whose_tokens_are_not_a_grid_is_refused() -> None:
    class Odd(nn.Module):
        config = type("Config", (), {"hidden_size": 4, "patch_size": 16, "num_register_tokens": 4})

        def forward(self, pixel_values: Tensor) -> Any:
            return type("Output", (), {"last_hidden_state": torch.zeros(1, 5, 4)})

    odd = Odd()
    odd.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="expected 9 tokens"):
        Dinov3Teacher(odd)(images(1, 3, 32, 32))


def test_options_of_a_finished_model_are_refused() -> None:
    with pytest.raises(ValueError, match="takes no options"):
        Dinov3Teacher(timm_teacher().model, depth=3)


def test_stays_frozen_in_a_training_model() -> None:
    teacher = timm_teacher(drop_path_rate=0.5)
    student = nn.Linear(48, 8)
    around = nn.ModuleList([teacher, student])
    around.train()
    assert student.training
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    x = images(2, 3, 64, 64).requires_grad_()
    features = teacher(x)
    assert not features.patches.requires_grad
    torch.testing.assert_close(features.patches, teacher(x).patches, rtol=0, atol=0)
    student(features.patches).sum().backward()
    assert x.grad is None
    assert student.weight.grad is not None


def test_stays_out_of_the_checkpoint_around_it() -> None:
    def model(seed: int) -> nn.Sequential:
        teacher = timm_teacher()
        torch.manual_seed(seed)
        return nn.Sequential(teacher, nn.Linear(48, 8))

    first, second = model(1), model(2)
    state = first.state_dict()
    assert set(state) == {"1.weight", "1.bias"}
    with torch.no_grad():
        next(second[0].parameters()).add_(1)
    teacher: Any = second[0]
    before = teacher.weights_hash()
    second.load_state_dict(state)  # strict
    assert teacher.weights_hash() == before
    torch.testing.assert_close(second[1].weight, first[1].weight, rtol=0, atol=0)
    second.load_state_dict(state, assign=True)
    assert teacher.weights_hash() == before
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict({"1.bias": state["1.bias"]})
    copied = copy.deepcopy(second)
    copied.load_state_dict(copied.state_dict())


class Wrapper(nn.Module):
    """Renames what it wraps and adds to it, as torch.compile and LoRA do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(()), persistent=False)


@pytest.mark.parametrize("wrap", [torch.compile, Wrapper])
@pytest.mark.parametrize("what", ["teacher", "its model", "a layer of its model"])
def test_stays_out_of_the_checkpoint_when_wrapped(what: str, wrap: Any) -> None:
    whole: Any = nn.Sequential(timm_teacher(), nn.Linear(48, 8))
    teacher = whole[0]
    before = teacher.weights_hash()
    if what == "teacher":
        whole[0] = wrap(teacher)
    elif what == "its model":
        teacher.model = wrap(teacher.model)
    else:
        teacher.model.norm = wrap(teacher.model.norm)
    state = whole.state_dict()
    own = {f"0.{x}" for x in ("adapter.weight", "adapter.bias", "count")}
    expected = {"1.weight", "1.bias"} | (own if what == "teacher" and wrap is Wrapper else set())
    assert set(state) == expected
    bias = state["1.bias"] + 1
    whole.load_state_dict({name: value + 1 for name, value in state.items()})
    torch.testing.assert_close(whole[1].bias.detach(), bias)
    assert what != "teacher" or teacher.weights_hash() == before


def test_is_in_the_checkpoint_when_asked() -> None:
    first, second = timm_teacher(in_checkpoints=True), timm_teacher(in_checkpoints=True)
    with torch.no_grad():
        next(first.parameters()).add_(1)
    assert first.weights_hash() != second.weights_hash()
    second.load_state_dict(first.state_dict())
    assert first.weights_hash() == second.weights_hash()


def test_half_precision_and_autocast() -> None:
    x = images(2, 3, 64, 64)
    exact = timm_teacher()(x).patches
    half = timm_teacher().to(torch.bfloat16)(x).patches
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        mixed = timm_teacher()(x).patches
    assert (mixed.float() - exact).abs().mean() < 0.05


def test_weights_hash_sees_every_weight_but_not_the_device_or_order() -> None:
    teacher = timm_teacher()
    assert teacher.weights_hash() == timm_teacher().weights_hash()
    with torch.no_grad():
        list(teacher.parameters())[-1][-1] += 1e-3
    assert teacher.weights_hash() != timm_teacher().weights_hash()


def test_importing_fusion_imports_no_optional_package() -> None:
    code = (
        "import sys\n"
        "from rankloss.fusion import Dinov3Teacher, DualBranchStudent, TokenPCA\n"
        "heavy = {'timm', 'transformers', 'matplotlib', 'safetensors', 'open_clip'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "package", ["timm", "transformers", "matplotlib", "safetensors", "open_clip"]
)
def test_missing_packages_are_in_the_extra_that_the_remedy_names(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'rankloss\[[\w-]+\]'") as caught:
        require(package)
    extra = str(caught.value).split("[")[1].split("]")[0]
    listed = (ROOT / "pyproject.toml").read_text().split(f"\n{extra} = ")[1].split("\n")[0]
    distribution = {"open_clip": "open_clip_torch"}.get(package, package)
    assert f'"{distribution}' in listed


def test_a_missing_library_of_a_teacher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, name in (("timm", NAME), ("transformers", "facebook/dinov3")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=f"{library} cannot be imported"):
            Dinov3Teacher(name, pretrained=False)

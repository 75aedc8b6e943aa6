"""A frozen DINOv3 and its patch tokens, whatever library it comes from."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rankloss.fusion.digest import digest
from rankloss.fusion.optional import require
from rankloss.fusion.patches import Grid, patch_grid
from rankloss.fusion.precision import full_dtype, without_autocast
from rankloss.fusion.state import whole_state

Library = Literal["timm", "transformers"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SATELLITE_MEAN = (0.430, 0.411, 0.296)
SATELLITE_STD = (0.213, 0.156, 0.143)


class TeacherFeatures(NamedTuple):
    """Tokens of the teacher for B images, after its last LayerNorm.

    Attributes:
        patches: (B, h w, D), in row-major order of the grid.
        cls: (B, D).
        grid: (h, w).

    Example:
        >>> features = TeacherFeatures(torch.randn(2, 49, 384), torch.randn(2, 384), (7, 7))
        >>> features.text_aligned.shape
        torch.Size([2, 768])
    """

    patches: Tensor
    cls: Tensor
    grid: Grid

    @property
    def text_aligned(self) -> Tensor:
        """Join CLS and mean patch to (B, 2 D), the space that dino.txt aligns texts with."""
        return torch.cat([self.cls, self.patches.mean(1)], 1)


class Dinov3Teacher(nn.Module):
    """A frozen DINOv3 Vision Transformer that takes CLIP's images.

    Tokens are CLS, registers, then patches; patches are cut out by that number of prefix tokens,
    since timm's `model(x)` is the mean of the patches and transformers' `pooler_output` is CLS.
    The teacher always is in evaluation mode, has no gradient, and stays out of the checkpoint of
    a model that contains it.

    Args:
        model: a timm name ("vit_base_patch16_dinov3"), a transformers name or folder
            ("facebook/dinov3-vitb16-pretrain-lvd1689m"), or a model of either library.
        pretrained: load (and if need be download) weights; False leaves random ones.
        library: "timm" or "transformers", where the name belongs; by default transformers if it
            has a slash.
        input_mean, input_std: statistics the images were normalised with, by default CLIP's.
        mean, std: statistics the teacher was trained with, by default what the model says:
            ImageNet's, or for "sat493m" models those of satellite images.
        in_checkpoints: keep the teacher's weights in state_dict.
        options: further arguments of timm.create_model, or of transformers' from_pretrained.

    Attributes:
        dim: D, width of the tokens.
        patch_size, prefix_tokens: pixels of a patch's side; tokens before the first patch.

    Raises:
        ImportError: the library is missing.
        ValueError: the model is no Vision Transformer.

    Example:
        >>> teacher = Dinov3Teacher("vit_small_patch16_dinov3", pretrained=False, depth=1)
        >>> features = teacher(torch.randn(1, 3, 224, 224))  # normalised as for CLIP
        >>> features.patches.shape, features.cls.shape, features.grid
        (torch.Size([1, 196, 384]), torch.Size([1, 384]), (14, 14))
    """

    def __init__(
        self,
        model: str | nn.Module = "vit_base_patch16_dinov3",
        *,
        pretrained: bool = True,
        library: Library | None = None,
        input_mean: Sequence[float] = CLIP_MEAN,
        input_std: Sequence[float] = CLIP_STD,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        in_checkpoints: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            library = library or ("transformers" if "/" in model else "timm")
            model = _BUILDERS[library](model, pretrained, options)
        elif options:
            raise ValueError(f"a model that exists already takes no options, got {options}")
        self.model = model.requires_grad_(False).eval()
        self.dim, self.patch_size, self.prefix_tokens = _geometry(model)
        default_mean, default_std = _statistics(model)
        self.mean, self.std = tuple(mean or default_mean), tuple(std or default_std)
        self.input_mean, self.input_std = tuple(input_mean), tuple(input_std)
        self._register_normalisation()
        if not in_checkpoints:
            hooks: Any = self  # torch leaves these two without types
            hooks.register_state_dict_post_hook(_drop_own)
            hooks.register_load_state_dict_pre_hook(_keep_own)

    def _register_normalisation(self, device: torch.device | None = None) -> None:
        """Precompute (picture - mean) / std, the picture being x input_std + input_mean."""
        mean, std, mean_in, std_in = (
            torch.tensor(x, dtype=torch.float64).view(3, 1, 1)
            for x in (self.mean, self.std, self.input_mean, self.input_std)
        )
        self.scale: Tensor
        self.shift: Tensor
        scale, shift = std_in / std, (mean_in - mean) / std
        self.register_buffer("scale", scale.float().to(device), persistent=False)
        self.register_buffer("shift", shift.float().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Dinov3Teacher":
        """Move or cast the weights; the pixels' statistics stay in float32 (after meta, too)."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._register_normalisation(self.scale.device)
        return self

    def train(self, mode: bool = True) -> "Dinov3Teacher":
        """Stay in evaluation mode, whatever the model around it does."""
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """Renormalise images from the input's statistics to the teacher's, float32 at least."""
        dtype = full_dtype(images)
        with without_autocast(images):
            return images.to(dtype) * self.scale + self.shift

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherFeatures:
        """Compute features of images, in the dtype of the teacher's weights (or autocast's).

        Args:
            images: (B, 3, H, W) floating, normalised with input_mean and input_std.

        Raises:
            ValueError: H or W is not a multiple of the patch size; names the nearest that are.
            TypeError: images are not floating point.
        """
        grid = patch_grid("Dinov3Teacher", images, self.patch_size)
        images = self.normalise(images).to(next(self.model.parameters()).dtype)
        tokens = self._tokens(images)
        expected = self.prefix_tokens + grid[0] * grid[1]
        if tokens.dim() != 3 or tokens.shape[1] != expected:
            raise ValueError(
                f"Dinov3Teacher: expected {expected} tokens, of which {self.prefix_tokens} before "
                f"the patches, got {tuple(tokens.shape)} from {type(self.model).__name__}"
            )
        return TeacherFeatures(tokens[:, self.prefix_tokens :], tokens[:, 0], grid)

    def _tokens(self, images: Tensor) -> Tensor:
        """Compute all tokens (B, prefix + h w, D), normed."""
        model: Any = self.model
        if hasattr(model, "forward_features"):
            tokens: Tensor = model.forward_features(images)
        else:
            tokens = model(pixel_values=images).last_hidden_state
        return tokens

    def weights_hash(self) -> str:
        """Hash the weights, whatever file or version of the library they came from."""
        return digest(dict(self.model.named_parameters()))


def _build_timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Build the network without a classifier, whose weights would only be random."""
    model: nn.Module = require("timm").create_model(
        name, pretrained=pretrained, **{"num_classes": 0, **options}
    )
    return model


def _build_transformers(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    transformers = require("transformers")
    model: nn.Module
    if pretrained:
        model = transformers.AutoModel.from_pretrained(name, **options)
    else:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        model = transformers.AutoModel.from_config(config)
    return model


_BUILDERS = {"timm": _build_timm, "transformers": _build_transformers}


def _geometry(model: Any) -> tuple[int, int, int]:
    """Read width, patch size and number of prefix tokens of a model of either library."""
    config: Any = getattr(model, "config", None)
    if hasattr(model, "forward_features") and hasattr(model, "num_prefix_tokens"):
        return model.num_features, model.patch_embed.patch_size[0], model.num_prefix_tokens
    if hasattr(config, "num_register_tokens") and hasattr(config, "patch_size"):
        return config.hidden_size, config.patch_size, 1 + config.num_register_tokens
    raise ValueError(
        f"Dinov3Teacher: {type(model).__name__} is not a Vision Transformer of timm or "
        "transformers with patch and prefix tokens; DINOv3's ConvNeXt models have feature maps "
        "instead, so choose a ViT, for example 'vit_base_patch16_dinov3'"
    )


def _statistics(model: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Read mean and standard deviation of the teacher's training images."""
    timm_config = getattr(model, "pretrained_cfg", None)
    if timm_config:
        return timm_config["mean"], timm_config["std"]
    if "sat493m" in str(getattr(getattr(model, "config", None), "_name_or_path", "")):
        return SATELLITE_MEAN, SATELLITE_STD
    return IMAGENET_MEAN, IMAGENET_STD


def _drop_own(module: Dinov3Teacher, state: dict[str, Any], prefix: str, _: object) -> None:
    """Leave all of the teacher out of a state_dict, also what has wrapped its model since."""
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _keep_own(module: Dinov3Teacher, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Let load_state_dict find the teacher's own tensors, which were not saved."""
    for name, value in whole_state(module).items():
        state.setdefault(prefix + name, value)

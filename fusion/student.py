"""The student that distillation trains: a ViT-Tiny for images, a small Transformer for texts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankloss.fusion.masks import check_mask, hide_masked
from rankloss.fusion.optional import require
from rankloss.fusion.patches import Grid, patch_grid


class StudentTokens(NamedTuple):
    """Tokens of a student; None for a modality that it was not given.

    Attributes:
        image: (B, h w, token_dim) patch tokens, in row-major order of the grid.
        grid: (h, w).
        text: (B, L, token_dim) tokens; 0 where text_mask is False.
        text_mask: (B, L) bool, True for real tokens.

    Example:
        >>> StudentTokens(image=torch.randn(2, 49, 256), grid=(7, 7)).text is None
        True
    """

    image: Tensor | None = None
    grid: Grid | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None


class ImageBranch(nn.Module):
    """timm's ViT-Tiny (192 wide, 12 deep, 3 heads) and a linear map of its patch tokens.

    Args:
        token_dim: width of the tokens returned.
        image_size: side in pixels for which positions are learned; other sizes interpolate them.
        model: timm name of a Vision Transformer.
        options: further arguments of timm.create_model.

    Raises:
        ImportError: timm is missing.

    Example:
        >>> tokens, grid = ImageBranch(256, depth=1)(torch.randn(1, 3, 224, 224))
        >>> tokens.shape, grid
        (torch.Size([1, 196, 256]), (14, 14))
    """

    def __init__(
        self,
        token_dim: int = 256,
        image_size: int = 224,
        model: str = "vit_tiny_patch16_224",
        **options: Any,
    ) -> None:
        super().__init__()
        defaults = {"num_classes": 0, "img_size": image_size, "dynamic_img_size": True}
        self.trunk = require("timm").create_model(model, **{**defaults, **options})
        self.patch_size: int = self.trunk.patch_embed.patch_size[0]
        self.to_tokens = nn.Linear(self.trunk.num_features, token_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Encode images as patch tokens.

        Args:
            images: (B, 3, H, W) floating.

        Returns:
            Tokens (B, h w, token_dim), and the grid (h, w).

        Raises:
            ValueError: H or W is not a multiple of the patch size.
            TypeError: images are not floating point.
        """
        grid = patch_grid("DualBranchStudent", images, self.patch_size)
        tokens = self.trunk.forward_features(images)[:, self.trunk.num_prefix_tokens :]
        return self.to_tokens(tokens), grid


class TextBranch(nn.Module):
    """A small pre-norm Transformer encoder over a tokenizer's ids; every token sees all others.

    Args:
        token_dim: width of the tokens returned.
        vocabulary: number of the tokenizer's ids, by default open_clip's 49408.
        context_length: most tokens of a text, 77 by default.
        end_token: id that ends a text; all that follows is padding. (Padding itself is 0 in
            open_clip's tokenizer, but so is "!".)
        width, depth, heads: sizes of the Transformer (this project's choice).

    Example:
        >>> branch = TextBranch(256, depth=1)
        >>> ids = torch.tensor([[49406, 320, 49407, 0], [49406, 320, 736, 49407]])
        >>> tokens, mask = branch(ids)
        >>> tokens.shape, mask.sum(1)
        (torch.Size([2, 4, 256]), tensor([3, 4]))
    """

    def __init__(
        self,
        token_dim: int = 256,
        *,
        vocabulary: int = 49408,
        context_length: int = 77,
        end_token: int = 49407,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
    ) -> None:
        super().__init__()
        self.end_token, self.context_length = end_token, context_length
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context_length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.trunk = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.to_tokens = nn.Linear(width, token_dim)
        self._initialise()

    def _initialise(self) -> None:
        """Give every layer weights of its own; nn.TransformerEncoder copies one layer."""
        for parameter in self.trunk.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def mask(self, text_ids: Tensor) -> Tensor:
        """Mark real tokens, (B, L) bool: up to the first end token, or all where there is none."""
        ended = text_ids == self.end_token
        return (ended.cumsum(1) - ended.long()) == 0

    def forward(self, text_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode texts as tokens, and say which tokens are real.

        Args:
            text_ids: (B, L) int64, L <= context_length.
            mask: (B, L) bool, True for real tokens; None asks the end token.

        Returns:
            Tokens (B, L, token_dim), 0 where the mask (B, L) is False, and the mask.

        Raises:
            ValueError: another shape, or too long.
            TypeError: the mask is not bool.
        """
        if text_ids.dim() != 2 or not 1 <= text_ids.shape[1] <= self.context_length:
            raise ValueError(
                f"DualBranchStudent: text_ids must be (B, L) with L at most {self.context_length}, "
                f"got {tuple(text_ids.shape)}"
            )
        if mask is None:
            mask = self.mask(text_ids)
        check_mask("DualBranchStudent", "text_mask", mask, text_ids)
        tokens = self.words(text_ids) + self.positions[: text_ids.shape[1]]
        tokens = self.to_tokens(self.trunk(tokens, src_key_padding_mask=~mask))
        return hide_masked(tokens, mask), mask


class DualBranchStudent(nn.Module):
    """Tokens of images and of texts from two small Transformers, either optional.

    The image branch is distilled from the teacher's patch tokens; the text branch from its
    text-aligned space. Their tokens are what `MultiScaleFusion` injects.

    Args:
        image, text: include that branch, at least one; image only is a supported configuration.
        token_dim: width of both branches' tokens.
        image_size: as in `ImageBranch`.
        context_length: as in `TextBranch`.
        image_options, text_options: further arguments of `ImageBranch` and `TextBranch`.

    Raises:
        ImportError: timm is missing (image branch only).
        ValueError: no branch.

    Example:
        >>> student = DualBranchStudent(image_options={"depth": 1}, text_options={"depth": 1})
        >>> tokens = student(torch.randn(1, 3, 224, 224), torch.tensor([[49406, 320, 49407]]))
        >>> tokens.image.shape, tokens.text.shape
        (torch.Size([1, 196, 256]), torch.Size([1, 3, 256]))
    """

    def __init__(
        self,
        image: bool = True,
        text: bool = True,
        *,
        token_dim: int = 256,
        image_size: int = 224,
        context_length: int = 77,
        image_options: dict[str, Any] | None = None,
        text_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not (image or text):
            raise ValueError("DualBranchStudent: needs an image branch, a text branch, or both")
        self.token_dim = token_dim
        self.image = ImageBranch(token_dim, image_size, **(image_options or {})) if image else None
        self.text = (
            TextBranch(token_dim, context_length=context_length, **(text_options or {}))
            if text
            else None
        )

    def forward(
        self,
        images: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> StudentTokens:
        """Encode images, texts, or both as tokens.

        Args:
            images: (B, 3, H, W) floating.
            text_ids: (B, L) int64.
            text_mask: (B, L) bool, True for real tokens; None asks the end token.

        Raises:
            ValueError: an input for a branch that does not exist, or of the wrong shape.
        """
        for name, given, branch in (
            ("images", images, self.image),
            ("text_ids", text_ids, self.text),
        ):
            if given is not None and branch is None:
                raise ValueError(f"DualBranchStudent: got {name}, but has no branch for them")
        output = StudentTokens()
        if self.image is not None and images is not None:
            tokens, grid = self.image(images)
            output = output._replace(image=tokens, grid=grid)
        if self.text is not None and text_ids is not None:
            tokens, mask = self.text(text_ids, text_mask)
            output = output._replace(text=tokens, text_mask=mask)
        return output

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should spare: embeddings and positions."""
        spared = {"text.words.weight", "text.positions"}
        if self.image is not None:  # timm also names what other variants of the model have
            spared |= {f"image.trunk.{name}" for name in self.image.trunk.no_weight_decay()}
        return spared & dict(self.named_parameters()).keys()

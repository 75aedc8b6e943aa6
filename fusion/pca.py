"""Principal components of teacher tokens: fitted once, kept as safetensors, applied in torch."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankloss.fusion.digest import digest
from rankloss.fusion.optional import require
from rankloss.fusion.precision import full_dtype, without_autocast


class TokenPCA(nn.Module):
    """An orthonormal projection of tokens to fewer dimensions; never whitened.

        y = (x - mean) components^T

    Without centring (the default) mean = 0 and the components span what the second moment
    E[x x^T] has most of, which keeps inner products and norms, hence cosines and Gram matrices,
    up to truncation. Centring keeps distances as well but changes cosines. Whitening destroys
    both. The sign of each component makes its largest entry positive.

    Args:
        components: (k, D) orthonormal rows.
        mean: (D,), or None for zeros.
        explained: (k,) share of each component in E|x - mean|^2, descending.
        fit: how the projection was found; JSON-able.

    Raises:
        ValueError: shapes do not fit together.

    Example:
        >>> pca = TokenPCA(torch.eye(4)[:2])  # keeps the first two of four dimensions
        >>> pca(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[1., 2.]])
    """

    def __init__(
        self,
        components: Tensor,
        mean: Tensor | None = None,
        explained: Tensor | None = None,
        fit: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        k, d = components.shape
        mean = torch.zeros(d) if mean is None else mean
        explained = torch.full((k,), math.nan) if explained is None else explained
        if mean.shape != (d,) or explained.shape != (k,):
            raise ValueError(
                f"TokenPCA: components {tuple(components.shape)} need a mean of ({d},) and "
                f"explained of ({k},), got {tuple(mean.shape)} and {tuple(explained.shape)}"
            )
        self.components: Tensor
        self.mean: Tensor
        self.explained: Tensor
        self.register_buffer("components", components.float().contiguous())
        self.register_buffer("mean", mean.float())
        self.register_buffer("explained", explained.float())
        self.fit_settings = fit or {}

    @property
    def in_dim(self) -> int:
        return self.components.shape[1]

    @property
    def out_dim(self) -> int:
        return self.components.shape[0]

    @classmethod
    def fit(
        cls,
        tokens: Tensor,
        dim: int = 256,
        *,
        centre: bool = False,
        max_tokens: int = 50_000,
        seed: int = 0,
    ) -> "TokenPCA":
        """Fit to tokens, or to a random sample of them.

        Computed in float64 from the eigenvectors of the D x D second moment (centred: of the
        covariance), which is summed over a few thousand tokens at a time; nothing is random but
        the sample.

        Args:
            tokens: (..., D) floating, finite.
            dim: k, 256 by default.
            centre: subtract the mean.
            max_tokens: size of the sample; far more than D.
            seed: random seed of the sample.

        Raises:
            ValueError: dim exceeds D or the number of tokens, tokens are not finite, or they do
                not differ from their mean (without centring: from 0).

        Example:
            >>> tokens = torch.randn(100, 3) * torch.tensor([3.0, 1.0, 0.0])
            >>> pca = TokenPCA.fit(tokens, dim=2)
            >>> pca(tokens).shape
            torch.Size([100, 2])
        """
        rows = tokens.detach().reshape(-1, tokens.shape[-1])
        total, width = rows.shape
        order = torch.arange(total)
        if total > max_tokens:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
            order = order[:max_tokens].sort().values
        if not 1 <= dim <= min(len(order), width):
            raise ValueError(
                f"TokenPCA: {dim} components need at least as many dimensions and tokens, got "
                f"{len(order)} tokens of {width} dimensions"
            )
        mean = _mean(rows, order) if centre else torch.zeros(width, dtype=torch.float64)
        components, explained = _principal(rows, order, mean, dim)
        settings = {"dim": dim, "centre": centre, "tokens": len(order), "seed": seed}
        return cls(components, mean, explained, settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens (..., D) to (..., k).

        Computed in float32 (float64 if given so) whatever autocast says; returns the dtype given.

        Raises:
            ValueError: the width is not D.
        """
        if tokens.shape[-1] != self.in_dim:
            raise ValueError(
                f"TokenPCA: fitted to {self.in_dim} dimensions, got tokens {tuple(tokens.shape)}"
            )
        dtype = full_dtype(tokens)
        with without_autocast(tokens):
            centred = tokens.to(dtype) - self.mean.to(dtype)
            return (centred @ self.components.to(dtype).T).to(tokens.dtype)

    transform = forward

    def content_hash(self) -> str:
        """Hash the projection: two with the same hash give the same features."""
        return digest({"components": self.components, "mean": self.mean})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {name: value.cpu() for name, value in self.state_dict().items()}
        # one entry, because safetensors writes several in random order
        header = {"token_pca": json.dumps(self.fit_settings)}
        # not save_file, whose files only their owner can read
        Path(path).write_bytes(require("safetensors.torch").save(tensors, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> "TokenPCA":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or another program wrote it.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no PCA file {path}")
        try:
            with require("safetensors").safe_open(path, framework="pt") as file:
                fit = json.loads(file.metadata()["token_pca"])
                components, mean, explained = (
                    file.get_tensor(name) for name in ("components", "mean", "explained")
                )
            return cls(components, mean, explained, fit)
        except ImportError:
            raise
        except Exception as error:  # safetensors' own class, KeyError, TypeError, ...
            raise ValueError(f"{path} is not a TokenPCA file ({error})") from error

    def plot(self, path: str | Path) -> None:
        """Draw the explained variance, of each component and cumulated, into a PNG file.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure = require("matplotlib.figure").Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        share = self.explained.cpu().numpy()
        number = np.arange(1, self.out_dim + 1)
        axes.plot(number, share.cumsum(), label="first k components together")
        axes.plot(number, share, linestyle="dashed", label="component k alone")
        axes.set(xlabel="k", ylabel=self._variance_name(), ylim=(0, 1.02))
        axes.set_title(f"{self.in_dim} to {self.out_dim} dimensions keep {share.sum():.1%}")
        axes.legend(loc="center right")
        figure.savefig(path, dpi=110, format="png")

    def _variance_name(self) -> str:
        return "share of variance" if self.mean.any() else "share of second moment"

    def extra_repr(self) -> str:
        return f"{self.in_dim}, {self.out_dim}, {self._variance_name()} {self.explained.sum():.4f}"


CHUNK = 4096
"""Tokens whose float64 copy is in memory at a time."""


def _chunks(rows: Tensor, order: Tensor) -> Iterator[Tensor]:
    """Copy some rows at a time to the CPU, in float64."""
    for part in order.split(CHUNK):  # type: ignore[no-untyped-call]
        yield rows[part.to(rows.device)].cpu().double()


def _mean(rows: Tensor, order: Tensor) -> Tensor:
    """Average rows (n, D) in float64."""
    return torch.stack([part.sum(0) for part in _chunks(rows, order)]).sum(0) / len(order)


def _principal(rows: Tensor, order: Tensor, mean: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Compute components (k, D) and explained shares (k,) of rows (n, D) around a mean (D,)."""
    moment = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in _chunks(rows, order):
        centred = part - mean
        moment += centred.T @ centred
    if not moment.isfinite().all():
        raise ValueError("TokenPCA: tokens must be finite")
    values, vectors = torch.linalg.eigh(moment)  # ascending
    if not values.sum() > 0:
        raise ValueError(
            "TokenPCA: all tokens are equal to their mean, or zero, so that no direction explains "
            "anything; fit to features of real images"
        )
    components = vectors.T.flip(0)[:dim]
    largest = components.abs().argmax(1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    return components, values.flip(0)[:dim].clamp(min=0) / values.sum()

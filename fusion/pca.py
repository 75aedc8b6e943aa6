"""Principal components of teacher tokens: fitted once, kept as safetensors, applied in torch."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankloss.fusion.digest import digest
from rankloss.fusion.optional import require


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

        Computed in float64 by scikit-learn's PCA from the exact eigenvectors of the D x D
        covariance, so nothing is random but the sample. Without centring, tokens enter together
        with their negatives: their mean is then 0 and their covariance the second moment.

        Args:
            tokens: (..., D), finite.
            dim: k.
            centre: subtract the mean.
            max_tokens: size of the sample; far more than D.
            seed: of the sample.

        Raises:
            ImportError: scikit-learn is missing.
            ValueError: dim exceeds D or the number of tokens, or tokens are not finite.
        """
        rows = tokens.detach().reshape(-1, tokens.shape[-1]).cpu()
        total, width = rows.shape
        if total > max_tokens:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
            rows = rows[order[:max_tokens].sort().values]
        if not 1 <= dim <= min(rows.shape):
            raise ValueError(
                f"TokenPCA: {dim} components need at least as many dimensions and tokens, got "
                f"{rows.shape[0]} tokens of {width} dimensions"
            )
        sample = rows.double().numpy()
        if not np.isfinite(sample).all():
            raise ValueError("TokenPCA: tokens must be finite")
        components, mean, explained = _principal(sample, dim, centre)
        settings = {"dim": dim, "centre": centre, "tokens": rows.shape[0], "seed": seed}
        return cls(
            torch.from_numpy(components),
            torch.from_numpy(mean),
            torch.from_numpy(explained),
            settings,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., k), in float32 (float64 if given so) whatever autocast says.

        Returns the dtype given.

        Raises:
            ValueError: the width is not D.
        """
        if tokens.shape[-1] != self.in_dim:
            raise ValueError(
                f"TokenPCA: fitted to {self.in_dim} dimensions, got tokens {tuple(tokens.shape)}"
            )
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            centred = tokens.to(dtype) - self.mean.to(dtype)
            return (centred @ self.components.to(dtype).T).to(tokens.dtype)

    transform = forward

    def content_hash(self) -> str:
        """Identifies the projection: two with the same hash give the same features."""
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


def _principal(
    sample: NDArray[np.float64], dim: int, centre: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Components (k, D), mean (D,) and explained shares (k,) of rows (n, D)."""
    rows = sample if centre else np.concatenate([sample, -sample])
    solver = require("sklearn.decomposition").PCA(dim, svd_solver="covariance_eigh")
    solver.fit(rows)
    components: NDArray[np.float64] = solver.components_
    largest = np.abs(components).argmax(1)
    components = components * np.sign(components[np.arange(dim), largest])[:, None]
    mean = solver.mean_ if centre else np.zeros(sample.shape[1])
    return components, mean, solver.explained_variance_ratio_

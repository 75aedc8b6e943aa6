"""The projection: exact, deterministic, uncentred unless asked, never whitened, kept on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rankloss.fusion.pca import TokenPCA
from tests.helpers.recorder import Recorder


def tokens(n: int = 400, d: int = 12, mean: float = 2.0) -> Tensor:
    """(n, d) correlated rows with a mean of their own."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.diag(torch.linspace(3, 0.1, d)) @ torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ spread + mean


def eigenvectors(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Axes of the second moment, float64, by descending eigenvalue: (D, D) rows, (D,) shares."""
    x = rows.double()
    values, vectors = torch.linalg.eigh(x.T @ x)
    return vectors.T.flip(0), values.flip(0) / values.sum()


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_spans_the_leading_eigenvectors(centre: bool, k: int) -> None:
    x = tokens()
    pca = TokenPCA.fit(x, k, centre=centre)
    vectors, shares = eigenvectors(x - x.mean(0) if centre else x)
    signs = (pca.components.double() * vectors[:k]).sum(1).sign()
    torch.testing.assert_close(
        pca.components.double(), vectors[:k] * signs[:, None], rtol=0, atol=2e-6
    )
    torch.testing.assert_close(pca.explained.double(), shares[:k], rtol=1e-5, atol=1e-7)
    expected_mean = x.mean(0) if centre else torch.zeros(12)
    torch.testing.assert_close(pca.mean, expected_mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centre", [False, True])
def test_all_components_keep_distances_and_uncentred_ones_cosines_too(centre: bool) -> None:
    x = tokens(50).double()
    y = TokenPCA.fit(x, 12, centre=centre)(x)
    torch.testing.assert_close(torch.cdist(y, y), torch.cdist(x, x), rtol=1e-5, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity
    change = (cosine(y[:1], y[1:]) - cosine(x[:1], x[1:])).abs().max()
    assert change > 0.1 if centre else change < 1e-5


def test_is_not_whitened() -> None:
    x = tokens(2000)
    pca = TokenPCA.fit(x, 6, centre=True)
    variance = pca(x).var(0)
    torch.testing.assert_close(variance / x.var(0).sum(), pca.explained, rtol=1e-4, atol=1e-5)
    assert variance[0] > 3 * variance[-1]
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(6), rtol=0, atol=1e-6)


def test_signs_are_fixed() -> None:
    x = tokens()
    pca, flipped = TokenPCA.fit(x, 12), TokenPCA.fit(-x, 12)
    torch.testing.assert_close(pca.components, flipped.components)
    largest = pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_sample_is_seeded_and_limited() -> None:
    x = tokens(1000)
    one, again = (TokenPCA.fit(x, 4, max_tokens=100, seed=3) for _ in range(2))
    other = TokenPCA.fit(x, 4, max_tokens=100, seed=4)
    assert one.content_hash() == again.content_hash() != other.content_hash()
    assert one.fit_settings == {"dim": 4, "centre": False, "tokens": 100, "seed": 3}
    state = torch.get_rng_state()
    TokenPCA.fit(x, 4, max_tokens=100)
    assert torch.equal(torch.get_rng_state(), state)


def test_leading_dimensions_and_half_precision_are_accepted() -> None:
    x = tokens(400).view(4, 10, 10, 12)
    pca = TokenPCA.fit(x.to(torch.bfloat16), 3)
    assert pca(x).shape == (4, 10, 10, 3)
    assert pca.transform(x[0, 0, 0]).shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_float32_and_returns_the_dtype_given(dtype: torch.dtype) -> None:
    x = tokens().to(dtype)
    pca = TokenPCA.fit(x, 5)
    exact = x.double() @ pca.components.double().T
    with torch.autocast("cpu", torch.bfloat16):
        y = pca(x)
    assert y.dtype == dtype
    precision = max(torch.finfo(dtype).eps, 1e-15)
    assert ((y.double() - exact).abs() <= precision * 4 * x.double().norm(dim=1)[:, None]).all()


def test_file_gives_back_everything(tmp_path: Path) -> None:
    pca = TokenPCA.fit(tokens(), 5, centre=True)
    pca.save(tmp_path / "a.safetensors")
    loaded = TokenPCA.load(tmp_path / "a.safetensors")
    for name, value in pca.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    assert loaded.fit_settings == pca.fit_settings
    assert loaded.content_hash() == pca.content_hash()
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_hash_is_of_what_changes_features() -> None:
    pca = TokenPCA.fit(tokens(), 5)
    same = TokenPCA(pca.components, None, None)
    assert same.content_hash() == pca.content_hash()
    assert TokenPCA(pca.components, torch.ones(12)).content_hash() != pca.content_hash()
    assert TokenPCA(-pca.components).content_hash() != pca.content_hash()


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "pca.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no PCA file"):
        TokenPCA.load(path)
    TokenPCA.fit(tokens(), 5).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a TokenPCA file"):
        TokenPCA.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a TokenPCA file"):
        TokenPCA.load(path)


@pytest.mark.parametrize("centre", [False, True])
def test_tokens_without_any_direction_are_refused(centre: bool) -> None:
    same = torch.full((9, 4), 3.0) if centre else torch.zeros(9, 4)
    with pytest.raises(ValueError, match="no direction explains anything"):
        TokenPCA.fit(same, 2, centre=centre)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("max_tokens", [30_000, 50_000])
def test_no_second_copy_of_the_sample_is_made(max_tokens: int, centre: bool) -> None:
    x = torch.randn(50_000, 8)
    with Recorder(x) as recorder:
        TokenPCA.fit(x, 4, centre=centre, max_tokens=max_tokens)
    assert recorder.largest <= x.numel() / 7  # the sample's order, an integer a token


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="13 components need"):
        TokenPCA.fit(tokens(), 13)
    with pytest.raises(ValueError, match="got 3 tokens"):
        TokenPCA.fit(tokens(3), 4)
    with pytest.raises(ValueError, match="finite"):
        TokenPCA.fit(torch.full((9, 4), float("nan")), 2)
    with pytest.raises(ValueError, match=r"need a mean of \(4,\)"):
        TokenPCA(torch.eye(4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"fitted to 12 dimensions, got tokens \(2, 7\)"):
        TokenPCA.fit(tokens(), 2)(torch.zeros(2, 7))


def test_plot_and_description(tmp_path: Path) -> None:
    pca = TokenPCA.fit(tokens(), 5)
    pca.plot(tmp_path / "pca.png")
    with Image.open(tmp_path / "pca.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    assert "12, 5, share of second moment 0." in repr(pca)
    assert "share of variance" in repr(TokenPCA.fit(tokens(), 5, centre=True))

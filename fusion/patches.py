"""Images as grids of square patches."""

from torch import Tensor

Grid = tuple[int, int]


def patch_grid(operation: str, images: Tensor, patch_size: int) -> Grid:
    """Compute (height, width) in patches of images (B, 3, H, W).

    Raises:
        ValueError: images have another shape, or a side is not a multiple of the patch size.
        TypeError: images are not floating point.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"{operation}: images must be floating point and normalised, got {images.dtype}; "
            "divide whole numbers by 255, subtract the mean, divide by the standard deviation"
        )
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"{operation}: images must be (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[2:]
    if min(height, width) < patch_size or height % patch_size or width % patch_size:
        nearest = " x ".join(_nearest(side, patch_size) for side in (height, width))
        raise ValueError(
            f"{operation}: sides must be multiples of the patch size {patch_size}, got {height} x "
            f"{width}; resize to {nearest}"
        )
    return height // patch_size, width // patch_size


def _nearest(side: int, patch_size: int) -> str:
    below = side // patch_size * patch_size
    if side == below and side:
        return str(side)
    above = below + patch_size
    return f"({below} or {above})" if below else str(above)

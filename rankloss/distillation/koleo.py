"""KoLeo: spread samples evenly over the sphere."""

import torch
from torch import Tensor, nn

from rankloss.distillation.pairs import full_precision
from rankloss.distributed import gather_with_gradient, rank_and_world_size
from rankloss.kernels.launch import outside_autocast
from rankloss.kernels.reference import row_norms


class KoLeoLoss(nn.Module):
    """KoLeo: pushes every sample away from its nearest neighbours on the sphere.

        L = -mean_i mean over the k nearest n of  ln(|x_i - x_n + eps| + eps),   rows normalised

    Source: Sablayrolles et al. 2019, in DINOv3's form (eps 1e-8, neighbours by dot product, the
    sample itself excluded, also where DINOv3's code lets it tie with an opposite one). Neighbours
    and samples both receive gradient.

    Args:
        top_k: neighbours of each sample.
        group_size: split the batch into groups of that many samples (DINOv3 uses 16) and look for
            neighbours within them; None: the whole batch.
        distributed: look among the samples of all processes, gathered with gradient.

    Raises:
        ValueError: an option is not positive, or both group_size and distributed are given.
    """

    EPS = 1e-8

    def __init__(
        self, top_k: int = 1, group_size: int | None = None, distributed: bool = False
    ) -> None:
        super().__init__()
        if top_k < 1 or (group_size is not None and group_size < 1):
            raise ValueError(
                f"KoLeoLoss: top_k and group_size must be positive, got {top_k}, {group_size}"
            )
        if distributed and group_size is not None:
            raise ValueError("KoLeoLoss: groups are within a process; leave distributed=False")
        self.top_k, self.group_size, self.distributed = top_k, group_size, distributed

    def forward(self, x: Tensor) -> Tensor:
        """Loss of (B, D), a scalar; 0 when B is 0.

        Raises:
            ValueError: x is not (B, D), or B is not a multiple of group_size.
            TypeError: x is not floating point.
        """
        if x.dim() != 2:
            raise ValueError(f"KoLeoLoss: x must be (B, D), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"KoLeoLoss: x must be floating point, got {x.dtype}")
        if self.group_size is not None and len(x) % self.group_size:
            raise ValueError(
                f"KoLeoLoss: {len(x)} samples are no multiple of group_size={self.group_size}"
            )
        with outside_autocast(x):
            x = full_precision(x)
            x = x / row_norms(x, self.EPS)
            world = rank_and_world_size()
            distributed = self.distributed and world.world_size > 1
            among = gather_with_gradient(x, world) if distributed else x
            if len(x) == 0:
                return x.sum()
            if distributed:
                return self._spread(x, among, world.rank * len(x))
            groups = (
                x[None]
                if self.group_size is None
                else x.view(len(x) // self.group_size, self.group_size, x.shape[1])
            )
            return torch.stack([self._spread(part, part, 0) for part in groups]).mean()

    def _spread(self, x: Tensor, among: Tensor, start: int) -> Tensor:
        """Of samples x, which are rows start, start + 1, ... of `among`."""
        with torch.no_grad():
            dots = x @ among.T
            own = torch.arange(len(x), device=x.device)
            dots[own, start + own] = -torch.inf
            k = min(self.top_k, max(len(among) - 1, 1))  # a sample alone is its own neighbour
            nearest = dots.topk(k, dim=1).indices  # (B, k)
        apart = (x[:, None, :] - among[nearest] + self.EPS).norm(dim=2)
        spread: Tensor = -(apart + self.EPS).log().mean()
        return spread

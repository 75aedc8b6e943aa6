"""KoLeo: spread samples evenly over the sphere."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankloss.distillation.pairs import exact_products, full_precision
from rankloss.distributed import (
    HoldsProcessGroup,
    Processes,
    gather_with_gradient,
    rank_and_world_size,
)
from rankloss.kernels.launch import outside_autocast
from rankloss.kernels.reference import row_norms


class KoLeoLoss(HoldsProcessGroup, nn.Module):
    """KoLeo: push every sample away from its nearest neighbours on the sphere.

        L = -mean_i mean over the k nearest n of  ln(|x_i - x_n + eps| + eps),   rows normalised

    Source: Sablayrolles et al. 2019, in DINOv3's form (eps 1e-8, neighbours by dot product, the
    sample itself excluded, also where DINOv3's code lets it tie with an opposite one). Neighbours
    and samples both receive gradient. Dot products are computed in float64, differences in
    float32 (float64 if given so).

    A pair at distance d pulls with a force of 1/(B d): near a collapse gradients are large, 1e6/B
    for samples 1e-6 apart, and exactly coinciding ones get next to none. Clip the gradient norm,
    and start from features that differ.

    Args:
        top_k: neighbours of each sample.
        group_size: split the batch into groups of that many samples (DINOv3 uses 16) and look for
            neighbours within them; None: the whole batch.
        distributed: look among the samples of all processes, gathered with gradient: under DDP's
            averaging the gradient is the global batch's.
        process_group: processes to look among with distributed=True, for example
            `mesh.get_group("dp")`; None: all.

    Raises:
        ValueError: an option is not positive, both group_size and distributed are given, or a
            process_group without distributed.

    Example:
        >>> near, far = torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.eye(2)
        >>> bool(KoLeoLoss()(near) > KoLeoLoss()(far))
        True
    """

    EPS = 1e-8

    def __init__(
        self,
        top_k: int = 1,
        group_size: int | None = None,
        distributed: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if top_k < 1 or (group_size is not None and group_size < 1):
            raise ValueError(
                f"KoLeoLoss: top_k and group_size must be positive, got {top_k}, {group_size}"
            )
        if distributed and group_size is not None:
            raise ValueError("KoLeoLoss: groups are within a process; leave distributed=False")
        if process_group is not None and not distributed:
            raise ValueError("KoLeoLoss: process_group has no effect without distributed=True")
        self.top_k, self.group_size, self.distributed = top_k, group_size, distributed
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        """Compute the loss of this process's samples, a float32 scalar (float64 if given so).

        Args:
            x: (B, D) floating; B = 0 gives 0.

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
        processes = Processes(0, 1)
        if self.distributed:
            processes = rank_and_world_size(process_group=self.process_group)
        with outside_autocast(x):
            x = full_precision(x)
            x = x / row_norms(x, self.EPS)
            among = gather_with_gradient(x, processes)
            if len(x) == 0:
                return x.sum()
            if processes.world_size > 1:
                return self._spread(x, among, processes.rank * len(x))
            groups = torch.split(x, self.group_size or len(x))
            return torch.stack([self._spread(part, part, 0) for part in groups]).mean()

    def _spread(self, x: Tensor, among: Tensor, start: int) -> Tensor:
        """Compute the loss of samples x, which are rows start, start + 1, ... of `among`."""
        with torch.no_grad():
            dots = exact_products(x) @ exact_products(among).T
            own = torch.arange(len(x), device=x.device)
            dots[own, start + own] = -torch.inf
            k = min(self.top_k, max(len(among) - 1, 1))  # a sample alone is its own neighbour
            nearest = dots.topk(k, dim=1).indices  # (B, k)
        apart = (x[:, None, :] - among[nearest] + self.EPS).norm(dim=2)
        spread: Tensor = -(apart + self.EPS).log().mean()
        return spread

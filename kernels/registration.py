"""What the registration of every op needs."""

from typing import Any

import torch


def loop_over_batch(op: Any) -> None:
    """Register vmap's fallback: one call for each entry of the mapped dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        results = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    op.register_vmap(rule)

"""Features to feed the losses, and the whole loss spelled out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rankloss import ClipLoss, HighOrderPLLoss, RankCLIPLoss, Transitions
from tests.helpers.problems import Problem
from tests.properties import spelled_out


def features(
    n: int, d: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True
) -> tuple[Tensor, Tensor]:
    """Unit-norm image and text features, correlated so that matches are likely but not sure."""
    g = torch.Generator().manual_seed(seed)
    image, noise = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    pair = (image, image + noise)
    v, t = (functional.normalize(x, dim=1).to(dtype).requires_grad_(grad) for x in pair)
    return v, t


def randomize(loss: HighOrderPLLoss, seed: int = 0) -> HighOrderPLLoss:
    """Give the transition heads keys that matter; they start at zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return loss


LOSSES: dict[str, Callable[[], HighOrderPLLoss]] = {
    "clip": ClipLoss,
    "rankclip": RankCLIPLoss,
    "order 3": lambda: randomize(HighOrderPLLoss(8, 3, transition_dim=4)),
    "order 2, top 3, self out": lambda: randomize(
        HighOrderPLLoss(8, 2, transition_dim=4, top_k=3, exclude_self=True, discount="log")
    ),
}
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())


def loss_spelled_out(
    loss: HighOrderPLLoss,
    image: Tensor,
    text: Tensor,
    scale: float,
    bias: float = 0.0,
    image_ids: list[int] | None = None,
    text_ids: list[int] | None = None,
) -> tuple[float, float]:
    """(contrastive, ranking) by the definition, anchor by anchor, in float64."""
    n = len(image)
    v, t = image.detach().double(), text.detach().double()
    s_it, s_ii, s_tt = scale * v @ t.T, scale * v @ v.T, scale * t @ t.T
    same_image, same_text = (
        torch.eye(n, dtype=torch.bool) if ids is None else equal(ids)
        for ids in (image_ids, text_ids)
    )
    matches = same_image | same_text
    contrastive = 0.0
    for scores in (s_it, s_it.T):
        for i in range(n):
            negatives = [float(scores[i, j] + bias) for j in range(n) if not matches[i, j]]
            positives = [float(scores[i, j] + bias) for j in range(n) if matches[i, j]]
            for x in positives:
                row = torch.tensor([x, *negatives], dtype=torch.float64)
                contrastive += float(row.logsumexp(0) - x) / len(positives) / n / 2

    if loss.order == 0:
        return loss.contrastive_weight * contrastive, 0.0
    image_tables, text_tables = tables_of(loss, v, t)
    own = torch.eye(n, dtype=torch.bool)
    cross = own | ~matches
    in_image, in_text = (own | ~same for same in (same_image, same_text))
    if loss.exclude_self:
        in_image, in_text = in_image & ~own, in_text & ~own
    lists = (
        (s_it, s_it.T, cross, text_tables, loss.cross_modal_weight),
        (s_it.T, s_it, cross, image_tables, loss.cross_modal_weight),
        (s_ii, s_tt, in_image, image_tables, loss.in_modal_weight),
        (s_tt, s_ii, in_text, text_tables, loss.in_modal_weight),
    )
    ranking = 0.0
    for scores, target, mask, transitions, weight in lists:
        rows = []
        for i in range(n):
            kept = [j for j in range(n) if mask[i, j]]
            best_first = sorted(kept, key=lambda j: -float(target[i, j]))[: loss.top_k]
            if not best_first:
                continue
            row = torch.tensor(best_first)[None]
            p = Problem(scores[i : i + 1], row, transitions, mask[i : i + 1], loss.discount, 0.0)
            rows.append(float(spelled_out(p)))
        ranking += weight / 2 * sum(rows) / n
    return loss.contrastive_weight * contrastive, ranking


def equal(ids: list[int]) -> Tensor:
    return torch.tensor([[a == b for b in ids] for a in ids])


def tables_of(
    loss: HighOrderPLLoss, image: Tensor, text: Tensor
) -> tuple[Transitions | None, Transitions | None]:
    """P_mj = rms_norm(H A_mj), C_m = H B_m / sqrt(r): of image and of text candidates."""
    parameters = [x.detach().double() for x in loss.parameters()]
    if not parameters:
        return None, None
    tables = []
    for h, (a, b) in ((image, parameters[:2]), (text, parameters[-2:])):
        keys = torch.stack([h @ x / x.shape[1] ** 0.5 for x in b])
        rows = torch.stack([h @ x for x in a])
        rows = rows / (rows.square().mean(2, keepdim=True) + torch.finfo(rows.dtype).eps).sqrt()
        tables.append(Transitions(rows, keys))
    return tables[0], tables[1]

"""SigLIP's sigmoid loss with ranking terms beside it."""

from typing import Any

from torch import Tensor

from rankloss.contrastive import SigLipLoss
from rankloss.global_batch import GatherOptions, Inputs
from rankloss.pair_loss import PairLoss
from rankloss.ranking import HighOrderPLLoss


class SigLipRankingLoss(PairLoss):
    """SigLIP's loss plus order-R ranking consistency.

        L = L_SigLIP + lambda_cross L_cross + lambda_in L_in

    The ranking terms are those of `HighOrderPLLoss`; the logit bias enters the sigmoid only, no
    ranking depends on it. Source: this project's choice.

    Args:
        embed_dim, order: as in `HighOrderPLLoss`; order >= 1.
        **options: any other argument of `HighOrderPLLoss` but contrastive_weight.

    Raises:
        ValueError: order < 1, or what `HighOrderPLLoss` raises.

    >>> import torch
    >>> loss = SigLipRankingLoss(embed_dim=8, order=2)
    >>> image, text = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=2)
    >>> sorted(loss(image, text, 10.0, -10.0, output_dict=True))
    ['contrastive_loss', 'ranking_loss']
    """

    def __init__(self, embed_dim: int | None = None, order: int = 3, **options: Any) -> None:
        if order < 1:
            raise ValueError(f"SigLipRankingLoss: order {order} ranks nothing; use SigLipLoss")
        gather = {key: options[key] for key in GatherOptions.__annotations__ if key in options}
        super().__init__(**gather)
        self.contrastive = SigLipLoss(impl=options.get("impl", "auto"), **gather)
        self.ranking = HighOrderPLLoss(embed_dim, order, contrastive_weight=0.0, **options)

    def terms(self, images: Tensor, texts: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Compute "contrastive_loss", the sigmoid's, and "ranking_loss"."""
        ranking = self.ranking.total(images, texts, inputs)  # whose contrastive weight is 0
        return {**self.contrastive.terms(images, texts, inputs), "ranking_loss": ranking}

    @property
    def _feature_width(self) -> int | None:
        return self.ranking._feature_width

    def set_progress(self, progress: float) -> None:
        """Set RankCLIP's ramp of the ranking terms, see `HighOrderPLLoss.set_progress`."""
        self.ranking.set_progress(progress)

    @property
    def last_stats(self) -> dict[str, Tensor]:
        """Statistics of the last forward, see `HighOrderPLLoss.last_stats`."""
        return self.ranking.last_stats

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that a weight decay should leave alone."""
        return {name for name, _ in self.named_parameters()}

"""SigLIP's sigmoid loss with ranking terms beside it."""

from typing import Any

from torch import Tensor, nn

from rankloss.contrastive import SigLipLoss
from rankloss.global_batch import GatherOptions
from rankloss.ranking import HighOrderPLLoss


class SigLipRankingLoss(nn.Module):
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
        super().__init__()
        if order < 1:
            raise ValueError(f"SigLipRankingLoss: order {order} ranks nothing; use SigLipLoss")
        gather = {key: options[key] for key in GatherOptions.__annotations__ if key in options}
        self.contrastive = SigLipLoss(**gather)
        self.ranking = HighOrderPLLoss(embed_dim, order, contrastive_weight=0.0, **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        output_dict: bool = False,
        **options: Any,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of this process's pairs, or its two terms.

        Args:
            image_features, text_features: (n, D) unit-norm, any floating dtype.
            logit_scale, logit_bias: 0-D or (1,), or floats; SigLIP starts from 10 and -10.
            output_dict: return {"contrastive_loss", "ranking_loss"}, whose sum is the loss.
            **options: `PairLoss.forward`'s other arguments, for both terms.
        """
        sigmoid = self.contrastive(
            image_features, text_features, logit_scale, logit_bias, **options
        )
        terms = self.ranking(
            image_features, text_features, logit_scale, output_dict=True, **options
        )
        if output_dict:
            return {"contrastive_loss": sigmoid, "ranking_loss": terms["ranking_loss"]}
        total: Tensor = sigmoid + terms["ranking_loss"]
        return total

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

"""The common way in which losses of images and texts are called."""

import functools
import operator
from collections.abc import Mapping

from torch import Tensor

from rankloss.checks import check_further
from rankloss.global_batch import GlobalBatchLoss, Inputs


class PairLoss(GlobalBatchLoss):
    """A loss over the global batch of image and text features, and perhaps of further kinds.

    A member says in `terms` what it computes, and in `further` which other features it is given;
    how it is called is the same for all.

    Args:
        local_loss, gather_with_grad, accum_freq, process_group, rank, world_size: see
            `rankloss.global_batch.GlobalBatchLoss`.

    >>> import torch
    >>> class Distance(PairLoss):
    ...     def terms(self, images, texts, inputs):
    ...         return {"distance_loss": (images - texts).square().sum()}
    >>> features = torch.eye(3)
    >>> Distance()(features, -features, 10.0, output_dict=True)
    {'distance_loss': tensor(12.)}
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        local: bool = False,
        output_dict: bool = False,
        **further: Tensor | None,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss of this process's pairs.

        Args:
            image_features, text_features: (n, D) unit-norm, any floating dtype; row i of one
                matches row i of the other. Scores are computed in float32 even under autocast.
            logit_scale: exp'd scale, 0-D or (1,), or a float.
            logit_bias: added to the contrastive logits; ranking terms do not change with it.
            image_ids, text_ids: (n,) integers; equal ids mark the same image or caption, so that
                pairs that share either match each other; a negative id is unknown and matches
                nothing. The loss's own page says what follows for its terms.
            local: leave other processes out: the loss of these n pairs alone, without any message,
                e.g. for an evaluation on one process of many.
            output_dict: return the terms by name, already weighted, whose sum is the loss.
            **further: features of the other kinds that the loss's own page names, if it does.

        Raises:
            TypeError: features are not floating, ids not integer, or further features missing or
                not the loss's.
            ValueError: shapes or devices do not fit, processes hold different numbers of pairs,
                widths, dtypes or kinds of ids (on every process), or rank/world_size contradict
                the process group.
        """
        inputs = self.prepare(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            image_ids,
            text_ids,
            local=local,
            embed_dim=self._feature_width,
            further=functools.partial(self.further, image_features, further),
        )
        compute = self.terms if output_dict else self.total
        return compute(image_features, text_features, inputs)

    def further(self, images: Tensor, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Check features of further kinds, and return those that are given, by name.

        Args:
            images: (n, D), checked.
            given: as in `forward`; a member that compares them says what they must be.

        Raises:
            TypeError: there are any, for a loss of images and texts alone.
        """
        return check_further(type(self).__name__, images, given)

    def terms(self, images: Tensor, texts: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss, by name; a member's own part of `forward`.

        Args:
            images, texts: (n, D), checked.
            inputs: all else that was given, checked, and agreed on with the other processes.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its terms are")

    def total(self, images: Tensor, texts: Tensor, inputs: Inputs) -> Tensor:
        """Compute the sum of the terms; a member may have a shorter way."""
        return functools.reduce(operator.add, self.terms(images, texts, inputs).values())

    @property
    def _feature_width(self) -> int | None:
        """Width that features must have, where the loss has parameters of that width."""
        return None

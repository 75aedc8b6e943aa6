"""Hugging Face CLIP and SigLIP models that train on a ranking loss of the global batch.

    model = CLIPRankingModel.from_pretrained("openai/clip-vit-base-patch32", rank_loss={"order": 3})
    Trainer(model, args, train_dataset=...).train()

The loss is computed inside `forward`, as Trainer and DistributedDataParallel expect: its parameters
are the model's, gradient accumulation divides it as usual, and nothing is left to the collator.
`Trainer(compute_loss_func=...)` cannot do this: its function does not receive the logit scale, has
nowhere to keep parameters that are synchronised and saved, and what it returns is not divided by
the accumulation steps.
"""

from typing import Any

from torch import Tensor, nn
from transformers import CLIPModel, SiglipModel

from rankloss.ranking import HighOrderPLLoss
from rankloss.siglip_ranking import SigLipRankingLoss


class _RankingMixin:
    """Common base of the models below; stands before the class of transformers that it changes."""

    accepts_loss_kwargs = False  # a batch is divided by accumulation steps, not by label counts
    rank_loss: nn.Module
    logit_scale: Any
    training: bool

    def _init_weights(self, module: nn.Module) -> None:
        """transformers calls this for modules whose weights a checkpoint lacks."""
        if isinstance(module, HighOrderPLLoss):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = True,
        interpolate_pos_encoding: bool = False,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the model's output with the ranking loss in it.

        Trainer keeps those columns of a dataset that are arguments here.

        Args:
            input_ids, pixel_values, attention_mask, position_ids, interpolate_pos_encoding,
                **kwargs: the inputs of the model of transformers.
            return_loss: compute the loss; row i of the texts must match row i of the images. In
                evaluation mode, batches of unlike numbers of images and texts have none.
            image_ids, text_ids: (n,) integers that mark repeated items, see `HighOrderPLLoss`.
            return_dict: False returns a tuple.

        Returns:
            `CLIPOutput` or `SiglipOutput`. In training the loss is that of the batch of all
            processes; in evaluation mode that of the own batch, so that one process of several can
            evaluate alone.
        """
        output = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_loss=False,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )
        pair = output.image_embeds, output.text_embeds
        if return_loss and (self.training or len(pair[0]) == len(pair[1])):
            bias = getattr(self, "logit_bias", None)
            ids = {"image_ids": image_ids, "text_ids": text_ids}
            output["loss"] = self.rank_loss(
                *pair, self.logit_scale.exp(), bias, **ids, local=not self.training
            )
        return output if return_dict or return_dict is None else output.to_tuple()


class CLIPRankingModel(_RankingMixin, CLIPModel):
    """`transformers.CLIPModel` whose loss is `HighOrderPLLoss`.

    `from_pretrained` takes checkpoints of a plain CLIPModel and of its own; what `save_pretrained`
    writes can also be loaded as a plain CLIPModel.

    Args:
        config: a `CLIPConfig`.
        rank_loss: arguments of `HighOrderPLLoss` other than embed_dim, kept in the config; None
            takes those in the config, or the defaults.

    >>> from transformers import CLIPConfig
    >>> tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    >>> tower |= dict(num_attention_heads=2, image_size=32, patch_size=16)
    >>> config = CLIPConfig(text_config=tower, vision_config=tower, projection_dim=8)
    >>> model = CLIPRankingModel(config, rank_loss={"order": 2})
    >>> ids, pixels = torch.arange(8).view(4, 2), torch.randn(4, 3, 32, 32)
    >>> model(input_ids=ids, pixel_values=pixels).loss.shape
    torch.Size([])
    """

    def __init__(self, config: Any, rank_loss: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        config.rank_loss = rank_loss if rank_loss is not None else _options(config)
        self.rank_loss = HighOrderPLLoss(config.projection_dim, **config.rank_loss)


class SiglipRankingModel(_RankingMixin, SiglipModel):
    """`transformers.SiglipModel` whose loss is `SigLipRankingLoss`, SigLIP's with ranking terms.

    Args:
        config: a `SiglipConfig`.
        rank_loss: arguments of `SigLipRankingLoss` other than embed_dim, as in `CLIPRankingModel`.
    """

    def __init__(self, config: Any, rank_loss: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        config.rank_loss = rank_loss if rank_loss is not None else _options(config)
        self.rank_loss = SigLipRankingLoss(config.text_config.projection_size, **config.rank_loss)


def _options(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rank_loss", None) or {})

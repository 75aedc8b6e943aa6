"""A Hugging Face CLIPModel that computes a ranking loss in its own forward pass.

    python -m examples.inside_transformers

`Trainer` minimises the loss that a model returns, and its `compute_loss_func` sees the outputs of
one process only: it can neither compare with the other processes' samples nor own parameters. So
the loss belongs inside the model. This subclass is the whole change; `Trainer`, Accelerate, DDP,
`save_pretrained` and `from_pretrained` work as always, and a plain CLIP checkpoint is a start.
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from examples.toy import CONTEXT, END, PIXELS, START, VOCABULARY, batches, recall
from rankloss import HighOrderPLLoss


class RankedCLIPModel(CLIPModel):
    """CLIPModel with an order-3 ranking loss instead of its contrastive one."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.rank_loss = HighOrderPLLoss(embed_dim=config.projection_dim, order=3)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        **options: Any,
    ) -> Any:  # a CLIPOutput
        # return_loss=False: CLIPModel's own loss would build all logits only to be thrown away
        outputs: Any = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            return_loss=False,
            **options,
        )
        if return_loss:
            # Trainer drops the logits anyway; embeddings may come in half precision, so they are
            # brought back to unit length
            outputs["loss"] = self.rank_loss(
                normalize(outputs.image_embeds.float(), dim=1),
                normalize(outputs.text_embeds.float(), dim=1),
                self.logit_scale.exp(),
            )
        return outputs


def tiny_config() -> CLIPConfig:
    """For this page; RankedCLIPModel.from_pretrained("openai/clip-vit-base-patch32") is a start."""
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1}
    layers |= {"num_hidden_layers": 1, "projection_dim": 64}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    tokens = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
    vision = {"image_size": PIXELS, "patch_size": 8}
    return CLIPConfig(
        text_config={**layers, **text, **tokens},
        vision_config={**layers, **vision},
        projection_dim=64,
    )


def main(steps: int = 60) -> tuple[float, float]:
    """Train, and return R@1 of the trained model and of the one saved and loaded again."""
    torch.manual_seed(0)
    model = RankedCLIPModel(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (images, texts) in enumerate(batches(steps)):
        loss = model(input_ids=texts, pixel_values=images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # with the loss's heads, so that training can go on
        again = RankedCLIPModel.from_pretrained(folder)
    before, after = recall(model, encode), recall(again, encode)
    print(f"R@1 among 216 pictures: {before:.0%}; saved and loaded again: {after:.0%}")
    return before, after


def encode(model: RankedCLIPModel, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    outputs = model(input_ids=texts, pixel_values=images, return_loss=False)
    return outputs.image_embeds, outputs.text_embeds


if __name__ == "__main__":
    main()

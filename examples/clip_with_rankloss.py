"""Train a CLIP of your own with a ranking loss: the smallest whole example.

    python -m examples.clip_with_rankloss            # order 3; seconds on a laptop
    python -m examples.clip_with_rankloss --order 0  # CLIP; 1 is RankCLIP

CLIP asks each image to prefer its own caption to all others. A ranking loss asks for more: the
*order* in which an image ranks all captions should be the order in which its caption ranks all
images. Order 1 scores the candidates of a ranking one by one; from order 2 on, the score of a
candidate also depends on those ranked just before it, through small trained heads.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from examples.toy import PIXELS, VOCABULARY, all_pairs, batches, log, recall_at_1
from rankloss import HighOrderPLLoss, attach

WIDTH = 64  # of the embeddings


class TwoTowers(nn.Module):
    """An image tower, a text tower, and the temperature: all that CLIP is."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * PIXELS**2, 128), nn.GELU(), nn.Linear(128, WIDTH)
        )
        self.text = nn.Sequential(
            nn.EmbeddingBag(VOCABULARY, 128), nn.GELU(), nn.Linear(128, WIDTH)
        )
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # what every loss of this library takes: unit-norm features (N, D), and the scale itself,
        # not its logarithm
        image_features = normalize(self.image(images), dim=1)
        text_features = normalize(self.text(texts), dim=1)
        return image_features, text_features, self.log_scale.exp()


def main(order: int = 3, steps: int = 100) -> float:
    """Train, and return the share of images that find their caption among 216."""
    torch.manual_seed(0)
    model = TwoTowers()

    # From order 2 on the loss has parameters. As a part of the model they are in
    # model.parameters() and in its state_dict: optimised, saved, and synchronised by DDP.
    # Do this before the optimizer (and DDP) see the model.
    loss_fn = attach(model, HighOrderPLLoss(embed_dim=WIDTH, order=order))

    # Weight decay is for the towers; the loss says which of its parameters want none.
    spared = {f"rank_loss.{name}" for name in loss_fn.no_weight_decay()}
    groups: list[dict[str, object]] = [
        {"params": [p for name, p in model.named_parameters() if name not in spared]},
        {"params": [p for name, p in model.named_parameters() if name in spared]},
    ]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.05)

    for step, (images, texts) in enumerate(batches(steps)):
        # output_dict gives the terms for a log; without it the call returns their sum
        terms = loss_fn(*model(images, texts), output_dict=True)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log(step, terms)

    model.eval()
    with torch.no_grad():
        image_features, text_features, _ = model(*all_pairs())
    recall = recall_at_1(image_features, text_features)
    print(f"order {order}: {recall:.0%} of 216 new images find their caption")
    return recall


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    main(**vars(parser.parse_args()))

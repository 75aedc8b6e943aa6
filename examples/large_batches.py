"""A batch of 128 in the memory of 32: exact gradients by caching features.

    python -m examples.large_batches

Ordinary gradient accumulation averages the gradients of small batches. For a loss that compares
every sample with every other that is another loss: each image then meets 31 captions, not 127.
`GradCache` encodes all parts without gradient, asks the loss for the gradient of every feature, and
encodes each part once more to pass that on. It costs a second forward pass, and is exact.
"""

from typing import Any

import torch
from torch import Tensor, nn

from examples.clip_with_rankloss import WIDTH, TwoTowers
from examples.toy import all_pairs, batches, recall_at_1
from rankloss import GradCache, HighOrderPLLoss, attach

PARTS, PART = 4, 32
Pairs = tuple[Tensor, Tensor]


class NamedTowers(nn.Module):
    """A part in, named outputs out: whatever a model returns, GradCache wants it by name."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = TwoTowers()

    def forward(self, part: Pairs) -> dict[str, Tensor]:
        images, texts, scale = self.towers(*part)
        return {"image_features": images, "text_features": texts, "logit_scale": scale}


def main(steps: int = 15) -> dict[str, float]:
    """Train; return R@1, and how far two ways of accumulating are from the large batch's step."""
    torch.manual_seed(0)
    model = NamedTowers()
    loss_fn = attach(model, HighOrderPLLoss(embed_dim=WIDTH, order=3))
    parts = list(batches(PARTS, PART))
    whole = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    # Three gradients of the same 128 pairs.
    exact = gradient(model, lambda: loss_fn(**model(whole)).backward())
    cached = gradient(model, lambda: GradCache(model, loss_fn)(parts))
    averaged = gradient(
        model, lambda: [(loss_fn(**model(part)) / PARTS).backward() for part in parts]
    )
    found = {
        "cached": float((cached - exact).norm() / exact.norm()),
        "averaged": float((averaged - exact).norm() / exact.norm()),
    }
    print("distance from the gradient of the whole batch, over its length:")
    print(f"  features cached  {found['cached']:.1e}")
    print(f"  parts averaged   {found['averaged']:.1e}")

    # Training is as always; only the backward pass is called differently.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step_of_parts = GradCache(model, loss_fn)
    stream = batches(steps * PARTS, PART, seed=2)
    for step in range(steps):
        optimizer.zero_grad()
        loss = step_of_parts([next(stream) for _ in range(PARTS)])  # leaves gradients in .grad
        optimizer.step()
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss:.3f}")
    with torch.no_grad():
        outputs = model(all_pairs())
    found["recall"] = recall_at_1(outputs["image_features"], outputs["text_features"])
    print(f"{found['recall']:.0%} of 216 new images find their caption")
    return found


def gradient(model: nn.Module, backward: Any) -> Tensor:
    """All gradients that `backward` leaves, as one vector."""
    model.zero_grad()
    backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()

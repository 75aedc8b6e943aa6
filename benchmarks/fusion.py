"""Cost of the fusion block against the trunk it sits on: parameters, FLOPs, milliseconds.

The trunk is open_clip's ViT-B/16 image tower at 224 pixels; the block is the study's full variant
on the 256-wide tokens of its 14 x 14 patches, without a partner, as at inference.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Spread, paired_ratios, processor_clock, spread
from benchmarks.report import milliseconds, table
from rankloss.fusion import MultiScaleFusion

EMBED_DIM, FEATURE_DIM, TOKENS, PIXELS = 512, 256, 196, 224


@dataclass(frozen=True)
class Cost:
    parameters: int
    flops: int  # of one image
    times: list[float]  # milliseconds of a batch


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks fusion", description=__doc__)
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each side, in turn")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    block, trunk = measure(options.batch, options.rounds)
    print(markdown(block, trunk))
    print(f"\nA batch of {options.batch}, {torch.get_num_threads()} threads, {torch.__version__}.")
    return 0


@torch.no_grad()
def measure(batch: int, rounds: int) -> tuple[Cost, Cost]:
    """Costs of the block and of the trunk."""
    block, trunk = MultiScaleFusion(EMBED_DIM, FEATURE_DIM).eval(), image_trunk()
    images = torch.randn(batch, 3, PIXELS, PIXELS)
    z = normalize(torch.randn(batch, EMBED_DIM), dim=1)
    tokens = torch.randn(batch, TOKENS, FEATURE_DIM)
    calls: list[Callable[[], Tensor]] = [lambda: block(z, tokens).embedding, lambda: trunk(images)]
    counted = [flops(call) // batch for call in calls]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for call, samples in zip(calls, times, strict=True):
            samples.append(1e3 * processor_clock(call, 1).wall)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (block, trunk)]
    costs = [Cost(*each) for each in zip(sizes, counted, times, strict=True)]
    return costs[0], costs[1]


def image_trunk() -> nn.Module:
    import open_clip

    vision = {"image_size": PIXELS, "layers": 12, "width": 768, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}
    visual: nn.Module = open_clip.CLIP(EMBED_DIM, vision_cfg=vision, text_cfg=text).visual
    return visual.eval()


def flops(call: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def markdown(block: Cost, trunk: Cost) -> str:
    ratio: Spread = spread(paired_ratios(block.times, trunk.times))
    share = f"{ratio.median:.2%} [{ratio.low:.2%}-{ratio.high:.2%}]"
    sizes, work = (block.parameters, trunk.parameters), (block.flops, trunk.flops)
    times = [milliseconds(spread(cost.times)) for cost in (block, trunk)]
    rows = [
        ["parameters", *(f"{x:,}" for x in sizes), f"{sizes[0] / sizes[1]:.2%}"],
        ["FLOPs of an image", *(f"{x:.3g}" for x in work), f"{work[0] / work[1]:.2%}"],
        ["ms of a batch", *times, share],
    ]
    return table(("", "fusion block", "ViT-B/16", "share"), rows)

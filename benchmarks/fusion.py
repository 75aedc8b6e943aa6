"""Cost of the fusion block against the trunk it sits on: parameters, FLOPs, milliseconds.

The trunk is open_clip's ViT-B/16 image tower at 224 pixels; the block is the study's full variant
on the 256-wide tokens of its 14 x 14 patches, without a partner, as at inference.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import paired_ratios, processor_clock, spread
from benchmarks.output import write_whole
from benchmarks.report import milliseconds
from rankloss.fusion import MultiScaleFusion

EMBED_DIM, FEATURE_DIM, TOKENS, PIXELS = 512, 256, 196, 224


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    torch.manual_seed(0)
    result = measure(options.batch, options.rounds)
    print(markdown(result))
    if options.json:
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    if options.markdown:
        write_whole(options.markdown, markdown(result) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks fusion", description=__doc__)
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each side, in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    return parser


@torch.no_grad()
def measure(batch: int, rounds: int) -> dict[str, Any]:
    trunk, block = image_trunk(), MultiScaleFusion(EMBED_DIM, FEATURE_DIM).eval()
    images = torch.randn(batch, 3, PIXELS, PIXELS)
    z = normalize(torch.randn(batch, EMBED_DIM), dim=1)
    tokens = torch.randn(batch, TOKENS, FEATURE_DIM)

    def run_trunk() -> Tensor:
        out: Tensor = trunk(images)
        return out

    def run_block() -> Tensor:
        out: Tensor = block(z, tokens).embedding
        return out

    sides = {"trunk": (trunk, run_trunk), "block": (block, run_block)}
    for _, call in sides.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (_, call) in sides.items():
            times[name].append(processor_clock(call, 1).wall)
    ratio = spread(paired_ratios(times["block"], times["trunk"]))
    return {
        "batch": batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "time_ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
        **{
            name: {
                "parameters": sum(p.numel() for p in module.parameters()),
                "flops_per_image": flops(call) // batch,
                "milliseconds": milliseconds(spread(times[name])),
            }
            for name, (module, call) in sides.items()
        },
    }


def image_trunk() -> nn.Module:
    import open_clip

    vision = {"image_size": PIXELS, "layers": 12, "width": 768, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}
    visual: nn.Module = open_clip.CLIP(EMBED_DIM, vision_cfg=vision, text_cfg=text).visual
    return visual.eval()


def flops(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def markdown(result: dict[str, Any]) -> str:
    block, trunk = result["block"], result["trunk"]
    ratio = result["time_ratio"]
    shares = [f"{block[key] / trunk[key]:.2%}" for key in ("parameters", "flops_per_image")]
    return "\n".join(
        [
            "| | fusion block | ViT-B/16 | share |",
            "|---|---:|---:|---:|",
            f"| parameters | {block['parameters']:,} | {trunk['parameters']:,} | {shares[0]} |",
            f"| FLOPs an image | {block['flops_per_image']:.3g} | {trunk['flops_per_image']:.3g} "
            f"| {shares[1]} |",
            f"| ms, batch of {result['batch']} | {block['milliseconds']} | "
            f"{trunk['milliseconds']} | {ratio['median']:.2%} "
            f"[{ratio['low']:.2%}-{ratio['high']:.2%}] |",
        ]
    )

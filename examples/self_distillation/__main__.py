"""Train a small DINOv3 on generated scenes, without labels and without a download.

    python -m examples.self_distillation                 # about 15 minutes on one core
    python -m examples.self_distillation --steps 40      # seconds; shows that everything runs

Writes <out>/teacher.safetensors (the moving-average teacher's backbone in float16, as
timm.create_model(..., checkpoint_path=) reads it) and <out>/teacher.json (the recipe). Kill it at
any moment: the same command goes on after the last checkpoint, to the same weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.common.files import UserError
from examples.common.signals import Interrupted, StopRequest
from examples.self_distillation.settings import Settings
from examples.self_distillation.train import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Settings()
    parser.add_argument("--out", type=Path, default=Path("runs/self_distillation"))
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps")
    parser.add_argument("--end", type=int, help="take so many steps of the schedule and no more")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--fresh", action="store_true", help="discard a run of other settings")
    options = parser.parse_args(arguments)
    stop = StopRequest()
    try:
        with stop.listening():
            path = train(
                Settings(steps=options.steps, seed=options.seed),
                options.out,
                stop,
                end=options.end,
                fresh=options.fresh,
            )
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\n{str(error) or 'interrupted'}; run the same command to go on from there")
        return 128 + (stop.signal_number or 2)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

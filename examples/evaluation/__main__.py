"""Measure image-text models, several side by side; results as JSON, a table and a picture.

    python -m examples.evaluation retrieval --model ours=local-dir:runs/x/export --pairs 'coco.tsv'
    python -m examples.evaluation gap --model CLIP=local-dir:a --model full=local-dir:b --pairs ...
    python -m examples.evaluation zero_shot --model ViT-B-32@laion2b_s34b_b79k \\
        imagenet-1k=data/imagenet/val imagenet-r=data/imagenet-r objectnet=data/objectnet-1.0
    python -m examples.evaluation probe --model ... pets=data/pets scenes=data/mine
    python -m examples.evaluation agreement --model ... --judgements flickr8k_expert.csv

--model is "[label=]name[@weights]" for open_clip; "local-dir:<folder>" is what
examples/cc3m/train.py exported. --pairs is a spec of webdataset shards (captions a line each in
"txt") or a CSV file (columns filepath and title). `probe` wants folders with `train` and `test`,
each with a folder of images for every class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.common.files import UserError
from examples.evaluation.commands import COMMANDS
from examples.evaluation.models import load_model
from examples.evaluation.report import Table, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit code."""
    options = _parse(arguments)
    title, measure = COMMANDS[options.command]
    try:
        columns: dict[str, dict[str, float]] = {}
        curves: dict[str, Any] = {}
        notes: list[str] = []
        for spec in options.model:
            model = load_model(spec, torch.device(options.device))
            result = measure(model, options)
            columns[model.label] = result.numbers
            curves |= {} if result.curve is None else {model.label: result.curve}
            notes += [note for note in result.notes if note not in notes]
        table = Table("models", columns, title, notes)
        told = {k: v if isinstance(v, int) else str(v) for k, v in vars(options).items()}
        paths = write_report(
            options.out, options.command, table, {"settings": told}, curves or None
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.text())
    print(", ".join(map(str, paths)))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (title, _) in COMMANDS.items():
        add = commands.add_parser(name, help=title).add_argument
        add("--model", action="append", required=True, metavar="[LABEL=]NAME[@W]")
        add("--out", type=Path, default=Path("runs/evaluation"))
        add("--batch-size", type=int, default=128)
        add("--workers", type=int, default=0, help="processes that decode images")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if name in ("retrieval", "gap"):
            add("--pairs", required=True, help="shards, or a CSV file with captions")
        elif name == "agreement":
            add("--judgements", type=Path, required=True, help="CSV with image, caption, score")
        else:
            add("data", nargs="+", metavar="NAME=PATH")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

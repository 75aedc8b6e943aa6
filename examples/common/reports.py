"""Parts that reports share: tables in Markdown, pictures, JSON, and versions of what made it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.common.files import write_atomically

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's, which colour-blind readers can tell apart."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned, readable as plain text too; the first column to the left, numbers to the right."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def save_figure(path: Path, figure: Any, **options: Any) -> None:
    """Write a matplotlib figure whole or not at all, in the format of the path's suffix."""
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda file: figure.savefig(file, format=kind, **options))


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of torch, Python and some installed packages."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def rounded(value: Any, digits: int) -> Any:
    """Return JSON-able data, its floats at so many significant digits; None if not finite."""
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each, digits) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def json_text(data: dict[str, Any], *by_line: str) -> str:
    """Return JSON with a line for each entry, and for each of the lists and dicts `by_line`."""
    parts = []
    for name, value in data.items():
        text = json.dumps(value, allow_nan=False)
        if name in by_line and isinstance(value, dict):
            entries = (json.dumps({key: each})[1:-1] for key, each in value.items())
            text = "{\n" + ",\n".join(entries) + "\n}"
        elif name in by_line:
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"

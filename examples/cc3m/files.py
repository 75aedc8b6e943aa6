"""Files that are either whole or absent, whatever interrupts the program."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # the suffix that `write` sees is not path's
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: object) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """An empty folder to fill; on success it takes `path`'s place, on failure it disappears."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    _flush(path.parent)


class UserError(ValueError):
    """Something only the user can put right; its message says how."""


class SettingsChanged(UserError):
    """A folder holds results of other settings."""


def claim_directory(path: Path, settings: dict[str, Any], *, fresh: bool = False) -> None:
    """Tie a run's folder to its settings, written there as settings.json.

    Args:
        path: folder of one run; made if missing.
        settings: all that determines the result, JSON-able.
        fresh: throw away what a run with other settings left.

    Raises:
        SettingsChanged: the folder belongs to other settings and `fresh` is False.
    """
    settings = json.loads(json.dumps(settings))
    marker = path / "settings.json"
    if marker.exists() and read_json(marker) != settings:
        if not fresh:
            changes = _differences(read_json(marker), settings)
            raise SettingsChanged(
                f"{path} holds a run with other settings ({changes}); choose another --out, or "
                "pass --fresh to start it over"
            )
        shutil.rmtree(path)
    if not marker.exists():
        write_json(marker, settings)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    a, b = _flatten(old), _flatten(new)
    changed = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    shown = [f"{name}: {a.get(name)} -> {b.get(name)}" for name in changed[:5]]
    return ", ".join(shown + (["..."] if len(changed) > 5 else []))


def _flatten(data: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(data, dict):
        return {prefix: data}
    pieces = [_flatten(value, f"{prefix}.{key}".lstrip(".")) for key, value in data.items()]
    return {name: value for piece in pieces for name, value in piece.items()}


def _flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

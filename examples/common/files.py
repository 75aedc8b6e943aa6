"""Files that are either whole or absent, whatever interrupts the program."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # the suffix that `write` sees is not path's
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it, which not all writers respect
        write(temporary)
        temporary.chmod(mode)
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


RUN_FILES = (
    "settings.json",
    "settings_changed.jsonl",
    "config.yaml",
    "results.jsonl",
    "curves.png",
    "train.log",
    "status",
    "checkpoints/step_*.safetensors",
    "checkpoints/skipped_*.jsonl",
    "export/*",
    "export_ema/*",
    "tensorboard/events.out.tfevents.*",
)
"""All that a training run writes into its folder, and all that --fresh may remove there."""


def claim_directory(
    path: Path,
    settings: dict[str, Any],
    *,
    fresh: bool = False,
    changeable: Sequence[str] = (),
    written: Sequence[str] = RUN_FILES,
) -> None:
    """Tie a run's folder to its settings, written there as settings.json.

    Args:
        path: folder of one run; made if missing.
        settings: all that determines the result, JSON-able.
        fresh: remove what a run with other settings wrote there; other files stay.
        changeable: names of settings ("train.learning_rate") that may differ; they are replaced,
            and settings_changed.jsonl gets a line.
        written: patterns of the files that a run writes.

    Raises:
        SettingsChanged: the folder belongs to other settings and `fresh` is False.
        UserError: the folder holds files of such names that no run has written, or cannot be
            written to.
    """
    settings = json.loads(json.dumps(settings))
    marker = path / "settings.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            if ours := _found(path, written):
                raise UserError(
                    f"{path} holds {ours[0].name}, which no run of this script wrote; choose "
                    "another --out"
                )
            write_json(marker, settings)
            return
        old = read_json(marker)
        changes = _differences(old, settings)
        if fresh and changes:
            for found in _found(path, written):
                found.unlink()
        elif changes.keys() - set(changeable):
            shown = [f"{k}: {a} -> {b}" for k, (a, b) in changes.items()][:5]
            told = ", ".join(shown + ["..."] * (len(changes) > 5))
            raise SettingsChanged(
                f"{path} holds a run with other settings ({told}); choose another --out, or "
                "pass --fresh to start it over"
            )
        elif changes:
            with (path / "settings_changed.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(changes) + "\n")
        if changes:
            write_json(marker, settings)
    except OSError as error:
        raise UserError(f"{path} cannot be written to ({error}); choose another --out") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other programs from a folder that one is writing to; the lock dies with its process.

    Raises:
        UserError: another process has it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"another process is writing to {path}; wait for it, or choose another --out"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be written to ({error}); choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def _found(path: Path, patterns: Sequence[str]) -> list[Path]:
    return [found for pattern in patterns for found in path.glob(pattern)]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[object, object]]:
    a, b = _flatten(old), _flatten(new)
    names = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    return {name: (a.get(name), b.get(name)) for name in names}


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

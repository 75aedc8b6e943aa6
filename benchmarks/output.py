"""Results on disk: whole or not at all."""

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(text)
    os.replace(draft, file)

"""Packages that only some users need, imported when they are first used."""

import importlib
from typing import Any

EXTRAS = {"transformers": "transformers", "open_clip": "open-clip"}
"""Extra of this project that installs a package; `distill` for all others."""


def require(module: str) -> Any:
    """Import an optional package, or a module of it.

    Args:
        module: dotted name, for example "safetensors.torch".

    Raises:
        ImportError: it is missing; says how to install it.

    Example:
        >>> require("json").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = EXTRAS.get(module.split(".")[0], "distill")
        raise ImportError(
            f"{module} cannot be imported ({error}); `pip install 'rankloss[{extra}]'` installs it"
        ) from error

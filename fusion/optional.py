"""Packages that only some users need, imported when they are first used."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def require(module: str) -> Any:
    """Import a package of the `distill` extra.

    Raises:
        ImportError: it is missing; says how to install it.
    """
    try:
        with _without_own_folders():
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}); `pip install 'rankloss[distill]'` installs "
            "what distillation needs"
        ) from error


@contextmanager
def _without_own_folders() -> Iterator[None]:
    """Hide this repository's folder `kernels` from packages that look for one of that name.

    transformers imports a package `kernels` if it finds one. With the root of a checkout on
    sys.path (`python -m pytest`, scripts run there) it would find ours, which refuses that name.
    """
    name = "kernels"
    if name in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(name)
    ours = Path(__file__).resolve().parents[1] / name / "__init__.py"
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != ours:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # "there is no such package"
    try:
        yield
    finally:
        del sys.modules[name]

"""How `make docs` builds these pages."""

import inspect
from typing import Any

import rankloss

project = "rankloss"
author = "The rankloss authors"
release = rankloss.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["build"]

html_theme = "furo"
html_title = "rankloss"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"


def show_as_written(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings are plain text, laid out by hand: show them as they are in the source."""
    text = inspect.cleandoc("\n".join(lines)).splitlines()
    lines[:] = ["::", "", *(f"    {line}" for line in text), ""] if text else []


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", show_as_written)

"""The commands of the pages about codebases are those that `switches` can follow."""

import re
from pathlib import Path

import pytest

from rankloss.fusion.optional import EXTRAS
from tests.adapters.switches import PAGES, commands, resized

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "codebases"

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="tests run outside the checkout")


def test_every_page_is_followed() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == PAGES.keys()


@pytest.mark.parametrize("name", PAGES)
def test_pages_install_and_their_sizes_are_there(name: str) -> None:
    lines = resized(list(commands((FOLDER / f"{name}.md").read_text())), PAGES[name].sizes)
    assert lines[0].startswith("pip install .") or lines[0].startswith("pip install '.[")


def test_extras_that_are_named_exist() -> None:
    """With hyphens: pip before 23.3 does not find a name with an underscore, and only warns."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^([\w-]+) = \[", section.split("\n[")[0], re.MULTILINE))
    assert not {name for name in extras if "_" in name}
    texts = [ROOT / "README.md", ROOT / "pyproject.toml", *(ROOT / "docs").rglob("*.md")]
    texts += [path for name in ("rankloss", "fusion") for path in (ROOT / name).glob("*.py")]
    named = {
        name
        for path in texts
        for found in re.findall(r"(?:rankloss|[\"']\.)\[([a-z_,-]+)\]", path.read_text())
        for name in found.split(",")
    }
    assert named
    assert named <= extras
    assert set(EXTRAS.values()) <= extras


def test_a_size_that_is_gone_is_told() -> None:
    with pytest.raises(ValueError, match="no command has '--batch-size 256'"):
        resized(["python train.py"], {"--batch-size 256": "--batch-size 8"})

"""The commands of the pages about codebases are those that `switches` can follow."""

from pathlib import Path

import pytest

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


def test_a_size_that_is_gone_is_told() -> None:
    with pytest.raises(ValueError, match="no command has '--batch-size 256'"):
        resized(["python train.py"], {"--batch-size 256": "--batch-size 8"})

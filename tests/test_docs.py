"""Every Python block of the documentation runs, page by page, and what pages name exists."""

import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [x for x in PAGES if "```python\n" in x.read_text()]

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="tests run outside the checkout")


def names(pages: list[Path]) -> list[str]:
    return [str(x.relative_to(DOCS)) for x in pages]


@pytest.mark.parametrize("page", WITH_CODE, ids=names(WITH_CODE))
def test_code_runs(page: Path) -> None:
    """Blocks of a page continue each other."""
    torch.manual_seed(0)
    surroundings: dict[str, object] = {"__name__": page.stem}
    with warnings.catch_warnings():
        if page.parent.name == "codebases":
            warnings.simplefilter("ignore")  # other packages' own
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, str(page), "exec"), surroundings)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_that_are_named_exist(page: Path) -> None:
    for path in re.findall(r"`((?:tests|benchmarks|examples|rankloss)/[\w/.]+)`", page.read_text()):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http)([\w/.]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_options_of_the_launcher_are_those_documented() -> None:
    from rankloss.open_clip import _parser

    options = {x for action in _parser()._actions for x in action.option_strings}
    documented = set(re.findall(r"--rank-[\w-]+", (DOCS / "codebases/open_clip.md").read_text()))
    assert documented - {"--rank-"} == options


def test_every_pain_is_described() -> None:
    sources = [x.read_text() for x in (ROOT / "tests" / "pains").glob("test_*.py")]
    tests = {
        name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    }
    described = set(re.findall(r"`(test_\w+)`", (DOCS / "troubleshooting.md").read_text()))
    assert described == tests
    assert len(tests) >= 30

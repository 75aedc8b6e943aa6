"""Every snippet of the README runs, and every table in it is a committed result."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="tests run outside the checkout")


def text() -> str:
    return README.read_text() if README.exists() else ""


SNIPPETS = re.findall(r"```python\n(.*?)```", text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(snippet: str) -> None:
    if "open_clip" in snippet:
        pytest.importorskip("open_clip")
    features = normalize(torch.randn(2, 6, 512), dim=2)
    model = torch.nn.Linear(1, 1)
    names = {
        "image_features": features[0],
        "text_features": features[1],
        "logit_scale": torch.tensor(14.3),
        "model": model,
    }
    exec(snippet, names)
    result = names.get("loss", names.get("nll", names.get("no_decay")))
    assert result is not None
    if isinstance(result, torch.Tensor):
        assert result.isfinite().all()


def test_first_code_block_is_before_and_after() -> None:
    assert text().index("```python") < 600
    assert "# before" in SNIPPETS[0]
    assert "# after" in SNIPPETS[0]


def rows_of_options() -> list[str]:
    """Expressions that build a loss in the table of options."""
    table = (ROOT / "docs" / "losses.md").read_text()
    return re.findall(r"\| `((?:HighOrderPL|RankCLIP|Clip)Loss\([^`]*?\))`", table)


def test_options_of_the_table_exist() -> None:
    import rankloss

    rows = rows_of_options()
    assert len(rows) >= 7
    features = normalize(torch.randn(2, 6, 512), dim=2)
    for row in rows:
        loss = eval(row, vars(rankloss))
        assert loss(features[0], features[1], 10.0).isfinite(), row


def test_rows_of_the_result_are_committed() -> None:
    """The README's rows are some of the demo's; docs/results.md has all."""
    committed = (ROOT / "examples" / "results" / "demo.md").read_text().splitlines()
    section = text().split("## The demo's result")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 7  # with the heading and the line below it
    assert set(rows) <= set(committed)


def test_intervals_are_the_study_s() -> None:
    study = (ROOT / "docs" / "study.md").read_text()
    intervals = re.findall(r"[+-]\d\.\d+ \[[^]]+\]", text().replace("\n", " "))
    assert len(intervals) == 5
    assert all(f" {interval}, 5 seeds" in study for interval in intervals)


def test_readme_is_short() -> None:
    assert len(text().splitlines()) < 140


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)(\S+?)\)", text()))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_tree_is_the_real_one() -> None:
    """Its folders and files exist, and no folder of Python files is left out."""
    section = text().split("## Where things are")[1]
    for line in section.splitlines():
        folder, *rest = re.findall(r"`([\w./]+)`", line)[:9] if line.startswith("| `") else [""]
        for name in (folder, *(x for x in rest if x.endswith((".py", "/")))):
            assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name
    named = set(re.findall(r"`([\w/]+)/`", section))
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/*.py")}
    folders |= {path.parent.relative_to(ROOT) for path in ROOT.glob("examples/*/*.py")}
    assert {str(folder) for folder in folders if not str(folder).startswith(".")} <= named


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_folder_and_tool_of_the_tests_is_named() -> None:
    told = (ROOT / "tests" / "README.md").read_text()
    files = {x.name for x in (ROOT / "tests" / "helpers").glob("[a-z]*.py")}
    folders = {f"{x.parent.name}/" for x in (ROOT / "tests").glob("*/__init__.py")}
    modules = {x.name for x in (ROOT / "tests").glob("[!_]*.py")} - {"conftest.py"}
    named = set(re.findall(r"`([\w.]+(?:\.py|/))`", told)) - {"helpers/"}
    assert named == (files | folders | modules) - {"helpers/"}

"""Docstrings name their subject, and refer only to files that exist."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("rankloss", "kernels", "fusion", "examples", "benchmarks", "tests")
OPENINGS = ("Of", "What", "Where", "Who", "Whose", "How", "Whether", "When", "Why", "Which", "That")
"""First words after which a reader asks: what is this about?"""
PATH = re.compile(r"(?<![\w{<*./:-])[\w-][\w./-]*\.(?:py|md|yaml)\b(?![\w/{*])")
PLACEHOLDER = re.compile(r"[A-Z]+/")
"""Start of a path that the user chooses: DIR/results.md."""
ARGUMENT = re.compile(r"^ +[\w, *]+: of\b", re.MULTILINE)
WRITTEN = {"config.yaml", "results.md", "gpu.md", "cpu.md", "teacher.md", "text.md", "README.md"}
"""Files that our programs write, or that any repository has; no docstring misleads with them."""

pytestmark = pytest.mark.skipif(not (ROOT / "CONTRIBUTING.md").exists(), reason="no checkout here")


def sources() -> list[Path]:
    """Our Python files, each once: the links in rankloss/ are not followed."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    linked = {ROOT / "rankloss" / name for name in ("kernels", "fusion")}
    return [path for path in paths if not linked & set(path.parents)]


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands alone: of modules, classes, functions, values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            value = node.value.value
            if isinstance(value, str):
                yield node.lineno, value


def faults(source: str, known: set[str]) -> list[str]:
    """Faults of a file's docstrings, each with its line.

    Args:
        source: text of the file.
        known: paths and names of all files in the repository.
    """
    found = []
    for line, text in docstrings(ast.parse(source)):
        first = re.match(r"\w+", text.strip())
        if first and first.group() in OPENINGS:
            found.append(f"{line}: begins with {first.group()!r}; begin with a verb or a noun")
        for match in ARGUMENT.finditer(text):
            found.append(f"{line}: {match.group().strip()!r}; say what the argument is")
        for match in PATH.finditer(text):
            if match.group() not in known and not PLACEHOLDER.match(match.group()):
                found.append(f"{line}: there is no {match.group()}")
    return found


def known_files() -> set[str]:
    """Every path in the checkout, its ends ("cc3m/train.py" of "examples/cc3m/train.py") too."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    files = listed or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.*")]
    ends = {"/".join(Path(file).parts[i:]) for file in files for i in range(len(Path(file).parts))}
    return ends | WRITTEN


def test_docstrings_name_their_subject_and_files_that_exist() -> None:
    known = known_files()
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in sources()
        for fault in faults(path.read_text(encoding="utf-8"), known)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('"""Of every anchor, the loss."""', "'Of'"),
        ('def f():\n    """What it says."""', "'What'"),
        ('class A:\n    """How."""', "'How'"),
        ('x = 1\n"""Whether it is."""', "'Whether'"),
        ('"""Add.\n\n    Args:\n        name, other: of the thing.\n    """', "of"),
        ('"""Explained in docs/missing.md and `examples/missing.py`."""', "docs/missing.md"),
    ],
)
def test_faults_are_seen(text: str, word: str) -> None:
    assert word in faults(text, {"docs/present.md"})[0]


@pytest.mark.parametrize(
    "text",
    [
        '"""Offsets of tiles; Whatever follows. See docs/present.md."""',
        '"""Add.\n\n    Args:\n        name: width of the thing.\n    """',
        'x = "Of a value, not a docstring; missing.py"',
        '"""https://example.org/page.md , <out>/config.yaml, step_*.py, {name}.yaml, DIR/a.md."""',
    ],
)
def test_sound_prose_passes(text: str) -> None:
    assert faults(text, {"docs/present.md"} | WRITTEN) == []

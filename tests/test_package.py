"""The package as a whole: direction of imports, what is installed, importing and reporting."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import rankloss
import rankloss.fusion
import rankloss.kernels

PACKAGES = (rankloss, rankloss.kernels, rankloss.fusion)
# a package may import from itself and from these
ALLOWED = {
    "rankloss": {"rankloss.kernels", "rankloss.fusion"},
    "rankloss.kernels": set(),
    "rankloss.fusion": set(),
}


def package_of(module: str) -> str:
    """The public package a dotted name belongs to."""
    names = sorted(ALLOWED, key=len, reverse=True)
    return next(n for n in names if module == n or module.startswith(f"{n}."))


def rankloss_imports(path: Path) -> set[str]:
    """Packages of this project that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {package_of(name) for name in found if name.split(".")[0] == "rankloss"}


def sources() -> list[tuple[str, Path]]:
    return [
        (package.__name__, path)
        for package in PACKAGES
        for path in sorted(Path(package.__path__[0]).glob("*.py"))
    ]


@pytest.mark.parametrize(
    ("package", "path"), sources(), ids=[f"{p}:{f.name}" for p, f in sources()]
)
def test_imports_point_one_way(package: str, path: Path) -> None:
    backwards = rankloss_imports(path) - ALLOWED[package] - {package}
    assert not backwards, f"{path} imports {backwards}"


def test_import_walk_sees_a_backward_arrow(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from rankloss import HighOrderPLLoss\n")
    assert rankloss_imports(bad) == {"rankloss"}


def test_no_module_imports_examples_or_benchmarks() -> None:
    for _, path in sources():
        text = path.read_text()
        assert "import benchmarks" not in text
        assert "import examples" not in text


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_imports_and_computes_without_triton() -> None:
    result = run(
        "import sys; sys.modules['triton'] = None; sys.modules['triton.language'] = None\n"
        "import torch, rankloss\n"
        "f = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)\n"
        "print(rankloss.HighOrderPLLoss(8)(f, f, 10.0).item())"
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) >= 0


@pytest.mark.parametrize("module", ["triton", "einops", "open_clip", "webdataset", "matplotlib"])
def test_import_does_not_load(module: str) -> None:
    result = run(
        f"import sys, torch; before = {module!r} in sys.modules\n"
        f"import rankloss; print(before or {module!r} not in sys.modules)"
    )
    assert result.stdout.strip() == "True", result.stderr


def test_fusion_refuses_to_be_a_second_copy() -> None:
    parent = Path(rankloss.__file__).parent
    result = run(f"import sys; sys.path.insert(0, {str(parent)!r}); import fusion")
    assert result.returncode != 0
    assert "imported as `rankloss.fusion`" in result.stderr


@pytest.mark.parametrize("first", ["kernels", "rankloss.kernels"])
def test_a_bare_import_of_kernels_gives_the_same_objects(first: str) -> None:
    """Other packages probe for one called `kernels`, and find the folder from a checkout's root."""
    parent = Path(rankloss.__file__).parent
    result = run(
        f"import sys; sys.path.insert(0, {str(parent)!r}); import {first}\n"
        "import kernels, rankloss.kernels\n"
        "print(all(getattr(kernels, x) is getattr(rankloss.kernels, x) for x in kernels.__all__))"
    )
    assert result.stdout.strip() == "True", result.stderr


def test_is_typed() -> None:
    assert (Path(rankloss.__file__).parent / "py.typed").exists()


def test_version_agrees_with_metadata() -> None:
    assert metadata.version("rankloss") == rankloss.__version__


@pytest.mark.parametrize("package", [rankloss, rankloss.fusion])
def test_public_names_are_documented(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name).__doc__, name


def test_fusion_exports_all_its_modules() -> None:
    """Every public class of fusion/ that is not a helper of one of its files."""
    there = set(rankloss.fusion.__all__)
    assert {"Dinov3Teacher", "TeacherFeatures", "TokenPCA", "DualBranchStudent"} < there
    modules = {
        name
        for each in vars(rankloss.fusion).values()
        if isinstance(each, ModuleType)
        for name, value in vars(each).items()
        if isinstance(value, type) and value.__module__ == each.__name__
    }
    assert modules == there - {"FUSION_VARIANTS"}


def test_report_and_self_check() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rankloss"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for line in ("torch ", "triton ", "cpu (", "blocked: can run", "ok: probabilities"):
        assert line in result.stdout
    assert "FAILED" not in result.stdout

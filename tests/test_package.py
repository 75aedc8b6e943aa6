"""The package as a whole: direction of imports, what is installed, importing and reporting."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import rankloss
import rankloss.distillation
import rankloss.fusion
import rankloss.kernels

PACKAGES = (rankloss, rankloss.distillation, rankloss.kernels, rankloss.fusion)
# a package may import from itself and from these
ALLOWED = {
    "rankloss": {"rankloss.distillation", "rankloss.kernels", "rankloss.fusion"},
    "rankloss.distillation": {"rankloss", "rankloss.kernels", "rankloss.fusion"},
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


ROOT = Path(__file__).resolve().parents[1]


def test_nothing_but_tests_imports_tests() -> None:
    paths = [
        path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    imports = re.compile(r"^ *(from|import) tests\b", re.MULTILINE)
    assert not [path for path in paths if imports.search(path.read_text())]


def run(code: str) -> "subprocess.CompletedProcess[str]":
    """Run code in the checkout's root, which `-c` puts first on sys.path."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_import_loads_no_optional_package() -> None:
    """Nor einops and Triton, which only some functions need."""
    result = run(
        "import sys, torch; before = set(sys.modules)\n"
        "import rankloss; print(*(name for name in set(sys.modules) - before if '.' not in name))"
    )
    optional = {"open_clip", "transformers", "timm", "huggingface_hub", "safetensors"}
    new = set(result.stdout.split())
    assert "rankloss" in new, result.stderr
    assert new.isdisjoint(optional | {"triton", "einops", "webdataset", "matplotlib"})


@pytest.mark.parametrize("package", ["kernels", "fusion"])
@pytest.mark.parametrize("parent", ["", "rankloss."])
def test_a_bare_import_gives_the_same_objects(package: str, parent: str) -> None:
    """Other packages probe for one called `kernels`, and find the folder from a checkout's root."""
    folder = Path(rankloss.__file__).parent
    result = run(
        f"import sys; sys.path.insert(0, {str(folder)!r}); import {parent}{package}\n"
        f"import {package} as bare, rankloss.{package} as ours\n"
        "print(all(getattr(bare, x) is getattr(ours, x) for x in ours.__all__))"
    )
    assert result.stdout.strip() == "True", result.stderr


def test_other_packages_import_from_the_root() -> None:
    result = run("import timm, open_clip\nfrom transformers import CLIPModel, DINOv3ViTModel")
    assert result.returncode == 0, result.stderr


def test_without_huggingface_hub_the_method_works_and_saving_names_the_remedy() -> None:
    result = run(
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import torch, rankloss\n"
        "class Towers(torch.nn.Module):\n"
        "    def forward(self, x, y): return x, y, torch.tensor(10.0)\n"
        "model = rankloss.DinoRankCLIP(Towers(), embed_dim=4, variant='none')\n"
        "x = torch.eye(4)\n"
        "assert model(x, x)['contrastive_loss'] > 0\n"
        "for call in (model.save_pretrained, model.push_to_hub, type(model).from_pretrained):\n"
        "    try: call('folder')\n"
        "    except ImportError as error: assert 'rankloss[hub]' in str(error)\n"
        "    else: raise AssertionError('nothing was raised')"
    )
    assert result.returncode == 0, result.stderr


def test_is_typed() -> None:
    assert (Path(rankloss.__file__).parent / "py.typed").exists()


def test_version_agrees_with_metadata() -> None:
    assert metadata.version("rankloss") == rankloss.__version__


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

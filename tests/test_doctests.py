"""Examples in docstrings: each runs, and every public class and function has one."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import pytest
import torch

import rankloss

PACKAGES = ["rankloss", "rankloss.distillation", "rankloss.fusion"]


def modules() -> list[str]:
    """Names of the packages and of all their modules."""
    names = [*PACKAGES]
    for package in PACKAGES:
        found = pkgutil.iter_modules(importlib.import_module(package).__path__)
        names += [f"{package}.{x.name}" for x in found if not x.ispkg and x.name != "__main__"]
    return sorted(names)


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    surroundings = {**vars(module), "torch": torch, "rankloss": rankloss}
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=options)
    for example in doctest.DocTestFinder().find(module, name, globs=surroundings):
        torch.manual_seed(0)
        runner.run(example, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)


def public(package: ModuleType) -> dict[str, Any]:
    """Classes and functions that a package exports, by name."""
    return {
        f"{package.__name__}.{name}": value
        for name in package.__all__
        if inspect.isclass(value := getattr(package, name)) or inspect.isroutine(value)
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_example(package: str) -> None:
    exported = public(importlib.import_module(package))
    assert exported
    without = {name for name, value in exported.items() if ">>>" not in (value.__doc__ or "")}
    assert not without, f"add an example to {sorted(without)}"

"""What kernels take on GPUs that are not here: no spills or atomics, shared memory in bounds."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aot
from benchmarks.aot_binary import SHARED_LIMITS, Resources, count_spills, narrow_products

pytest.importorskip("triton", reason="ahead-of-time compilation needs Triton")

ROOT = Path(__file__).resolve().parents[2]
SOUND = Resources(registers=128, spills=0, shared=1024, matrix=4, atomics=0, narrow_products=0)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Under the interpreter too: the command then starts a process without it."""
    file = tmp_path_factory.mktemp("aot") / "kernels.json"
    command = [sys.executable, "-m", "benchmarks", "aot", "--quick", "--json", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(file.read_text())["kernels"]
    return found


def test_every_kernel_compiles_for_every_architecture(kernels: list[dict[str, Any]]) -> None:
    seen = {(kernel["architecture"], kernel["name"].split()[0]) for kernel in kernels}
    names = {"forward", "backward", "backward_queries", "backward_keys", "collect", "gram"}
    assert seen == {(architecture, name) for architecture in SHARED_LIMITS for name in names}
    assert all(kernel["resources"] for kernel in kernels)


def test_nothing_spills_exceeds_shared_memory_or_uses_atomics(
    kernels: list[dict[str, Any]],
) -> None:
    for kernel in kernels:
        found, name = kernel["resources"], (kernel["architecture"], kernel["name"])
        assert found["spills"] == 0, name
        assert found["shared"] <= SHARED_LIMITS[kernel["architecture"]], name
        assert 0 < found["registers"] <= 512, name
        assert found["atomics"] == 0, name
        assert found["narrow_products"] == 0, name


def test_products_of_halves_and_tf32_are_on_matrix_units(kernels: list[dict[str, Any]]) -> None:
    products = ("forward", "backward_queries", "backward_keys")
    checked = 0
    for kernel in kernels:
        words = kernel["name"].split()
        if words[0] in products and {"bf16", "tf32"} & set(words):
            assert kernel["resources"]["matrix"] > 0, kernel
            checked += 1
    assert checked >= 3 * len(SHARED_LIMITS)


# ---------------------------------------------------------------- what is called a fault


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (SOUND, None),
        (replace(SOUND, spills=1), "spills"),
        (replace(SOUND, shared=65537), "shared memory"),
        (replace(SOUND, atomics=1), "atomics"),
        (replace(SOUND, matrix=0), "tensor-core"),
        (replace(SOUND, narrow_products=1), "32 bits"),
    ],
)
def test_faults(found: Resources, word: str | None) -> None:
    faults = list(aot.faults_of(found, "gfx942", needs_matrix_units=True))
    assert len(faults) == (word is not None)
    assert word is None or word in faults[0]


def test_a_kernel_that_does_not_compile_is_a_fault() -> None:
    class Broken:
        architecture, name, kernel, order = "sm_90", "broken", "missing", 3

    finding = aot.examine(Broken())
    assert finding.resources is None
    assert "does not compile" in finding.faults[0]
    assert "FAILED" in aot.line(finding)


def test_spills_are_loads_and_stores_of_local_memory() -> None:
    sass = "LDL R1, [R2] ;\n STL.64 [R2], R4 ;\n LDG R1 ;\n @P0 LDL.LU R3, [R1] ;\n BSSYNC ;"
    assert count_spills(sass) == 3


def test_products_of_sizes_in_32_bits_are_found() -> None:
    def count(*lines: str) -> int:
        return narrow_products("\n".join(["%c = arith.constant 64 : i32 loc(#l)", *lines]))

    row = "%i = tt.get_program_id x : i32 loc(#l)"
    assert count(row, "%a = arith.muli %i, %K : i32 loc(#l)") == 1
    assert count(row, "%a = arith.muli %i, %c : i32 loc(#l)") == 0
    assert count(row, "%a = arith.muli %i, %K : i64 loc(#l)") == 0
    assert count("%v = arith.muli %x, %y : tensor<64xi32> loc(#l)") == 1
    part = "%p = tt.get_program_id y : i32 loc(#l)"
    assert count(part, "%a = arith.muli %p, %p : i32 loc(#l)") == 0
    loop = "%s:2 = scf.for %j = %c to %c step %c iter_args(%u = %z) -> (f32) : i32 {"
    assert count(loop, "%a = arith.muli %j, %j : i32 loc(#l)") == 0
    assert count("%j = scf.for %k = %c to %K step %c : i32 {", "%a = arith.muli %k, %K : i32") == 1


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler")
def test_a_spilling_configuration_is_seen() -> None:
    """The reader is not blind: one warp for a tile that eight hold."""
    from benchmarks.aot_binary import compile_and_read
    from benchmarks.aot_cells import Cell, source

    cell = Cell("sm_90", "backward_keys", "bf16", 3, 32, skip=True)
    crowded = replace(cell.configuration(), backward_warps=1)
    assert compile_and_read(source(cell, crowded), cell.architecture).spills > 0


def test_unsupported_versions_of_triton_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    for version, supported in (("3.3.0", True), ("3.9.1", True), ("3.2.0", False), ("4.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        reason = aot.why_not_supported()
        assert (reason is None) == supported
        assert supported or version in str(reason)

"""Costs of kernels on GPUs that are not here: within their budgets, and worse ones are not."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compiled import kernels as aot
from benchmarks.compiled.binaries import (
    SHARED_LIMITS,
    count_spills,
    innermost_loops,
    narrow_products,
)
from benchmarks.compiled.kernels import Row, faults

pytest.importorskip("triton", reason="ahead-of-time compilation needs Triton")

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, Any]]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process without the interpreter, under which kernels are Python functions."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    file = tmp_path_factory.mktemp("aot") / "kernels.json"
    done = run("-m", "benchmarks", "aot", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found: Rows = json.loads(file.read_text())
    return found


def select(rows: Rows, **wanted: object) -> Rows:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


# ---------------------------------------------------------------- budgets


def test_both_passes_compile_for_every_target_without_spills(rows: Rows) -> None:
    """The command itself fails when a kernel breaks a limit; here is that it looked."""
    for target in SHARED_LIMITS:
        for kernel in ("high_order.forward", "high_order.backward"):
            assert select(rows, target=target, kernel=kernel, dtype="bf16", width=64)
    for row in rows:
        assert row["spills"] == row["atomics"] == row["narrow_products"] == 0, row
        assert 0 < row["registers"] <= 512
        assert row["programs"] > 0


@pytest.mark.parametrize(
    ("stage", "width", "slots"),
    [("forward", 64, 9), ("backward", 64, 8), ("forward", 128, 12), ("backward", 128, 10)],
)
def test_slots_of_half_precision(stage: str, width: int, slots: float, rows: Rows) -> None:
    kernel = f"high_order.{stage}"
    (row,) = select(rows, target="sm_90", kernel=kernel, dtype="bf16", width=width, walk="ranked")
    assert 4 < row["slots_per_score"] <= slots
    assert 1 <= row["exp2_per_score"] <= 1.1
    assert row["programs"] >= 2 or row["stages"] >= 3


@pytest.mark.parametrize(("kernel", "slots"), [("forward", 9 * 1.3), ("backward_rest", 8 * 1.3)])
def test_slots_of_the_natural_walk(kernel: str, slots: float, rows: Rows) -> None:
    (row,) = select(rows, target="sm_90", kernel=f"high_order.{kernel}", walk="natural")
    assert 4 < row["slots_per_score"] <= slots
    assert row["exp2_per_score"] <= 1.1


def test_both_passes_together(rows: Rows) -> None:
    """Tensor flops of half precision; slots of float32, whose parts take three products."""
    passes = [
        row
        for row in select(rows, target="sm_90", width=64, walk="ranked")
        if row["kernel"] in ("high_order.forward", "high_order.backward")
    ]
    assert sum(row["tensor_flops_per_score"] for row in select(passes, dtype="bf16")) <= 540
    assert 40 < sum(row["slots_per_score"] for row in select(passes, dtype="fp32")) <= 70


MUTANTS = r"""
import importlib.util, json, sys
from pathlib import Path
from benchmarks.compiled.kernels import Cell, examine, faults
from rankloss.kernels import high_order
from rankloss.kernels.configurations import Plan, Tile

crowded = Plan(Tile(64, 128, 8, 3), Tile(128, 64, 4, 3))
found = {"8 warps on 64 rows": list(faults(examine((Cell("sm_90"), "forward"), crowded)))}
bare = "        u, c = utilities(q, Q, k, C, S, j0 + jj, own, W, BW, PRECISION)\n"
seen = "(j0 + jj)[None, :]"
masked = f"{bare}        u = tl.where({seen} >= k[:, None], u, float('-inf'))\n"
masked += f"        taken += tl.sum(tl.where({seen} == k[:, None], u, 0.0), 1)\n"
text = Path(high_order.__file__).read_text()
assert text.count(bare) == 1
file = Path(sys.argv[1]) / "mutant.py"
file.write_text(text.replace(bare, masked))
spec = importlib.util.spec_from_file_location("mutant", file)
mutant = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutant)
row = examine((Cell("sm_90"), "forward"), module=mutant)
found["a mask in the interior loop"] = list(faults(row))
print(json.dumps(found))
"""


def test_deliberately_worse_kernels_are_over_budget(tmp_path: Path) -> None:
    done = run("-c", MUTANTS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    crowded, masked = found["8 warps on 64 rows"], found["a mask in the interior loop"]
    assert any("exponentials a score" in fault for fault in crowded)
    assert any("slots a score" in fault for fault in masked)


@pytest.mark.long
def test_every_kernel_of_the_full_grid(tmp_path: Path) -> None:
    """All dtypes, widths, walks and targets: nothing fails to compile, spills or uses atomics."""
    done = run("-m", "benchmarks", "aot", "--full", "--json", str(tmp_path / "full.json"))
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- what is called a fault

LAUNCH = ("high_order.forward", "forward", "sm_90", "bf16", 64, "ranked", "64x128", 4, 3)
SOUND = Row(*LAUNCH, 128, 0, 1024, 2, 4, 0, 0, 8.0, 1.0, 256.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"spills": 1}, "spills"),
        ({"shared": 232449}, "shared memory"),
        ({"atomics": 1}, "atomics"),
        ({"matrix": 0}, "tensor-core"),
        ({"narrow_products": 1}, "32 bits"),
        ({"programs": 1, "stages": 2}, "not pipelined"),
        ({"slots_per_score": 9.1}, "slots"),
        ({"slots_per_score": 11.6, "walk": "natural"}, None),
        ({"exp2_per_score": 2.0}, "exponentials"),
        ({"tensor_flops_per_score": 384.0}, "tensor flops"),
    ],
)
def test_faults(change: dict[str, Any], word: str | None) -> None:
    found = list(faults(replace(SOUND, **change)))
    assert len(found) == (word is not None)
    assert word is None or word in found[0]


def test_a_kernel_that_does_not_compile_is_said() -> None:
    (found,) = aot.examine_all([(aot.Cell("sm_90"), "missing")], processes=1)
    assert isinstance(found, str)


def test_only_innermost_loops_are_counted() -> None:
    sass = """
.L_x_1:
        /*0000*/ MOV R1, R2 ;
.L_x_2:
        /*0010*/ @!P0 MUFU.EX2 R1, R2 ;
        /*0020*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/ @P1 BRA `(.L_x_2) ;
        /*0040*/ BRA `(.L_x_1) ;
        /*0050*/ EXIT ;
"""
    (loop,) = innermost_loops(sass, warps=4)
    assert (loop.slots, loop.exponentials, loop.flops) == (3, 1, 2 * 64 * 128 * 16)


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


def test_unsupported_versions_of_triton_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    for version, supported in (("3.3.0", True), ("3.9.1", True), ("3.2.0", False), ("4.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        reason = aot.why_not_supported()
        assert (reason is None) == supported
        assert supported or version in str(reason)

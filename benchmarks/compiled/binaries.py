"""Resources of a compiled kernel, read off its binary: no driver, no GPU needs to be here.

Registers come from the `cuobjdump` that Triton ships, spills and the instructions of inner loops
from its disassembler. For AMD all of it stands in the assembly, loops left out.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Architectures and the bytes of shared memory that one program may have there."""


@dataclass(frozen=True)
class Loop:
    """One innermost loop: instructions of a thread, exponentials among them, and flops of
    the matrix instructions that all threads of a program execute together."""

    slots: int
    exponentials: int
    flops: int


@dataclass(frozen=True)
class Binary:
    """One compiled kernel.

    `registers` of a thread (AMD: vector registers); `spills`: spill instructions (NVIDIA) or
    spilled registers (AMD); `matrix`: tensor-core instructions; `narrow_products`: 32-bit
    products of two sizes known only at run time, which may overflow when used as an offset.
    """

    registers: int
    spills: int
    shared: int
    matrix: int
    atomics: int
    narrow_products: int
    loops: tuple[Loop, ...] = ()


def read(compiled: Any, architecture: str, warps: int) -> Binary:
    """Read what `triton.compile` returned."""
    narrow = narrow_products(compiled.asm["ttir"])
    shared = int(compiled.metadata.shared)
    if architecture.startswith("gfx"):
        return _read_amd(compiled.asm["amdgcn"], shared, narrow)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    usage = _run_tool("cuobjdump", cubin, "--dump-resource-usage")
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise ValueError(f"cuobjdump's report has no registers: {usage[:200]!r}")
    sass = _run_tool("nvdisasm", cubin, "-c")
    return Binary(
        registers=int(registers[1]),
        spills=count_spills(sass),
        shared=shared,
        matrix=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        atomics=len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", ptx, re.MULTILINE)),
        narrow_products=narrow,
        loops=innermost_loops(sass, warps),
    )


def _read_amd(assembly: str, shared: int, narrow: int) -> Binary:
    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return Binary(
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count"),  # scalar ones go to lanes of vector registers
        shared=max(shared, metadata("group_segment_fixed_size")),
        matrix=len(re.findall(r"^\s*v_(?:mfma|smfmac)_", assembly, re.MULTILINE)),
        atomics=len(re.findall(r"^\s*\w+_atomic_\w+", assembly, re.MULTILINE)),
        narrow_products=narrow,
    )


@functools.cache
def _tool(name: str) -> str:
    import triton.backends.nvidia as nvidia

    assert nvidia.__file__ is not None
    return str(Path(nvidia.__file__).parent / "bin" / name)


def _run_tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [_tool(name), *options, file.name], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[:200]}")
    return done.stdout


# ---------------------------------------------------------------- machine code


def count_spills(sass: str) -> int:
    """Loads and stores of local memory."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def innermost_loops(sass: str, warps: int) -> tuple[Loop, ...]:
    """Loops that hold no other one, in the order of the code."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = re.match(r"^\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = len(instructions)
        instruction = re.match(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if instruction:
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1].strip()))
    ends = []
    for at, text in enumerate(instructions):
        branch = re.match(r"BRA\b.*?(\.L_\w+)", text)
        if branch and labels.get(branch[1], at) < at:
            ends.append((labels[branch[1]], at))
    inner = [x for x in ends if not any(_inside(y, x) for y in ends)]
    return tuple(_loop(instructions[first : last + 1], warps) for first, last in inner)


def _inside(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a != b and b[0] <= a[0] and a[1] <= b[1]


def _loop(body: Sequence[str], warps: int) -> Loop:
    exponentials = sum(text.startswith("MUFU.EX2") for text in body)
    return Loop(len(body), exponentials, sum(_flops(text, warps) for text in body))


def _flops(text: str, warps: int) -> int:
    """Flops of a matrix instruction, which four warps (HGMMA) or one (HMMA) execute together."""
    shape = re.search(r"GMMA\.(\d+)x(\d+)x(\d+)", text)
    if shape:
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * warps // 4
    shape = re.search(r"HMMA\.(\d\d)(\d)(\d+)", text)  # such as HMMA.16816
    return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * warps if shape else 0


# ---------------------------------------------------------------- overflow


def narrow_products(ttir: str) -> int:
    """32-bit multiplications of two values that both depend on arguments or memory.

    The second and third program axes count a handful of parts, and so do loops with constant
    bounds: products with those cannot overflow.
    """
    known: set[str] = set()  # values that depend on constants alone, or are such counts
    count = 0
    for line in ttir.splitlines():
        loop = re.search(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)", line)
        if loop and known.issuperset(loop.groups()[1:]):
            known.add(loop[1])
        found = re.match(r"\s*(%\w+) = \"?([\w.]+)\"?(.*)", line)
        if found is None:
            continue
        name, operation, rest = found.groups()
        operands = re.findall(r"%\w+", rest.split(" : ")[0])
        varies = operation in ("tt.load", "scf.for", "scf.if", "scf.while")
        varies |= operation == "tt.get_program_id" and " x : " in rest
        if not varies and known.issuperset(operands):
            known.add(name)
        elif operation == "arith.muli" and re.search(r"\bi32\b|xi32>", rest.split(" : ")[-1]):
            count += known.isdisjoint(operands)
    return count

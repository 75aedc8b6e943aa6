"""Compile a kernel for a GPU that need not be here, and read what it takes off the binary.

Nothing asks a driver: registers and stack come from the `cuobjdump` that Triton ships, spills
from its disassembly (looked at only where there is a stack), matrix products and atomics from
PTX. For AMD all of it stands in the assembly.
"""

import functools
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Architectures and the bytes of shared memory that one program may have there."""


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel.

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


@dataclass(frozen=True)
class Source:
    """A kernel and everything its compilation depends on but the target."""

    kernel: Any  # a @triton.jit function
    types: Mapping[str, str]  # of every argument that is no constant
    constants: Mapping[str, int | bool | str]
    options: Mapping[str, int]  # of the launch


def compile_and_read(source: Source, architecture: str) -> Resources:
    compiled = compile_for(source, architecture)
    narrow = narrow_products(compiled.asm["ttir"])
    shared = int(compiled.metadata.shared)
    if architecture.startswith("gfx"):
        return amd_resources(compiled.asm["amdgcn"], shared, narrow)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, stack = registers_and_stack(cubin)
    spills = count_spills(disassemble(cubin)) if stack else 0
    matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx))
    atomics = len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", ptx, re.MULTILINE))
    return Resources(registers, spills, shared, matrix, atomics, narrow)


def compile_for(source: Source, architecture: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if architecture.startswith("gfx"):
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    names = source.kernel.arg_names
    pointers = [i for i, name in enumerate(names) if source.types.get(name, "")[:1] == "*"]
    signature = {name: source.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in source.constants.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    code = ASTSource(source.kernel, signature, constants, attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of its own making
        return triton.compile(code, target=target, options=dict(source.options))


# ---------------------------------------------------------------- NVIDIA


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    text = _run_tool("cuobjdump", cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump's report has no registers: {text[:200]!r}")
    return int(found[1]), int(found[2])


def disassemble(cubin: bytes) -> str:
    return _run_tool("nvdisasm", cubin)


def count_spills(sass: str) -> int:
    """Loads and stores of local memory."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


@functools.cache
def _tool(name: str) -> str:
    import triton.backends.nvidia as nvidia

    assert nvidia.__file__ is not None
    return str(Path(nvidia.__file__).parent / "bin" / name)


def _run_tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(cubin)
        done = subprocess.run([_tool(name), *options, file], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[:200]}")
    return done.stdout


# ---------------------------------------------------------------- AMD


def amd_resources(assembly: str, shared: int, narrow: int) -> Resources:
    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return Resources(
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count"),  # scalar ones go to lanes of vector registers
        shared=max(shared, metadata("group_segment_fixed_size")),
        matrix=len(re.findall(r"^\s*v_(?:mfma|smfmac)_", assembly, re.MULTILINE)),
        atomics=len(re.findall(r"^\s*\w+_atomic_\w+", assembly, re.MULTILINE)),
        narrow_products=narrow,
    )


# ---------------------------------------------------------------- overflow


def narrow_products(ttir: str) -> int:
    """32-bit multiplications of two values that both depend on arguments or memory.

    The second program axis counts a handful of parts, and so do loops with constant bounds:
    products with those cannot overflow.
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

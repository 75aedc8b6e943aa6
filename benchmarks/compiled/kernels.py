"""Compile every kernel for GPUs that need not be here, and count what it costs there.

One row a kernel and target: registers, spills, shared memory, programs that fit on one
multiprocessor, and for the streaming passes the issue slots, exponentials and tensor flops that
their interior loop spends on a score (one entry of a tile of places x candidates). A fault is a
kernel that spills, exceeds shared memory, uses atomics, misses the tensor cores, multiplies sizes
in 32 bits, or costs more than its budget.
"""

import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.compiled.binaries import SHARED_LIMITS, Binary, read
from benchmarks.compiled.launches import Launch, lists, recorded
from rankloss.kernels.dispatch import OLDEST_TRITON

if TYPE_CHECKING:
    from rankloss.kernels.configurations import Plan

NEWEST = (3, 9)  # version of Triton this was run with
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = {
    "backward_rest": "backward",
    "gram": "forward",
    "gradient": "backward",
}  # the others are named after theirs


@dataclass(frozen=True)
class Cell:
    """One problem for one target: tables' dtype, order and r, and the walk."""

    target: str
    dtype: str = "bf16"
    order: int = 3
    r: int = 32
    walk: str = "ranked"  # or "natural", with K << M; at order 1: all places, or some


@dataclass(frozen=True)
class Row:
    """Resources that one kernel takes; see the module's docstring."""

    kernel: str
    # "pass" in the file
    stage: str
    target: str
    dtype: str
    width: int
    walk: str
    tile: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    programs: int
    matrix: int
    atomics: int
    narrow_products: int
    slots_per_score: float | None
    exp2_per_score: float | None
    tensor_flops_per_score: float | None

    def costs(self) -> tuple[float, float, float]:
        """Slots, exponentials and flops a score, 0 where there is no interior loop."""
        return (
            self.slots_per_score or 0.0,
            self.exp2_per_score or 0.0,
            self.tensor_flops_per_score or 0.0,
        )

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["pass"] = content.pop("stage")
        return content


# ---------------------------------------------------------------- budgets

# (pass, width, dtype): most slots a score on sm_90; the natural walk may have 1.3 times as many
SLOTS = {
    ("forward", 64, "bf16"): 9.0,
    ("backward", 64, "bf16"): 8.0,
    ("forward", 128, "bf16"): 12.0,
    ("backward", 128, "bf16"): 10.0,
    ("forward", 64, "fp32"): 38.0,  # 70 together
    ("backward", 64, "fp32"): 32.0,
}
EXPONENTIALS = 1.1  # a score, in each pass
TENSOR_FLOPS = {"forward": 4.2, "backward": 4.2}  # a score and column: 540 in all at W = 64
NATURAL = 1.3


def faults(row: Row) -> Iterator[str]:
    """Faults of a kernel on its target."""
    limit = SHARED_LIMITS[row.target]
    if row.spills:
        yield f"{row.spills} spills"
    if row.shared > limit:
        yield f"{row.shared} bytes of shared memory, {limit} at most"
    if row.atomics:
        yield f"{row.atomics} atomics"
    if row.narrow_products:
        yield f"{row.narrow_products} products of sizes in 32 bits"
    if row.slots_per_score is not None:
        yield from _over_budget(row)
    if row.stage in PASSES_OF_LISTS and not row.kernel.startswith("first_order") and not row.matrix:
        yield "no tensor-core instruction"


def _over_budget(row: Row) -> Iterator[str]:
    slots, exponentials, flops = row.costs()
    if row.programs < 2 and row.stages < 3:
        yield "one program a multiprocessor, not pipelined"
    most = SLOTS.get((row.stage, row.width, row.dtype))
    if most is None or row.target != "sm_90":
        return
    most *= NATURAL if row.walk == "natural" else 1
    if slots > most:
        yield f"{slots:.1f} slots a score, {most:.1f} at most"
    if exponentials > EXPONENTIALS:
        yield f"{exponentials:.2f} exponentials a score, {EXPONENTIALS} at most"
    # three products of parts for one of float32; blocks of columns repeat the first product
    need = TENSOR_FLOPS[row.stage] * row.width * (3 if row.dtype == "fp32" else 1)
    if not 0 < flops <= need:
        yield f"{flops:.0f} tensor flops a score, {need:.0f} at most"


# ---------------------------------------------------------------- rows


def launches_of(cell: Cell, module: ModuleType | None = None) -> list[Launch]:
    """The launches of a value with its gradients; `module` replaces the high-order kernels."""
    from rankloss.kernels import first_order, gram, high_order

    dtype, n = DTYPES[cell.dtype], 8
    m, k = (1024, 1024) if cell.walk == "ranked" else (4096, 256)
    kernels = first_order if cell.order == 1 else module or high_order
    with recorded(kernels, gram, architecture=cell.target) as launches, torch.device("meta"):
        if cell.order == 0:
            gram.distance_and_gradient(torch.empty(2, 256, 192), torch.empty(2, 256, 256), "clamp")
            return launches
        x = lists(n, k, m, cell.order, cell.r, dtype)
        kernels.nll_and_gradients(torch.empty(n), x)
    return launches


def examine(
    work: tuple[Cell, str], plan: "Plan | None" = None, module: ModuleType | None = None
) -> Row:
    """Compile one kernel of a cell and read its binary."""
    from contextlib import nullcontext

    from rankloss.kernels.configurations import using

    cell, name = work
    with using(plan) if plan else nullcontext():
        launch = next(x for x in launches_of(cell, module) if x.name == name)
    warps = launch.options["num_warps"]
    return _row(cell, launch, read(_compiled(launch, cell.target), cell.target, warps))


def _compiled(launch: Launch, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    names = launch.kernel.arg_names
    types = launch.signature()
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in launch.multiples_of_16()}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of its own making
        return triton.compile(source, target=gpu, options=launch.options)


def _row(cell: Cell, launch: Launch, binary: Binary) -> Row:
    constants, options = launch.constants, launch.options
    module = launch.kernel.fn.__module__.rpartition(".")[2]
    warps = options["num_warps"]
    places, candidates = constants.get("BK", 0), constants.get("BJ", 0)
    costs: tuple[float | None, ...] = (None, None, None)
    loops = [x for x in binary.loops if x.exponentials and x.flops]
    if loops and places:
        scores = places * candidates
        loop = min(loops, key=lambda x: x.slots)  # the others mask a diagonal, or are as bare
        lanes = 32 * warps / scores
        costs = loop.slots * lanes, loop.exponentials * lanes, loop.flops / scores
    return Row(
        f"{module}.{launch.name}",
        PASSES.get(launch.name, launch.name),
        cell.target,
        cell.dtype if cell.order > 1 else "fp32",
        constants.get("W", 0),
        cell.walk,
        f"{places}x{candidates}" if places else "",
        warps,
        options["num_stages"],
        binary.registers,
        binary.spills,
        binary.shared,
        _programs(cell.target, binary, warps),
        binary.matrix,
        binary.atomics,
        binary.narrow_products,
        *costs,
    )


def _programs(target: str, binary: Binary, warps: int) -> int:
    """Count programs that fit on one multiprocessor (AMD: compute unit)."""
    memory = binary.shared + (0 if target.startswith("gfx") else 1024)
    by_memory = (SHARED_LIMITS[target] + 1024) // max(memory, 1)
    granted = -(-max(binary.registers, 1) // 8) * 8
    if target.startswith("gfx"):
        return min(by_memory, 4 * min(8, 512 // granted) // warps)
    return min(by_memory, 65536 // (granted * 32 * warps), 64 // warps, 32)


# ---------------------------------------------------------------- what is compiled


def default_work() -> list[tuple[Cell, str]]:
    """The budgeted kernels, and the rest of them once on every target."""
    work = [(Cell(target), name) for target in SHARED_LIMITS for name in PASSES_OF_LISTS]
    work += [(Cell("sm_90"), "prepare"), (Cell("sm_90"), "collect")]
    natural = Cell("sm_90", walk="natural")
    work += [(natural, "forward"), (natural, "backward_rest")]
    for cell in (Cell("sm_90", order=3, r=64), Cell("sm_90", "fp32")):
        work += [(cell, name) for name in PASSES_OF_LISTS]
    work += [(Cell("sm_90", order=1), name) for name in PASSES_OF_LISTS]
    return [*work, *((Cell("sm_90", order=0), name) for name in ("gram", "gradient"))]


PASSES_OF_LISTS = ("forward", "backward")


def full_work() -> list[tuple[Cell, str]]:
    """Every dtype, target and walk; narrow, usual and wide tables, at the depth they need."""
    work: list[tuple[Cell, str]] = []
    for target in SHARED_LIMITS:
        cells = [Cell(target, order=0)]
        for walk in ("ranked", "natural"):
            cells.append(Cell(target, order=1, walk=walk))
            for dtype in DTYPES:
                for order, r in ((2, 8), (3, 20), (3, 32), (3, 64), (4, 32), (5, 128)):
                    cells.append(Cell(target, dtype, order, r, walk))
        for cell in cells:
            work += [(cell, x.name) for x in launches_of(cell)]
    return list(dict.fromkeys(work))


def why_not_supported() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if OLDEST_TRITON <= version <= NEWEST:
        return None
    first, last = (".".join(map(str, x)) for x in (OLDEST_TRITON, NEWEST))
    return f"triton {triton.__version__} is outside {first} to {last}, the supported versions"


def examine_all(work: Sequence[tuple[Cell, str]], processes: int) -> Iterator[Row | str]:
    """Rows, or what went wrong, in the order of the work."""
    if processes == 1:
        yield from map(_examine_safely, work)
        return
    context = multiprocessing.get_context("spawn")  # the compiler's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_examine_safely, work)


def _examine_safely(work: tuple[Cell, str]) -> Row | str:
    try:
        return examine(work)
    except Exception as error:
        message = str(error).strip() or "no message"
        return f"{type(error).__name__}: {message.splitlines()[0][:200]}"

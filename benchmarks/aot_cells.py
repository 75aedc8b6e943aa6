"""What is compiled ahead of time: kernels at orders, widths, arithmetics, walks and targets."""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.aot_binary import SHARED_LIMITS, Source
from rankloss.kernels import first_order_kernels, gram_kernels, high_order_kernels
from rankloss.kernels import high_order_triton as launcher
from rankloss.kernels.configurations import SHORT, Configuration, gram_entry, table_entry

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of the tables; float32 otherwise
ARITHMETICS = (*DTYPES, "ieee", "tf32")
TABLE_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
ARGUMENT_TYPES = {
    **dict.fromkeys(("ranking", "lengths"), "*i64"),
    **dict.fromkeys(("scores", "weights", "key_norms", "lse", "nll", "grad", "d_scores"), "*fp32"),
    **dict.fromkeys(("d_predecessors", "d_key_table"), "*fp32"),
    **dict.fromkeys(("K", "M", "P", "first", "chunk"), "i32"),
    "places": "*i32",
    "live": "*i8",
    "T": "fp32",
}
"""Types of the kernels' arguments; those left out are tables and have the tables' type."""

DEFAULTS = {"num_warps": 4, "num_stages": 3}  # Triton's, of launches that name none

Walk = tuple[bool, bool]  # ranked, skipping tiles
WALKS: tuple[Walk, ...] = ((True, True), (True, False), (False, True), (False, False))
Width = tuple[int, int]  # order R, r


@dataclass(frozen=True)
class Cell:
    """One kernel for one architecture. What a kernel does not have stays at its default.

    `ranked` is the walk, or at order 1 whether every candidate is ranked; `short` lists have so
    few places that their tiles are lower.
    """

    architecture: str
    kernel: str
    arithmetic: str = "ieee"
    order: int = 0
    r: int = 0
    ranked: bool = True
    skip: bool = False
    short: bool = False

    @property
    def name(self) -> str:
        if self.order == 0:
            return f"{self.kernel} {self.arithmetic}"
        walk = "ranked" if self.ranked else "natural"
        if self.order == 1:
            return f"{self.kernel} R=1 {'all places' if self.ranked else 'top K'}"
        notes = [note for note in ("skip", "short") if getattr(self, note)]
        name = f"{self.kernel} R={self.order} r={self.r} {self.arithmetic} {walk}"
        return " ".join([name, *notes])

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.arithmetic, torch.float32)

    @property
    def needs_matrix_units(self) -> bool:
        """Whether its products must be on them; NVIDIA's have no IEEE float32."""
        return self.kernel in ("forward", "backward_queries", "backward_keys", "gram") and (
            self.order != 1 and self.arithmetic != "ieee"
        )

    def configuration(self) -> Configuration:
        """The table's entry."""
        arithmetic = "half" if self.arithmetic in DTYPES else self.arithmetic
        return table_entry(self.architecture, arithmetic, SHORT if self.short else SHORT + 1)


def source(cell: Cell, config: Configuration | None = None) -> Source:
    """What a launch of the cell's kernel compiles, under the table's entry or another."""
    if cell.kernel == "gram":
        return _gram_source(cell)
    module = first_order_kernels if cell.order == 1 else high_order_kernels
    kernel = getattr(module, f"{cell.kernel}_kernel")
    if cell.order == 1:
        return _source(kernel, cell, {"B": 1024, "COMPLETE": cell.ranked})
    config = config or cell.configuration()
    keys = torch.empty(cell.order - 1, 1, cell.r, dtype=cell.dtype, device="meta")
    constants = launcher._constants(config, keys, cell.ranked, cell.skip)
    if cell.kernel == "collect":
        return _source(kernel, cell, _collect_constants(constants))
    warps = config.forward_warps if cell.kernel == "forward" else config.backward_warps
    return _source(kernel, cell, constants, config.options(warps))


def _source(
    kernel: Any, cell: Cell, constants: Mapping[str, Any], options: Mapping[str, int] = DEFAULTS
) -> Source:
    arguments = inspect.signature(kernel.fn).parameters
    tables = TABLE_TYPES[cell.dtype]
    types = {n: ARGUMENT_TYPES.get(n, tables) for n in arguments if n not in constants}
    return Source(kernel, types, constants, options)


def _collect_constants(constants: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: constants[name] for name in ("R", "r", "RANKED")},
        "W": constants["SPLITS"] * constants["BW"],
        **launcher.collect_blocks(constants["r"]),
    }


def _gram_source(cell: Cell) -> Source:
    """Features as wide as a ViT-Tiny's and as a reduced teacher's."""
    config = gram_entry(cell.architecture, cell.arithmetic)
    constants = {
        "DS": 192,
        "DT": 256,
        "BI": config.rows,
        "BJ": config.rows,
        "BD": config.columns,
        "NEGATIVES": "clamp",
        "PRECISION": config.precision,
    }
    return _source(gram_kernels.gram_kernel, cell, constants, config.options())


# ---------------------------------------------------------------- grids


def quick_grid() -> Iterator[Cell]:
    """Every kernel on every architecture, at the order and width that are measured most."""
    for architecture in SHARED_LIMITS:
        yield from high_order_cells(architecture, "bf16", [(3, 32)], WALKS[:1])
        yield from _other_kernels(architecture)
    for architecture in ("sm_90", "gfx942"):
        yield from high_order_cells(architecture, "ieee", [(3, 32)], WALKS[:1])
    yield from high_order_cells("sm_90", "tf32", [(3, 32)], WALKS[-1:])


def default_grid() -> Iterator[Cell]:
    """Every arithmetic on every architecture; a narrow, the usual, and a wide table."""
    for architecture, arithmetic in _combinations():
        widths = [(2, 8), (3, 32), (5, 128)]
        yield from high_order_cells(architecture, arithmetic, widths, [WALKS[0], WALKS[-1]])
    for architecture in SHARED_LIMITS:
        yield from _other_kernels(architecture)


def full_grid() -> Iterator[Cell]:
    for architecture, arithmetic in _combinations():
        widths = itertools.product((2, 3, 4, 5), (8, 20, 32, 64, 128))
        yield from high_order_cells(architecture, arithmetic, list(widths), WALKS)
    for architecture in SHARED_LIMITS:
        yield from _other_kernels(architecture)


def high_order_cells(
    architecture: str, arithmetic: str, widths: Iterable[Width], walks: Iterable[Walk]
) -> Iterator[Cell]:
    """Lists are short in the last walk too: those are the ones walked in natural order."""
    for (order, r), (ranked, skip) in itertools.product(widths, walks):
        for kernel in ("forward", "backward_queries", "backward_keys"):
            cell = Cell(architecture, kernel, arithmetic, order, r, ranked, skip)
            yield cell
            if not ranked:
                yield replace(cell, short=True)
        if not skip:
            yield Cell(architecture, "collect", arithmetic, order, r, ranked)


def _combinations() -> Iterator[tuple[str, str]]:
    for architecture, arithmetic in itertools.product(SHARED_LIMITS, ARITHMETICS):
        if not (architecture.startswith("gfx") and arithmetic == "tf32"):  # taken as ieee there
            yield architecture, arithmetic


def _other_kernels(architecture: str) -> Iterator[Cell]:
    for ranked in (True, False):
        yield Cell(architecture, "forward", order=1, ranked=ranked)
        yield Cell(architecture, "backward", order=1, ranked=ranked)
    yield Cell(architecture, "collect", "bf16", 3, 32)
    yield Cell(architecture, "collect", "ieee", 5, 128)  # the widest
    yield Cell(architecture, "gram")
    if architecture.startswith("sm"):
        yield Cell(architecture, "gram", "tf32")

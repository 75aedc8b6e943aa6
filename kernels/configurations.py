"""Launch configurations of the Triton kernels: one table, by architecture and bucket.

A fixed entry compiles once and never searches. `using` overrides it, which is how a search
(`python -m benchmarks gpu --tune`) tries others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _options(warps: int, stages: int, registers: int | None) -> dict[str, int]:
    limit = {} if registers is None else {"maxnreg": registers}
    return {"num_warps": warps, "num_stages": stages, **limit}


@dataclass(frozen=True)
class Configuration:
    """Tile shape and launch options.

    Attributes:
        places, candidates: rows and columns of a tile of utilities, powers of two >= 16.
        forward_warps, backward_warps: warps of a program.
        stages: depth of software pipelining.
        columns: most columns of W = (R-1) r that one matrix product takes.
        part: columns that one takes when W has more than `columns`.
        precision: how float32 tables are multiplied: "ieee" or "tf32".
        registers: most registers of a thread, on NVIDIA. None lets the compiler choose, and it
            spills a few to fit one more program on a multiprocessor.
    """

    places: int = 64
    candidates: int = 64
    forward_warps: int = 8
    backward_warps: int = 8
    stages: int = 2
    columns: int = 128
    part: int = 64
    precision: str = "ieee"
    registers: int | None = None

    def width_block(self, width: int) -> int:
        """Columns of one block: a power of two, at least the 16 a matrix product needs."""
        whole = max(16, 1 << (width - 1).bit_length())
        return whole if whole <= self.columns else min(self.part, self.columns)

    def options(self, warps: int) -> dict[str, int]:
        """Launch options of a program of so many warps."""
        return _options(warps, self.stages, self.registers)

    def live_tiles(self, scores: Tensor, ranking: Tensor, skip: bool) -> Tensor:
        """Unfilled (N, place tiles, candidate tiles) int8, or (0,) when no tile is skipped."""
        n, m = scores.shape
        tiles = (-(-ranking.shape[1] // self.places), -(-m // self.candidates))
        shape = (n, *tiles) if skip else (0,)
        return torch.empty(shape, dtype=torch.int8, device=scores.device)


GFX = "gfx942"  # also for other AMD architectures

# (architecture, arithmetic) -> configuration; None is any other NVIDIA architecture.
# Chosen by `python -m benchmarks aot`: the largest tiles with matrix units and without a spill.
TABLE: dict[tuple[str | None, str], Configuration] = {
    # half the candidates of newer ones, whose matrix products leave operands in shared memory
    (None, "half"): Configuration(candidates=32, stages=1, registers=255),
    # at 4 warps a 64 x 64 tile spills; with two stages, where W = 128 and no tile is skipped
    ("sm_90", "half"): Configuration(stages=1, registers=255),
    ("sm_100", "half"): Configuration(stages=1, registers=255),
    # float32 operands take twice the registers of halves, hence blocks of half as many columns
    (None, "tf32"): Configuration(
        candidates=32, columns=64, part=16, stages=1, precision="tf32", registers=255
    ),
    ("sm_90", "tf32"): Configuration(columns=64, part=32, precision="tf32", registers=255),
    ("sm_100", "tf32"): Configuration(  # as on sm_90, but two stages spill
        columns=64, part=32, stages=1, precision="tf32", registers=255
    ),
    # without matrix units a thread holds whole rows of its operands, so blocks are narrow
    (None, "ieee"): Configuration(columns=16, part=16, stages=1, registers=255),
    # 4 warps of 64 do what 8 of 32 do, each thread may have 512 registers, and 32 candidates
    # leave room for two programs; its matrix units take IEEE float32 too
    (GFX, "half"): Configuration(candidates=32, forward_warps=4, backward_warps=4, stages=1),
    (GFX, "ieee"): Configuration(
        candidates=32, forward_warps=4, backward_warps=4, columns=64, part=32, stages=1
    ),
}
SHORT = 16  # places; shorter tiles do not fit matrix products


@dataclass(frozen=True)
class GramConfiguration:
    """Tile shape and launch options of the Gram distance.

    Attributes:
        rows: rows and columns of a tile of a Gram matrix, a power of two >= 16.
        columns: feature columns that one matrix product takes.
        warps, stages: launch options.
        precision: how float32 is multiplied: "ieee" or "tf32".
        registers: as in `Configuration`.
    """

    rows: int = 64
    columns: int = 32  # at 64 ieee products spill on sm_80 and sm_100
    warps: int = 8
    stages: int = 1
    precision: str = "ieee"
    registers: int | None = None

    def options(self) -> dict[str, int]:
        return _options(self.warps, self.stages, self.registers)


GRAM = GramConfiguration(registers=255)
_override: Configuration | None = None


def gram_configuration(device: torch.device) -> GramConfiguration:
    """The Gram distance's entry on `device`; its inputs are always float32."""
    return gram_entry(architecture(device), _arithmetic(device, torch.float32))


def gram_entry(architecture: str, arithmetic: str) -> GramConfiguration:
    """One tile shape for all; `registers` is an option of NVIDIA's compiler."""
    registers = None if architecture.startswith("gfx") else GRAM.registers
    return replace(GRAM, precision=arithmetic, registers=registers)


def configuration(device: torch.device, dtype: torch.dtype, k: int) -> Configuration:
    """The entry for tables of `dtype` on `device` and lists of k places."""
    if _override is not None:
        return _override
    return table_entry(architecture(device), _arithmetic(device, dtype), k)


def table_entry(architecture: str, arithmetic: str, k: int) -> Configuration:
    """The table's entry for "half", "tf32" or "ieee" products; short lists get low tiles."""
    family = GFX if architecture.startswith("gfx") else None
    found = TABLE.get((architecture, arithmetic), TABLE[family, arithmetic])
    return replace(found, places=SHORT) if k <= SHORT else found


def live_tiles(impl: str, scores: Tensor, ranking: Tensor, keys: Tensor) -> Tensor:
    """The record of live tiles that `impl` returns, unfilled."""
    config = configuration(scores.device, keys.dtype, ranking.shape[1])
    return config.live_tiles(scores, ranking, impl == "triton" and keys.shape[0] > 0)


def architecture(device: torch.device) -> str:
    """Name such as "sm_90" or "gfx942"; "cpu" under the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _arithmetic(device: torch.device, dtype: torch.dtype) -> str:
    """float32 tables follow torch.get_float32_matmul_precision(); products of halves are exact."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "tf32" if nvidia and torch.get_float32_matmul_precision() != "highest" else "ieee"


@contextmanager
def using(entry: Configuration) -> Iterator[None]:
    """Use `entry` for every launch inside the block."""
    global _override
    before, _override = _override, entry
    try:
        yield
    finally:
        _override = before

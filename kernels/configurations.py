"""Launch configurations of the Triton kernels: one table, by architecture and arithmetic.

A fixed entry compiles once and never searches. `using` overrides it for a block of code.

float32 tables are multiplied as three products of TF32 parts ("tf32x3", accurate to float32), so
on tensor cores, whatever torch.set_float32_matmul_precision says. IEEE products, which NVIDIA's
tensor cores do not have, are only taken where they are asked for: by a configuration with
precision="ieee", and on AMD, whose matrix units have them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Shape and launch options of one kernel.

    Attributes:
        places, candidates: sides of a tile of utilities, powers of two >= 16.
        warps: their number in a program.
        stages: depth of software pipelining.
        registers: most registers of a thread, on NVIDIA; None lets the compiler choose.
    """

    places: int = 64
    candidates: int = 64
    warps: int = 4
    stages: int = 3
    registers: int | None = None


@dataclass(frozen=True)
class Plan:
    """Tiles and launches of the high-order likelihood's passes.

    Attributes:
        forward, backward: their tiles.
        rest: tile of the backward pass over the rest of the natural walk; None is `backward`.
        columns: most columns of W = (R-1) r that one matrix product takes.
        precision: how float32 tables are multiplied: "tf32x3" or "ieee".
    """

    forward: Tile = Tile()
    backward: Tile = Tile()
    columns: int = 128
    precision: str = "tf32x3"
    rest: Tile | None = None

    @property
    def backward_rest(self) -> Tile:
        return self.rest or self.backward

    @property
    def place_side(self) -> int:
        """Places are padded to a multiple of this."""
        return max(x.places for x in self._tiles())

    @property
    def side(self) -> int:
        """Candidates are padded to a multiple of this."""
        return max(self.place_side, *(x.candidates for x in self._tiles()))

    def _tiles(self) -> tuple[Tile, ...]:
        return self.forward, self.backward, self.backward_rest

    def block(self, width: int) -> int:
        """Columns of one matrix product: a power of two, at least the 16 that it needs."""
        return min(self.columns, max(16, 1 << (width - 1).bit_length()))

    def constants(self, tile: Tile, width: int, block: int) -> dict[str, int | str]:
        """Constants that a launch of a pass with this tile is compiled for."""
        limit = {} if tile.registers is None else {"maxnreg": tile.registers}
        return {
            **limit,
            "W": width,
            "BW": block,
            "BK": tile.places,
            "BJ": tile.candidates,
            "PRECISION": self.precision,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


GFX = "gfx942"  # also for other AMD architectures

# (architecture, arithmetic) -> plans for W of up to 64 columns, up to 128, and more; None is any
# other NVIDIA architecture. Chosen by `python -m benchmarks aot`: fewest issue slots a score
# without a spill, at least two programs a multiprocessor or three stages where that is possible.
TABLE: dict[tuple[str | None, str], tuple[Plan, Plan, Plan]] = {
    (None, "half"): (
        Plan(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        Plan(Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)),
        Plan(Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), columns=64),
    ),
    ("sm_90", "half"): (
        Plan(Tile(64, 128, 4, 2), Tile(128, 64, 4, 2)),
        Plan(Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)),
        Plan(Tile(64, 64, 4, 1), Tile(64, 64, 4, 3)),
    ),
    ("sm_100", "half"): (
        Plan(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        Plan(Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)),
        Plan(Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)),
    ),
    # without wgmma the parts of float32 operands live in registers
    (None, "float32"): (
        Plan(Tile(32, 32, 4, 2, 255), Tile(32, 32, 4, 2, 255), columns=64),
        Plan(Tile(32, 32, 4, 1, 255), Tile(32, 32, 4, 1, 255), columns=32),
        Plan(Tile(32, 32, 4, 1, 255), Tile(32, 32, 4, 1, 255), columns=32),
    ),
    ("sm_90", "float32"): (
        Plan(Tile(64, 64, 4, 3), Tile(64, 128, 8, 3), columns=64, rest=Tile(32, 128, 8, 3)),
        Plan(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), columns=32),
        Plan(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), columns=32),
    ),
    ("sm_100", "float32"): (
        Plan(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), columns=64),
        Plan(Tile(32, 32, 4, 1, 255), Tile(32, 32, 4, 1, 255), columns=32),
        Plan(Tile(32, 32, 4, 1, 255), Tile(32, 32, 4, 1, 255), columns=32),
    ),
    (GFX, "half"): (
        Plan(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), precision="ieee"),
        Plan(Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), precision="ieee"),
        Plan(Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), precision="ieee", columns=64),
    ),
    (GFX, "float32"): (
        Plan(Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), columns=64, precision="ieee"),
        Plan(Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), columns=64, precision="ieee"),
        Plan(Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), columns=64, precision="ieee"),
    ),
}
SHORT = 16  # places; lower tiles do not fit matrix products
WIDTHS = (64, 128)  # columns up to which the first and the second plan of an entry go


@dataclass(frozen=True)
class GramPlan:
    """Tiles and launches of the Gram distance.

    Attributes:
        rows: rows and columns of a tile of a Gram matrix, a power of two >= 16.
        inner: feature columns that one product of a Gram tile takes.
        columns: feature columns of a tile of the gradient.
        warps, stages: launch options.
        precision: how float32 is multiplied: "tf32x3" or "ieee".
    """

    rows: int = 64
    inner: int = 32
    columns: int = 64
    warps: int = 8
    stages: int = 2
    precision: str = "tf32x3"

    def constants(self, columns: int) -> dict[str, int | str]:
        """Constants that a launch is compiled for, with products of so many columns."""
        return {
            "BI": self.rows,
            "BD": columns,
            "PRECISION": self.precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


GRAM = GramPlan()
_override: Plan | None = None


def plan_for(device: torch.device, dtype: torch.dtype, width: int, k: int) -> Plan:
    """The table's entry for tables of `dtype`, W columns and lists of k places on `device`."""
    if _override is not None:
        return _override
    return plan(architecture(device), dtype, width, k)


def plan(architecture: str, dtype: torch.dtype, width: int, k: int) -> Plan:
    """The same for an architecture that need not be here; short lists get low tiles."""
    arithmetic = "float32" if dtype == torch.float32 else "half"
    family = GFX if architecture.startswith("gfx") else None
    plans = TABLE.get((architecture, arithmetic), TABLE[family, arithmetic])
    found = plans[sum(width > most for most in WIDTHS)]
    if k > SHORT:
        return found
    tiles = found.forward, found.backward, found.backward_rest
    forward, backward, rest = (replace(x, places=SHORT) for x in tiles)
    return replace(found, forward=forward, backward=backward, rest=rest)


def gram_plan_for(device: torch.device) -> GramPlan:
    """The Gram distance's entry on `device`; its inputs are always float32."""
    name = architecture(device)
    if name.startswith("gfx"):
        return replace(GRAM, precision="ieee")
    # without wgmma the parts of float32 operands live in registers
    return replace(GRAM, rows=32, columns=32, warps=4) if name in OLDER else GRAM


OLDER = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121")


def architecture(device: torch.device) -> str:
    """Name such as "sm_90" or "gfx942"; "cpu" under the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@contextmanager
def using(entry: Plan) -> Iterator[None]:
    """Use `entry` for every launch inside the block."""
    global _override
    before, _override = _override, entry
    try:
        yield
    finally:
        _override = before
